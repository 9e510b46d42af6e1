"""Compute log-probs and gradients of a batch in float64, a few rows at a time.

Memory does not grow with the number of rows: beside the gradients asked for, one float64 copy of the
weight and ``CHUNKS_ALIVE`` chunks of logits (``bound`` says how much, and the caller checks it).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

CHUNK_BYTES = 2**28  # of float64 logits
CHUNKS_ALIVE = 3  # logits, their exponentials, and temporaries of the library


def bound(rows: int, vocab: int, width: int, *, gradients: int) -> int:
    """Return the most bytes that may be allocated while ``gradients`` sets of gradients are held."""
    logits = CHUNKS_ALIVE * max(CHUNK_BYTES, 8 * vocab)
    inputs = 8 * width * (vocab + 2 * rows)
    return logits + inputs + gradients * 8 * width * (vocab + rows) + 2**24


def row_logprobs(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Return log p(target) of each row, (N,) float64, for ``hidden`` (N, D), ``weight`` (V, D), ``targets`` (N,)."""
    wide = weight.detach().double()
    out = [
        torch.log_softmax(hidden[rows].detach().double() @ wide.t(), dim=-1).gather(1, targets[rows, None])
        for rows in _chunks(len(hidden), len(weight))
    ]
    return torch.cat(out).squeeze(1)


def gradients(
    hidden: Tensor, weight: Tensor, targets: Tensor, coefficients: Tensor, *, rounded: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    """Return the gradients of ``Σ coefficients · log p(target)`` for hidden (N, D) and weight (V, D), in float64.

    The gradients of the logits are rounded once to the dtype ``rounded``, as an otherwise exact scheme with 16-bit
    GEMM operands must do.
    """
    wide = weight.detach().double()
    grad_hidden = torch.empty(hidden.shape, dtype=torch.float64, device=hidden.device)
    grad_weight = torch.zeros_like(wide)
    for rows in _chunks(len(hidden), len(weight)):
        x, y, c = hidden[rows].detach().double(), targets[rows, None], coefficients[rows, None].double()
        grad_logits = (x @ wide.t()).softmax(dim=-1).neg_()
        grad_logits.scatter_add_(1, y, torch.ones_like(y, dtype=torch.float64)).mul_(c)
        if rounded != torch.float64:
            grad_logits = grad_logits.to(rounded).double()
        grad_hidden[rows] = grad_logits @ wide
        grad_weight.addmm_(grad_logits.t(), x)
    return grad_hidden, grad_weight


def _chunks(num_rows: int, vocab: int) -> Iterator[slice]:
    step = max(1, CHUNK_BYTES // (8 * vocab))
    for start in range(0, num_rows, step):
        yield slice(start, min(start + step, num_rows))
