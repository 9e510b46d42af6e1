"""Compare a sampler's logits of a few tokens with those of the model's own forward pass on plain rows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from hypo_train.sampling.protocol import base_model

SHORT_WINDOW = 3  # tokens: sliding windows for a comparison, shorter than a prompt
_PROMPTS = ([3, 1, 4, 1, 5], [2, 7])  # of different lengths, so that the shorter one is padded


def compute_dtype(model: Any) -> torch.dtype:
    """Return the dtype of attention: autocast's if it is on, else that of the hidden states."""
    weight = base_model(model).get_input_embeddings().weight
    kind = weight.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype


@contextmanager
def precision_of(model: Any) -> Iterator[None]:
    """Compute in fp32 if all weights are fp32 or packed in 4 bits, else under bfloat16 autocast."""
    all_fp32 = all(p.dtype == torch.float32 for p in model.parameters() if p.is_floating_point())
    with torch.autocast(next(model.parameters()).device.type, torch.bfloat16, enabled=not all_fp32):
        yield


def prompts_of(model: Any) -> list[list[int]]:
    """Return short prompts of token ids that the model has."""
    vocab_size = base_model(model).get_output_embeddings().weight.shape[0]
    return [[token % vocab_size for token in prompt] for prompt in _PROMPTS]


def difference(found: Tensor, expected: Tensor, dtype: torch.dtype) -> str | None:
    """Return how logits (tokens, V) differ by more than half the digits of ``dtype``; None if they do not."""
    spread = (expected - expected.mean(-1, keepdim=True)).square().mean().sqrt()
    error = (found - expected).square().mean().sqrt()
    if error <= torch.finfo(dtype).eps ** 0.5 * spread:
        return None
    return f"they differ by {error:.2g}, where logits spread by {spread:.2g}"
