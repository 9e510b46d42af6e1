"""Weights spread over the processes by PyTorch's FSDP2: a layer's are put together when it runs, and only then.

Everything that is more than a forward and a backward pass has to say so here: to run another model's weights, to call
the layers many times, to read weights whole.
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
class Spread:
    """Over which devices weights are spread, and what they are put together in."""

    mesh: DeviceMesh
    device: torch.device
    dtype: torch.dtype | None  # None: their own

    @classmethod
    def over_all(cls, device: torch.device, *, autocast: bool) -> Spread:
        """All processes. Under autocast products are in bf16 anyway: so are the weights that the processes exchange."""
        mesh = init_device_mesh(device.type, (dist.get_world_size(),))
        return cls(mesh, device, torch.bfloat16 if autocast else None)


def shard(model: nn.Module, layers: Iterable[nn.Module], spread: Spread) -> None:
    """Spread the first process's weights over all, in place: those of a layer together, and all that is in none; what
    is spread already is left as it is.

    The first one has read them into its host's memory, and the others' may lie on the meta device: no other process,
    and no device, holds more at a time than a layer beside its parts.
    """
    options: dict[str, Any] = {
        "mesh": spread.mesh,
        # Always, the root too: whoever asks for parameters outside of a forward pass gets the sharded ones.
        "reshard_after_forward": True,
        # Gradients add in fp32. Inputs stay as they are: FSDP's cast would take a tree's layout apart.
        "mp_policy": MixedPrecisionPolicy(
            param_dtype=spread.dtype,
            reduce_dtype=None if spread.dtype is None else torch.float32,
            cast_forward_inputs=False,
        ),
        "ignored_params": {p for p in model.parameters() if isinstance(p, DTensor)},
    }
    shared, left = _shared(model), dict.fromkeys(model.modules())
    for part in (*layers, model):
        modules = [module for module in part.modules() if module in left]
        _take_from_first(modules, spread.device, shared)
        for module in modules:
            del left[module]
        fully_shard(part, **options)


def _shared(model: nn.Module) -> dict[Tensor, Tensor | None]:
    """The parameters and buffers that several modules have, as a tied head has an embedding's."""
    tensors = (t for m in model.modules() for of in (m._parameters, m._buffers) for t in of.values() if t is not None)
    return {tensor: None for tensor, times in Counter(tensors).items() if times > 1}


def _take_from_first(modules: Iterable[nn.Module], device: torch.device, shared: dict[Tensor, Tensor | None]) -> None:
    """Give parameters and buffers the first process's values; ``shared``: what has become of those met before."""
    for module in modules:
        for name, own in [*module._parameters.items(), *module._buffers.items()]:
            if own is None or isinstance(own, DTensor):
                continue
            taken = shared.get(own)
            if taken is None:
                taken = of_first(own, device)
            if own in shared:
                shared[own] = taken
            setattr(module, name, taken)


def of_first(own: Tensor, device: torch.device) -> Tensor:
    """A parameter or buffer with the first process's values, on every process's ``device``."""
    value = own.detach().to(device) if dist.get_rank() == 0 else torch.empty_like(own, device=device)
    dist.broadcast(value, src=0)
    return nn.Parameter(value, requires_grad=own.requires_grad) if isinstance(own, nn.Parameter) else value


def is_sharded(model: nn.Module) -> bool:
    return isinstance(model, FSDPModule)


@contextmanager
def unsharded(model: nn.Module) -> Iterator[None]:
    """All weights whole on every process, inside a forward pass of ``model``: its layers may run any number of times,
    on each process as often as it needs."""
    parts = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    try:
        yield
    finally:
        for part in parts:
            part.set_reshard_after_forward(True, recurse=False)
            part.reshard()


@contextmanager
def exchanged(model: nn.Module, others: Mapping[str, Tensor]) -> Iterator[None]:
    """``model`` with the weights ``others``, sharded as its own are, in the place of its own of the same names."""
    own = dict(model.named_parameters())
    _exchange(own, others)
    try:
        yield
    finally:
        _exchange(own, others)


@torch.no_grad()
def _exchange(own: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> None:
    for name, other in others.items():
        mine, its = local(own[name]), local(other)
        kept = mine.clone()
        mine.copy_(its)
        its.copy_(kept)


def local(tensor: Tensor) -> Tensor:
    """This process's part of a sharded tensor; any other one as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """A sharded tensor put together, which all processes ask for; any other one as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def sharded_as(tensor: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, which every process has, sharded as ``like``, which has its shape, is; or as it was."""
    if not isinstance(like, DTensor):
        return tensor
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
