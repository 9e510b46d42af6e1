"""A copy of the model for sampling: adapters are merged into its weights, which are stored in the compute dtype.

Decoding reads every weight for every token. LoRA adds two small products to each large one, and under autocast fp32
weights are cast at every step. A copy that is updated after each optimizer step avoids both, and costs memory. Adapters
are never merged into the live weights, because rounding errors would add up.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hypo_train.model.quantization import dequantized, is_quantized
from hypo_train.sampling.protocol import base_model

_TRAINED_COPY = re.compile(r"\.modules_to_save\.[^.]+\.")  # where peft keeps a module whose weights are all trained


class MergedWeights:
    """A copy of a model without adapters, in ``model``. Call ``refresh`` after the live model has changed.

    Linear layers with LoRA get new weights: base weight plus adapters. With a ``dtype``, so do linear layers in another
    dtype. All other tensors are the live model's.

    Raises:
        ValueError: see ``unmergeable`` and ``quantized``.
    """

    def __init__(self, live: Any, dtype: torch.dtype | None) -> None:
        if reason := unmergeable(live) or quantized(live):
            raise ValueError(reason)
        base = base_model(live)
        self.dtype = dtype
        shared = {id(tensor): tensor for tensor in chain(base.parameters(), base.buffers())}
        self.model = copy.deepcopy(base, shared)
        self._copies: list[tuple[Tensor, Any, str]] = []  # copied tensor, live layer, "weight" or "bias"
        for name, layer in linear_layers(base):
            copied_layer, adapted = self.model.get_submodule(name), is_adapted(layer)
            if adapted:
                copied_layer = copied_layer.base_layer
                parent, _, child = name.rpartition(".")
                setattr(self.model.get_submodule(parent), child, copied_layer)
            if adapted or dtype not in (None, layer.weight.dtype):
                self._copy(copied_layer, layer, "weight", dtype)
            bias = layer_bias(layer)
            if bias is not None and dtype not in (None, bias.dtype):
                self._copy(copied_layer, layer, "bias", dtype)
        self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """Copy the current live weights."""
        self._made_from = self._state()
        for tensor, layer, kind in self._copies:
            live = merged_weight(layer) if kind == "weight" else layer_bias(layer)
            assert live is not None
            tensor.copy_(live)

    def nbytes(self) -> int:
        """Return the size of the copied tensors."""
        return sum(tensor.nbytes for tensor, _, _ in self._copies)

    def is_stale(self) -> bool:
        """Return whether a live weight was replaced or changed, or the active adapters changed."""
        return self._state() != self._made_from

    def _copy(self, layer: nn.Module, live: Any, kind: str, dtype: torch.dtype | None) -> None:
        """Give ``layer`` a new weight or bias, in ``dtype`` or in the dtype of the live one."""
        tensor = torch.empty_like(getattr(layer, kind), dtype=dtype)
        setattr(layer, kind, nn.Parameter(tensor, requires_grad=False))
        self._copies.append((tensor, live, kind))

    def _state(self) -> list[Any]:
        state: list[Any] = []
        for _, layer, _ in self._copies:
            state += [(p.data_ptr(), p._version) for p in layer.parameters()]
            if is_adapted(layer):
                state.append((layer.disable_adapters, tuple(layer.active_adapters)))
        return state


def merged_weights(
    model: Any, dtype: torch.dtype | None = None, *, embeddings: bool = False
) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, weight) of the model without adapters: LoRA is merged, 4-bit weights are unpacked.

    Args:
        dtype: the dtype of the weights; None keeps the dtype of each weight, and unpacks 4-bit weights to fp32.
        embeddings: merge LoRA on embeddings too; an LM head that was tied to them then has a weight of its own.

    Raises:
        ValueError: see ``unmergeable``.
    """
    if reason := unmergeable(model, embeddings=embeddings):
        raise ValueError(reason)
    base = base_model(model)
    adapted = [(name, layer) for name, layer in linear_layers(base) if is_adapted(layer)]
    for name, layer in adapted:
        yield f"{name}.weight", merged_weight(layer, dtype).detach()
        bias = layer_bias(layer)
        if bias is not None:
            yield f"{name}.bias", bias.detach().to(dtype or bias.dtype)
    inside = tuple(f"{name}." for name, _ in adapted)
    seen: set[int] = set()
    for name, parameter in base.named_parameters(remove_duplicate=False):
        if name.startswith(inside) or ".original_module." in name:  # peft trains a copy of this one
            continue
        if id(parameter) not in seen:
            seen.add(id(parameter))
            weight = dequantized(parameter) if is_quantized(parameter) else parameter.detach()
            yield _TRAINED_COPY.sub(".", name), weight.to(dtype or weight.dtype)


