"""The row step in torch: raw logits of a chunk -> log-sum-exp, target log-prob, unit gradients.

The counterpart of ``rows_triton.py``, with the same two functions. Rows are taken a few at a time, so
that a block stays in a CPU's cache and its temporaries stay within ``SCRATCH_BYTES``.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from hypo_kernels.head import LMHead

GRADIENTS_IN_PLACE = False  # a conversion to the GEMM's dtype is a copy of the chunk
BLOCK_BYTES = 2**21  # of raw logits
COPIES_PER_BLOCK = 4  # exponentials, softcap's tanh and the products between them


def scratch_bytes(num_rows: int, row_bytes: int) -> int:
    """The most that a call allocates beside a chunk of ``num_rows`` rows."""
    return COPIES_PER_BLOCK * min(num_rows * row_bytes, max(BLOCK_BYTES, row_bytes))


def statistics(raw: Tensor, targets: Tensor, head: LMHead) -> tuple[Tensor, Tensor]:
    """Log-sum-exp and target log-prob, each (C,), of raw logits (C, V); ``raw`` is spent."""
    lse, logps = raw.new_empty(len(raw)), raw.new_empty(len(raw))
    for rows in _blocks(raw):
        z = _logits_(raw[rows], head)
        target = z.gather(1, targets[rows, None]).squeeze(1)
        top = z.amax(dim=1)
        z.sub_(top[:, None]).exp_()
        lse[rows] = top + z.sum(dim=1).log()
        logps[rows] = target - lse[rows]
    return lse, logps


def unit_gradients(
    raw: Tensor, targets: Tensor, head: LMHead, *, lse: Tensor | None, out_dtype: torch.dtype, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """``scale · ∂(−log p(target))/∂raw`` (C, V) in ``out_dtype``, log-sum-exp and target log-prob, each (C,).

    ``raw`` is spent. ``lse`` skips the statistics when an earlier pass has them.
    """
    known, lse, logps = lse, raw.new_empty(len(raw)), raw.new_empty(len(raw))
    for rows in _blocks(raw):
        slope = _slope(raw[rows], head)
        z = _logits_(raw[rows], head)
        chosen = targets[rows, None]
        target = z.gather(1, chosen)
        if known is None:
            top = z.amax(dim=1, keepdim=True)
            z.sub_(top).exp_()
            total = z.sum(dim=1, keepdim=True)
            z.div_(total)
            block_lse = top + total.log()
        else:
            block_lse = known[rows, None]
            z.sub_(block_lse).exp_()
        lse[rows] = block_lse.squeeze(1)
        logps[rows] = (target - block_lse).squeeze(1)
        z.scatter_add_(1, chosen, torch.full_like(target, -1.0))
        if scale != 1.0 or head.slope_is_needed:
            z.mul_(slope * scale)
    return raw.to(out_dtype), lse, logps


def _blocks(raw: Tensor) -> Iterator[slice]:
    step = max(1, BLOCK_BYTES // (raw.shape[1] * raw.element_size()))
    for start in range(0, len(raw), step):
        yield slice(start, start + step)


def _logits_(raw: Tensor, head: LMHead) -> Tensor:
    """``head.logits`` in place."""
    if head.bias is not None:
        raw.add_(head.bias)
    if head.logit_softcap is not None:
        return raw.mul_(head.logit_scale / head.logit_softcap).tanh_().mul_(head.logit_softcap / head.temperature)
    factor = head.logit_scale / head.temperature
    return raw.mul_(factor) if factor != 1.0 else raw


def _slope(raw: Tensor, head: LMHead) -> Tensor | float:
    """∂logits/∂raw: a number, or (rows, V) under a softcap."""
    factor = head.logit_scale / head.temperature
    if head.logit_softcap is None:
        return factor
    capped = raw + head.bias.to(raw.dtype) if head.bias is not None else raw.clone()
    capped.mul_(head.logit_scale / head.logit_softcap).tanh_()
    return capped.square_().neg_().add_(1.0).mul_(factor)
