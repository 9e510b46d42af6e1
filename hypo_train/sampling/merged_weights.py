"""A copy of the model to sample from: adapters merged into its weights, and those in the dtype they are read in.

Decoding reads every weight for every token. LoRA adds two small products to each large one, and fp32 weights
under autocast are cast anew at every step. A copy, made again after each optimizer step, costs memory once and
neither. The live weights are never merged into: rounding would add up.
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

_TRAINED_COPY = re.compile(r"\.modules_to_save\.[^.]+\.")  # peft's place for a module that is trained whole


class MergedWeights:
    """`model`, sharing what it can with the live one; `refresh` after the live one has changed.

    Linear layers with LoRA get weights of their own, base and adapters in one. With a `dtype`, so do all others
    that are held in another one. Everything else is the live model's own tensors.

    Raises:
        ValueError: see `unmergeable` and `quantized`.
    """

    def __init__(self, live: Any, dtype: torch.dtype | None) -> None:
        if reason := unmergeable(live) or quantized(live):
            raise ValueError(reason)
        base = base_model(live)
        self.dtype = dtype
        shared = {id(tensor): tensor for tensor in chain(base.parameters(), base.buffers())}
        self.model = copy.deepcopy(base, shared)
        self._copies: list[tuple[Tensor, Any, str]] = []  # own tensor, live layer, "weight" or "bias"
        for name, layer in linear_layers(base):
            own, adapted = self.model.get_submodule(name), is_adapted(layer)
            if adapted:
                own = own.base_layer
                parent, _, child = name.rpartition(".")
                setattr(self.model.get_submodule(parent), child, own)
            if adapted or dtype not in (None, layer.weight.dtype):
                self._own(own, layer, "weight", dtype)
            bias = layer_bias(layer)
            if bias is not None and dtype not in (None, bias.dtype):
                self._own(own, layer, "bias", dtype)
        self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """Take the live weights as they are now."""
        self._made_from = self._state()
        for own, layer, kind in self._copies:
            live = merged_weight(layer) if kind == "weight" else layer_bias(layer)
            assert live is not None
            own.copy_(live)

    def nbytes(self) -> int:
        """Of the tensors that are its own."""
        return sum(own.nbytes for own, _, _ in self._copies)

    def is_stale(self) -> bool:
        """Whether a weight was replaced, or written to in a way that autograd counts, or adapters were switched."""
        return self._state() != self._made_from

    def _own(self, layer: nn.Module, live: Any, kind: str, dtype: torch.dtype | None) -> None:
        """Give `layer` a weight or bias of its own, in `dtype` or in the live one's."""
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
    """Every weight of the model by its name without adapters, one at a time, LoRA merged into it, 4 bits unpacked.

    ``dtype``: what they are cast to; None = each in its own, fp32 where it is packed. ``embeddings``: LoRA on those is
    merged too, and a head that was tied to one comes by a name of its own.

    Raises:
        ValueError: see `unmergeable`.
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
        if name.startswith(inside) or ".original_module." in name:  # which a trained copy has replaced
            continue
        if id(parameter) not in seen:
            seen.add(id(parameter))
            weight = dequantized(parameter) if is_quantized(parameter) else parameter.detach()
            yield _TRAINED_COPY.sub(".", name), weight.to(dtype or weight.dtype)


def is_adapted(layer: Any) -> bool:
    return hasattr(layer, "lora_A")


def unties(model: Any) -> bool:
    """Whether a merged adapter makes head and embeddings, which are tied, two matrices."""
    base = base_model(model)
    head, embeddings = base.get_output_embeddings(), base.get_input_embeddings()
    return (is_adapted(head) or is_adapted(embeddings)) and head is not None and head.weight is embeddings.weight


def layer_bias(layer: Any) -> Tensor | None:
    return getattr(layer.base_layer if is_adapted(layer) else layer, "bias", None)


@torch.no_grad()
def merged_weight(layer: Any, dtype: torch.dtype | None = None) -> Tensor:
    """(out, in), a Conv1D's (in, out), in ``dtype``: None is the base weight's, fp32 where that is packed.

    The adapters are added in fp32.
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
    if names and layer.lora_variant.get(names[0]) is not None:  # DoRA: rows of a trained length, as peft computes it
        magnitude = layer.lora_magnitude_vector[names[0]].weight.float()
        merged = (magnitude / torch.linalg.norm(merged, dim=1)).unsqueeze(1) * merged
    return (merged.t() if layer.fan_in_fan_out else merged).to(dtype or weight.dtype)


def unmergeable(model: Any, *, embeddings: bool = False) -> str | None:
    """Why adapters cannot be merged: variants but DoRA, a bias of the adapter's, layers that are not linear (nor, where
    they are allowed, embeddings)."""
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
    """Why there is no copy with adapters merged in: weights of 4 bits, which one would unpack."""
    packed = any(map(is_quantized, base_model(model).parameters()))
    return "weights are held in 4 bits, and a copy with the adapter merged would unpack them" if packed else None


def linear_layers(base: nn.Module) -> list[tuple[str, Any]]:
    """Every adapted layer, and every linear one that is no part of an adapted one."""
    adapted = [(name, layer) for name, layer in base.named_modules() if is_adapted(layer)]
    inside = tuple(f"{name}." for name, _ in adapted)
    return adapted + [
        (name, layer)
        for name, layer in base.named_modules()
        if type(layer) is nn.Linear and not name.startswith(inside)
    ]