def is_adapted(layer: Any) -> bool:
    return hasattr(layer, "lora_A")


def unties(model: Any) -> bool:
    """Return whether merging makes tied head and embeddings two different matrices."""
    base = base_model(model)
    head, embeddings = base.get_output_embeddings(), base.get_input_embeddings()
    return (is_adapted(head) or is_adapted(embeddings)) and head is not None and head.weight is embeddings.weight


def layer_bias(layer: Any) -> Tensor | None:
    return getattr(layer.base_layer if is_adapted(layer) else layer, "bias", None)


@torch.no_grad()
def merged_weight(layer: Any, dtype: torch.dtype | None = None) -> Tensor:
    """Return the weight with its adapters, which are added in fp32: (out, in), or (in, out) for Conv1D.

    ``dtype`` None means the dtype of the base weight, or fp32 if that has 4 bits.
    """
    base = layer.base_layer.weight if is_adapted(layer) else layer.weight
    weight = dequantized(base) if is_quantized(base) else base
    if not is_adapted(layer) or layer.disable_adapters:
        return weight.to(dtype or weight.dtype)
    if isinstance(layer.base_layer, nn.Embedding):
        names = [name for name in layer.active_adapters if name in layer.lora_embedding_A]
        rows = (layer.scaling[n] * (layer.lora_embedding_B[n] @ layer.lora_embedding_A[n]).float().t() for n in names)
        return sum(rows, weight.float()).to(dtype or weight.dtype)
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    deltas = (layer.scaling[n] * (layer.lora_B[n].weight.float() @ layer.lora_A[n].weight.float()) for n in names)
    merged = sum(deltas, (weight.t() if layer.fan_in_fan_out else weight).float())
    if names and layer.lora_variant.get(names[0]) is not None:  # DoRA: rows have a trained norm, computed as in peft
        magnitude = layer.lora_magnitude_vector[names[0]].weight.float()
        merged = (magnitude / torch.linalg.norm(merged, dim=1)).unsqueeze(1) * merged
    return (merged.t() if layer.fan_in_fan_out else merged).to(dtype or weight.dtype)


def unmergeable(model: Any, *, embeddings: bool = False) -> str | None:
    """Return the reason why the adapters cannot be merged, or None.

    Only LoRA and DoRA without a bias on linear layers can be merged and, with ``embeddings``, LoRA on embeddings.
    """
    base = base_model(model)
    kinds = (nn.Linear, Conv1D, nn.Embedding) if embeddings else (nn.Linear, Conv1D)
    for name, layer in linear_layers(base):
        if not is_adapted(layer):
            continue
        plain = isinstance(layer.base_layer, kinds) and not layer.merged
        for adapter in (*layer.lora_A, *layer.lora_embedding_A):
            variant = layer.lora_variant.get(adapter)
            dora_alone = type(variant).__name__ == "DoraLinearVariant" and len(layer.lora_A) == 1
            plain = plain and (variant is None or dora_alone) and not layer.lora_bias[adapter]
        if not plain:
            return f"the adapter on {name} is not plain LoRA or DoRA on a linear layer, so it cannot be merged"
    return None


def quantized(model: Any) -> str | None:
    """Return the reason why a merged copy would unpack 4-bit weights, or None if there are none."""
    packed = any(map(is_quantized, base_model(model).parameters()))
    return "weights are held in 4 bits, and a copy with the adapter merged would unpack them" if packed else None


def linear_layers(base: nn.Module) -> list[tuple[str, Any]]:
    """Return (name, layer) of all adapted layers and of all linear layers outside adapted layers."""
    adapted = [(name, layer) for name, layer in base.named_modules() if is_adapted(layer)]
    inside = tuple(f"{name}." for name, _ in adapted)
    return adapted + [
        (name, layer)
        for name, layer in base.named_modules()
        if type(layer) is nn.Linear and not name.startswith(inside)
    ]
