"""Attention scores beyond a scaled product, and attention that computes them step by step.

A softcap bends scores to ``softcap * tanh(score / softcap)`` (Gemma 2). A sink is a learned score of each head that
takes part in the softmax and belongs to no token (``s_aux``, GPT-OSS). SDPA serves neither.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Scores(NamedTuple):
    """The settings of a layer's attention scores."""

    scale: float | None = None  # None: 1 / sqrt(D)
    softcap: float | None = None
    sink: Tensor | None = None  # (H,), or (H, N) for each query

    @property
    def is_plain(self) -> bool:
        """Return whether SDPA computes them."""
        return self.softcap is None and self.sink is None


PLAIN = Scores()


def stepwise_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scores: Scores) -> Tensor:
    """Return attention under a bool or additive mask, step by step.

    Without a mask it is causal, and the last query sees all keys.

    It stores all scores (H, N, M).
    """
    repeats = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)
    logits = query @ key.mT * (query.shape[-1] ** -0.5 if scores.scale is None else scores.scale)
    if scores.softcap is not None:
        logits = scores.softcap * (logits / scores.softcap).tanh()
    if mask is None:
        every_key = logits.new_ones(logits.shape[-2:], dtype=torch.bool)
        mask = every_key.tril_(key.shape[2] - query.shape[2])
    # Not minus infinity: a padding token sees no key, and its NaN would reach every row that shares a product with it.
    lowest = torch.finfo(logits.dtype).min
    logits = logits.masked_fill(~mask, lowest) if mask.dtype == torch.bool else logits + mask
    if scores.sink is not None:
        sink = scores.sink.to(logits.dtype).view(1, logits.shape[1], -1, 1).expand(*logits.shape[:-1], 1)
        logits = torch.cat([logits, sink], dim=-1)
    weights = logits.softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))
    if scores.sink is not None:
        weights = weights[..., :-1]
    return weights.to(value.dtype) @ value
