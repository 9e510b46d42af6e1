"""Weights sharded over the ranks by PyTorch's FSDP2, which gathers a layer's only while the layer runs.

Code that does more than a forward and a backward pass needs a function of this module: to run with other weights, to
call layers several times, or to read full weights.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor


@dataclass(frozen=True)
class Sharding:
    """The devices that weights are sharded over, and the dtype that they are gathered in."""

    mesh: DeviceMesh
    device: torch.device
    dtype: torch.dtype | None  # None: the parameter's own

    @classmethod
    def over_all_ranks(cls, device: torch.device, *, autocast: bool) -> Sharding:
        """Shard over all ranks. Under autocast, products are in bf16, so weights are gathered in bf16 too."""
        mesh = init_device_mesh(device.type, (dist.get_world_size(),))
        return cls(mesh, device, torch.bfloat16 if autocast else None)


def shard(model: nn.Module, layers: Iterable[nn.Module], sharding: Sharding) -> None:
    """Shard rank 0's weights over all ranks, in place: each of ``layers`` as one unit, and all other parameters as one.

    Parameters that are DTensors already stay as they are. Rank 0 has its weights in host memory; those of the other
    ranks may be on the meta device. No other rank and no device ever holds more than one layer beside its shards.
    """
    options: dict[str, Any] = {
        "mesh": sharding.mesh,
        # For the root too: code outside a forward pass must find the sharded parameters.
        "reshard_after_forward": True,
        # Gradients are summed in fp32. Inputs are not cast: FSDP would take a tree's layout apart.
        "mp_policy": MixedPrecisionPolicy(
            param_dtype=sharding.dtype,
            reduce_dtype=None if sharding.dtype is None else torch.float32,
            cast_forward_inputs=False,
        ),
        "ignored_params": {p for p in model.parameters() if isinstance(p, DTensor)},
    }
    shared, remaining = _shared_tensors(model), dict.fromkeys(model.modules())
    for unit in (*layers, model):
        modules = [module for module in unit.modules() if module in remaining]
        _load_from_first(modules, sharding.device, shared)
        for module in modules:
            del remaining[module]
        fully_shard(unit, **options)


def _shared_tensors(model: nn.Module) -> dict[Tensor, Tensor | None]:
    """Return the parameters and buffers that several modules hold, as a tied head holds the embedding's."""
    stores = (store for module in model.modules() for store in (module._parameters, module._buffers))
    counts = Counter(tensor for store in stores for tensor in store.values() if tensor is not None)
    return {tensor: None for tensor, count in counts.items() if count > 1}


def _load_from_first(modules: Iterable[nn.Module], device: torch.device, shared: dict[Tensor, Tensor | None]) -> None:
    """Replace parameters and buffers by rank 0's values; ``shared`` keeps the replacement of tensors met before."""
    for module in modules:
        for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is None or isinstance(tensor, DTensor):
                continue
            replacement = shared.get(tensor)
            if replacement is None:
                replacement = broadcast_from_first(tensor, device)
            if tensor in shared:
                shared[tensor] = replacement
            setattr(module, name, replacement)


def broadcast_from_first(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a parameter or buffer with rank 0's values, on every rank's ``device``."""
    value = tensor.detach().to(device) if dist.get_rank() == 0 else torch.empty_like(tensor, device=device)
    dist.broadcast(value, src=0)
    return nn.Parameter(value, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else value


def is_sharded(model: nn.Module) -> bool:
    return isinstance(model, FSDPModule)


@contextmanager
def unsharded(model: nn.Module) -> Iterator[None]:
    """Gather all weights on every rank for a block inside a forward pass of ``model``.

    In the block, layers may run any number of times, and a different number on each rank.
    """
    units = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for unit in units:
        unit.set_reshard_after_forward(False, recurse=False)
        unit.unshard()
    try:
        with _no_record_of_layers(units):
            yield
    finally:
        for unit in units:
            unit.set_reshard_after_forward(True, recurse=False)
            unit.reshard()


@contextmanager
def _no_record_of_layers(units: Iterable[FSDPModule]) -> Iterator[None]:
    """Let FSDP forget which layers a block has run.

    FSDP records each call of a layer, and gathers the weights of the call before when the backward pass reaches it. A
    rank whose block ran no layer would gather nothing where another rank gathers, and both would wait for ever.
    """
    groups = [group for unit in units for group in unit._get_fsdp_state()._fsdp_param_groups]
    records: list[list[Any]] = [group._post_forward_indices for group in groups]
    records += {id(group.comm_ctx): group.comm_ctx.post_forward_order for group in groups}.values()
    lengths = [len(record) for record in records]
    try:
        yield
    finally:
        for record, length in zip(records, lengths, strict=True):
            del record[length:]


@contextmanager
def swapped_parameters(model: nn.Module, others: Mapping[str, Tensor]) -> Iterator[None]:
    """Run a block with the weights ``others``, sharded alike, in place of the parameters of the same names."""
    parameters = dict(model.named_parameters())
    _swap(parameters, others)
    try:
        yield
    finally:
        _swap(parameters, others)


@torch.no_grad()
def _swap(parameters: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> None:
    for name, other in others.items():
        first, second = local(parameters[name]), local(other)
        copy = first.clone()
        first.copy_(second)
        second.copy_(copy)


def local(tensor: Tensor) -> Tensor:
    """Return this rank's shard of a DTensor, and any other tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full_tensor(tensor: Tensor) -> Tensor:
    """Gather a DTensor, which all ranks do together; return any other tensor as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def shard_like(tensor: Tensor, like: Tensor) -> Tensor:
    """Shard a full tensor, which every rank has, as ``like`` is sharded; return it as it is if ``like`` is not."""
    if not isinstance(like, DTensor):
        return tensor
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
