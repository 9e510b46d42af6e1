"""The LM head as a function of a raw product: what models do between ``h·Wᵀ`` and the softmax."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hypo_kernels.vocab import VocabShard


class LoRA(NamedTuple):
    """A low-rank update of the head, ``W + scale · B·A``, that is never multiplied out."""

    A: Tensor  # (r, D)
    B: Tensor  # (V, r)
    scale: float = 1.0


@dataclass(frozen=True)
class LMHead:
    """``logits = softcap(logit_scale · (h·Wᵀ + bias)) / temperature``, softcap(z) = c·tanh(z / c).

    ``weight`` is (V, D), ``bias`` (V,) or None. ``logit_scale`` is Cohere's factor (Granite divides: pass
    its reciprocal), ``logit_softcap`` Gemma's final softcap. With ``lora_weight`` (V, r), LoRA's B, the raw
    product has a second term of r features. With ``shard``, all three hold this rank's vocabulary alone.
    """

    weight: Tensor  # (V, D)
    bias: Tensor | None = None  # (V,)
    logit_softcap: float | None = None
    logit_scale: float = 1.0
    temperature: float = 1.0
    lora_weight: Tensor | None = None  # (V, r)
    shard: VocabShard | None = None

    @property
    def vocab_size(self) -> int:
        """Of this rank."""
        return self.weight.shape[0]

    @property
    def largest_share(self) -> int:
        """Vocabulary entries of the rank that has most: what all ranks plan with."""
        return self.vocab_size if self.shard is None else self.shard.largest

    @property
    def weights(self) -> list[Tensor]:
        """The matrices of the raw product's terms."""
        return [self.weight] if self.lora_weight is None else [self.weight, self.lora_weight]

    def constants(self) -> dict[str, Any]:
        """Everything but the matrices, as keyword arguments of the public functions."""
        return {
            "bias": self.bias,
            "logit_softcap": self.logit_softcap,
            "logit_scale": self.logit_scale,
            "temperature": self.temperature,
        }

    def logits(self, raw: Tensor) -> Tensor:
        """The model's logits from ``raw = h·Wᵀ`` (..., V), out of place, in the dtype of ``raw``."""
        if self.bias is not None:
            raw = raw + self.bias.to(raw.dtype)
        if self.logit_scale != 1.0:
            raw = raw * self.logit_scale
        if self.logit_softcap is not None:
            raw = self.logit_softcap * torch.tanh(raw / self.logit_softcap)
        return raw / self.temperature if self.temperature != 1.0 else raw
