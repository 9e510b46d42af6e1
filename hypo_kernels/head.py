"""The LM head: its tensors and constants, and the map from a raw product ``h·Wᵀ`` to the model's logits."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hypo_kernels.errors import require
from hypo_kernels.vocab import VocabShard


class LoRA(NamedTuple):
    """A low-rank update of the head, ``W + scale · B·A``. The product ``B·A`` is never computed."""

    A: Tensor  # (r, D)
    B: Tensor  # (V, r)
    scale: float = 1.0


@dataclass(frozen=True)
class LMHead:
    """An LM head: ``logits = softcap(logit_scale · (h·Wᵀ + bias)) / temperature``, softcap(z) = c·tanh(z / c).

    Every public function accepts an ``LMHead`` instead of ``lm_head_weight`` and the head's keyword arguments.
    """

    weight: Tensor
    """(V, D), float. Under ``vocab_shard``: the rows of this rank."""
    bias: Tensor | None = None
    """(V,), or None."""
    logit_softcap: float | None = None
    """Gemma's final softcap c > 0, or None."""
    logit_scale: float = 1.0
    """Cohere's factor. Granite divides: pass the reciprocal."""
    temperature: float = 1.0
    """Positive; the logits are divided by it after all else."""
    lora: LoRA | None = None
    """A low-rank update of ``weight``."""
    vocab_shard: VocabShard | None = None
    """The part of the vocabulary that ``weight``, ``bias`` and ``lora.B`` hold on this rank; None = all of it."""

    @classmethod
    def of(cls, weight: Tensor | LMHead, **arguments: Any) -> LMHead:
        """Return ``weight`` if it is an ``LMHead``, else the ``LMHead`` of a weight and its keyword arguments.

        Raises ValueError if an ``LMHead`` comes together with another head argument.
        """
        if not isinstance(weight, LMHead):
            return cls(weight, **arguments)
        for name, value in arguments.items():
            default = DEFAULTS[name]
            require(
                value is None if default is None else value == default,
                f"{name} is given beside an LMHead: make it a field of the head, LMHead(weight, {name}=...)",
            )
        return weight

    @property
    def vocab_size(self) -> int:
        """The number of vocabulary entries on this rank."""
        return self.weight.shape[0]

    @property
    def largest_share(self) -> int:
        """The largest number of vocabulary entries on any rank. All ranks plan their chunks with it."""
        return self.vocab_size if self.vocab_shard is None else self.vocab_shard.largest

    @property
    def lora_weight(self) -> Tensor | None:
        """LoRA's B (V, r), or None."""
        return None if self.lora is None else self.lora.B

    @property
    def weights(self) -> list[Tensor]:
        """The matrices of the head's GEMMs: the weight, and LoRA's B."""
        return [self.weight] if self.lora is None else [self.weight, self.lora.B]

    @property
    def inner_factor(self) -> float:
        """The factor of ``raw + bias``, inside tanh if there is a softcap."""
        return self.logit_scale / (self.temperature if self.logit_softcap is None else self.logit_softcap)

    @property
    def outer_factor(self) -> float:
        """The factor of tanh: softcap / temperature, or 0 without a softcap."""
        return 0.0 if self.logit_softcap is None else self.logit_softcap / self.temperature

    @property
    def slope(self) -> float:
        """The constant factor of ∂logits/∂raw. Without a softcap it is the full derivative."""
        return self.logit_scale / self.temperature

    def constants(self) -> dict[str, Any]:
        """Return the bias and the scalars of the head, as keyword arguments of the public functions."""
        return {
            "bias": self.bias,
            "logit_softcap": self.logit_softcap,
            "logit_scale": self.logit_scale,
            "temperature": self.temperature,
        }

    def with_tensors(self, weight: Tensor, bias: Tensor | None, lora_weight: Tensor | None) -> LMHead:
        """Return a copy of the head with these tensors and the same LoRA A."""
        lora = None if self.lora is None or lora_weight is None else self.lora._replace(B=lora_weight)
        return replace(self, weight=weight, bias=bias, lora=lora)

    def logits(self, raw: Tensor) -> Tensor:
        """Return the model's logits of ``raw = h·Wᵀ`` (..., V), out of place, in the dtype of ``raw``.

        The operations are in the order of model code. :meth:`logits_` merges constant factors, and rounds less often.
        """
        if self.bias is not None:
            raw = raw + self.bias.to(raw.dtype)
        if self.logit_scale != 1.0:
            raw = raw * self.logit_scale
        if self.logit_softcap is not None:
            raw = self.logit_softcap * torch.tanh(raw / self.logit_softcap)
        return raw / self.temperature if self.temperature != 1.0 else raw

    def logits_(self, raw: Tensor) -> Tensor:
        """Convert ``raw`` (rows, V), fp32 or fp64, into logits in place, and return it. Not differentiable."""
        if self.bias is not None:
            raw.add_(self.bias)
        if self.logit_softcap is not None:
            return raw.mul_(self.inner_factor).tanh_().mul_(self.outer_factor)
        return raw.mul_(self.inner_factor) if self.inner_factor != 1.0 else raw

    def slope_at(self, logits: Tensor) -> Tensor | float:
        """Return ∂logits/∂raw at ``logits`` (rows, V): a number, or (rows, V) with a softcap."""
        if self.logit_softcap is None:
            return self.slope
        tanh = logits * (self.temperature / self.logit_softcap)
        return tanh.square_().neg_().add_(1.0).mul_(self.slope)

    def check_constants(self) -> None:
        """Raise ValueError if a constant of the head is out of range."""
        cap, scale, temperature = self.logit_softcap, self.logit_scale, self.temperature
        require(cap is None or (math.isfinite(cap) and cap > 0), f"logit_softcap={cap}: must be positive, or None")
        require(math.isfinite(scale) and scale != 0, f"logit_scale={scale}: must be finite and not 0")
        require(math.isfinite(temperature) and temperature > 0, f"temperature={temperature}: must be positive")

    def check_lora(self, hidden: Tensor) -> None:
        """Raise ValueError unless LoRA's factors have the shapes of the weight and the dtype of ``hidden`` (..., D)."""
        if self.lora is None:
            return
        a, b, scale = self.lora
        vocab, width = self.weight.shape
        require(
            a.ndim == 2 and a.shape[1] == width,
            f"lora.A has shape {tuple(a.shape)}: must be (r, {width}), as lm_head_weight is {(vocab, width)}",
        )
        rank = a.shape[0]
        require(
            tuple(b.shape) == (vocab, rank),
            f"lora.B has shape {tuple(b.shape)}: must be ({vocab}, {rank}), as lora.A is {(rank, width)}",
        )
        require(math.isfinite(scale), f"lora.scale={scale}: must be finite")
        for matrix, label in ((a, "lora.A"), (b, "lora.B")):
            require(matrix.device == hidden.device, f"{label} is on {matrix.device} and hidden on {hidden.device}")
            require(
                matrix.dtype == hidden.dtype or torch.is_autocast_enabled(hidden.device.type),
                f"{label} is {matrix.dtype} and hidden {hidden.dtype}: convert one of them, or call under "
                f"torch.autocast({hidden.device.type!r}, dtype=...)",
            )


# The head's keyword arguments in the public functions, with their defaults.
DEFAULTS: dict[str, Any] = {field.name: field.default for field in fields(LMHead) if field.name != "weight"}
