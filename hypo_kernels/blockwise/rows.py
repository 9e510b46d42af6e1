"""The row step in torch: raw logits of a chunk -> softmax norms, target log-prob, unit gradients.

The counterpart of ``kernels/rows.py``, with the same functions. Rows are taken a few at a time, so that a
block stays in a CPU's cache and its temporaries stay within ``scratch_bytes``.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from hypo_kernels.head import LMHead
from hypo_kernels.statistics import RowStatistics

GRADIENTS_IN_PLACE = False  # a conversion to the GEMM's dtype is a copy of the chunk
BLOCK_BYTES = 2**21  # of raw logits
COPIES_PER_BLOCK = 2  # the logits, and a product in between


def scratch_bytes(num_rows: int, row_bytes: int) -> int:
    """The most that a call allocates beside a chunk of ``num_rows`` rows."""
    return COPIES_PER_BLOCK * min(num_rows * row_bytes, max(BLOCK_BYTES, row_bytes))


def statistics(raw: Tensor, targets: Tensor, head: LMHead) -> RowStatistics:
    """Softmax norms (C, 2) and target logit (C,) of raw logits (C, V), which stay as they are."""
    norms, target = raw.new_empty(len(raw), 2), raw.new_empty(len(raw))
    for rows in blocks(raw):
        z = logits(raw[rows], head)
        target[rows] = at_targets(z, targets[rows], head)
        norms[rows, 0], norms[rows, 1], _ = _softmax_(z)
    return RowStatistics(norms, target)


def unit_gradients(
    raw: Tensor, targets: Tensor, head: LMHead, *, norms: Tensor | None, out_dtype: torch.dtype, scale: float
) -> tuple[Tensor, Tensor | None, Tensor]:
    """(U, factor, target's log-prob): ``factor ⊙ U = scale · ∂(−log p(target))/∂raw``.

    U is (C, V) in ``out_dtype``, and ``raw`` is spent; factor and log-probs are (C,), and a factor of None is 1.
    ``norms`` (C, 2) skip the statistics when an earlier pass has them; under a vocabulary shard they have to be
    given, and the log-prob is then that of the rank with the target.
    """
    logps, factor = raw.new_empty(len(raw)), None if norms is not None else raw.new_empty(len(raw))
    for rows in blocks(raw):
        z = logits_(raw[rows], head)
        slope = slope_of(z, head) * scale
        target = at_targets(z, targets[rows], head)
        one: Tensor | float = 1.0
        if norms is None:
            top, total, one = _softmax_(z)
            assert factor is not None
            factor[rows] = one.reciprocal()
        else:
            top, total = norms[rows].unbind(1)
            z.sub_(top[:, None]).exp_().div_(total[:, None])
        logps[rows] = target - top - total.log()
        subtract_at_targets_(z, targets[rows], head, one)
        if isinstance(slope, Tensor) or slope != 1.0:
            z.mul_(slope)
    return raw.to(out_dtype), factor, logps


def _softmax_(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Softmax in place, one pass over memory: top, total and what the softmax adds up to, (rows,) each.

    torch's softmax adds up a row's exponentials a few lanes wide, which at 10^5 entries is off by some 1e-6.
    The sum of what it makes, taken pairwise, says by how much.
    """
    top = z.amax(dim=1)
    torch.softmax(z, dim=1, out=z)
    one = z.sum(dim=1)
    return top, one / z.amax(dim=1), one  # the largest entry is exp(0) over the softmax's own total


def scale_(x: Tensor, factor: Tensor) -> None:
    """``x *= factor``, a number on the device."""
    x.mul_(factor)


def blocks(raw: Tensor) -> Iterator[slice]:
    """A few rows of (C, V) at a time."""
    step = max(1, BLOCK_BYTES // (raw.shape[1] * raw.element_size()))
    for start in range(0, len(raw), step):
        yield slice(start, start + step)


def logits(raw: Tensor, head: LMHead) -> Tensor:
    """``head.logits`` in new memory."""
    return logits_(raw.clone(memory_format=torch.contiguous_format), head)


def logits_(raw: Tensor, head: LMHead) -> Tensor:
    """``head.logits`` in place."""
    if head.bias is not None:
        raw.add_(head.bias)
    if head.logit_softcap is not None:
        return raw.mul_(head.logit_scale / head.logit_softcap).tanh_().mul_(head.logit_softcap / head.temperature)
    factor = head.logit_scale / head.temperature
    return raw.mul_(factor) if factor != 1.0 else raw


def slope_of(z: Tensor, head: LMHead) -> Tensor | float:
    """∂logits/∂raw at logits z: a number, or (rows, V) under a softcap."""
    factor = head.logit_scale / head.temperature
    if head.logit_softcap is None:
        return factor
    tanh = z * (head.temperature / head.logit_softcap)
    return tanh.square_().neg_().add_(1.0).mul_(factor)


def at_targets(z: Tensor, targets: Tensor, head: LMHead) -> Tensor:
    """The targets' entries of z (rows, V), (rows,); 0 for targets beyond this rank's vocabulary."""
    if head.shard is None:
        return z.gather(1, targets[:, None]).squeeze(1)
    here = (targets >= 0) & (targets < z.shape[1])
    return z.gather(1, torch.where(here, targets, 0)[:, None]).squeeze(1) * here


def subtract_at_targets_(z: Tensor, targets: Tensor, head: LMHead, amount: Tensor | float) -> None:
    """Take ``amount``, a number or (rows,), from the targets' entries."""
    if head.shard is not None:
        here = (targets >= 0) & (targets < z.shape[1])
        amount, targets = amount * here, torch.where(here, targets, 0)
    less = z.new_empty(len(z)).copy_(torch.as_tensor(amount, dtype=z.dtype)).neg_()
    z.scatter_add_(1, targets[:, None], less[:, None])
