"""The LM head as a function of a raw product: what models do between ``h·Wᵀ`` and the softmax."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class LMHead:
    """``logits = softcap(logit_scale · (h·Wᵀ + bias)) / temperature``, softcap(z) = c·tanh(z / c).

    ``weight`` is (V, D), ``bias`` (V,) or None. ``logit_scale`` is Cohere's factor (Granite divides: pass
    its reciprocal), ``logit_softcap`` Gemma's final softcap.
    """

    weight: Tensor  # (V, D)
    bias: Tensor | None = None  # (V,)
    logit_softcap: float | None = None
    logit_scale: float = 1.0
    temperature: float = 1.0

    @property
    def vocab_size(self) -> int:
        return self.weight.shape[0]

    @property
    def slope_is_needed(self) -> bool:
        """Whether ∂logits/∂raw is anything but 1."""
        return self.logit_softcap is not None or self.logit_scale != self.temperature

    def constants(self) -> dict[str, Any]:
        """Everything but the weight, as keyword arguments of the public functions."""
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
