"""The row step in torch: raw logits of a chunk -> softmax norms, target log-prob, unit gradients.

The counterpart of ``rows_triton.py``, with the same two functions. Rows are taken a few at a time, so
that a block stays in a CPU's cache and its temporaries stay within ``scratch_bytes``.
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
    """Softmax norms (C, 2) and target log-prob (C,) of raw logits (C, V); ``raw`` is spent.

    A row's norms are its largest logit and the sum of exponentials below it. Added up to a log-sum-exp,
    they would be rounded at the size of the logits, and every probability with them.
    """
    norms, logps = raw.new_empty(len(raw), 2), raw.new_empty(len(raw))
    for rows in _blocks(raw):
        z = _logits_(raw[rows], head)
        target = z.gather(1, targets[rows, None]).squeeze(1)
        top = z.amax(dim=1)
        total = z.sub_(top[:, None]).exp_().sum(dim=1)
        norms[rows] = torch.stack([top, total], dim=1)
        logps[rows] = target - top - total.log()
    return norms, logps


def unit_gradients(
    raw: Tensor, targets: Tensor, head: LMHead, *, norms: Tensor | None, out_dtype: torch.dtype, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """``scale · ∂(−log p(target))/∂raw`` (C, V) in ``out_dtype``, norms (C, 2) and target log-prob (C,).

    ``raw`` is spent. ``norms`` skip the statistics when an earlier pass has them.
    """
    known, logps = norms, raw.new_empty(len(raw))
    norms = raw.new_empty(len(raw), 2) if known is None else known
    for rows in _blocks(raw):
        slope = _slope(raw[rows], head)
        z = _logits_(raw[rows], head)
        chosen = targets[rows, None]
        target = z.gather(1, chosen)
        top = z.amax(dim=1, keepdim=True) if known is None else known[rows, :1]
        z.sub_(top).exp_()
        total = z.sum(dim=1, keepdim=True) if known is None else known[rows, 1:]
        z.div_(total)
        if known is None:
            norms[rows] = torch.cat([top, total], dim=1)
        logps[rows] = (target - top - total.log()).squeeze(1)
        z.scatter_add_(1, chosen, torch.full_like(target, -1.0))
        if scale != 1.0 or head.slope_is_needed:
            z.mul_(slope * scale)
    return raw.to(out_dtype), norms, logps


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
