"""The row step in torch: raw logits of a chunk -> softmax norms, target log-prob, unit gradients.

``kernels/rows.py`` has the same functions in Triton. Each loop processes a few rows at a time, so that a block stays in
the CPU's cache and its temporaries stay within ``scratch_bytes``.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from hypo_kernels.head import LMHead
from hypo_kernels.statistics import RowStatistics

GRADIENTS_IN_PLACE = False  # gradients in another dtype than the logits need a second chunk
BLOCK_BYTES = 2**21  # raw logits of one block
COPIES_PER_BLOCK = 2  # the logits and an intermediate product


def scratch_bytes(num_rows: int, row_bytes: int) -> int:
    """Return an upper bound on the bytes that a call allocates besides a chunk of ``num_rows`` rows."""
    return COPIES_PER_BLOCK * min(num_rows * row_bytes, max(BLOCK_BYTES, row_bytes))


def statistics(raw: Tensor, targets: Tensor, head: LMHead) -> RowStatistics:
    """Return softmax norms (C, 3) and target logit (C,) of raw logits (C, V), which stay unchanged."""
    norms, target = raw.new_empty(len(raw), 3), raw.new_empty(len(raw))
    for rows in blocks(raw):
        z = head.logits_(copy_of(raw[rows]))
        target[rows] = at_targets(z, targets[rows], head)
        norms[rows], _ = _softmax_(z, targets[rows], head)
    return RowStatistics(norms, target)


def unit_gradients(
    raw: Tensor, targets: Tensor, head: LMHead, *, norms: Tensor | None, out_dtype: torch.dtype, scale: float
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Return (U, row factor, target's log-prob): ``row factor ⊙ U = scale · ∂(−log p(target))/∂raw``.

    U is (C, V) in ``out_dtype``; ``raw`` is overwritten. Row factor and log-probs are (C,); a row factor of None is 1.
    With ``norms`` (C, 3) from an earlier pass, the statistics are not computed again. Under a vocabulary shard they
    are required, and the log-prob is valid only on the rank that holds the target.
    """
    logps, row_factor = raw.new_empty(len(raw)), None if norms is not None else raw.new_empty(len(raw))
    for rows in blocks(raw):
        z = head.logits_(raw[rows])
        slope = head.slope_at(z) * scale
        target = at_targets(z, targets[rows], head)
        if norms is None:
            row_norms, sum_of_p = _softmax_(z, targets[rows], head)
            assert row_factor is not None
            row_factor[rows] = sum_of_p.reciprocal()
            at_target = row_norms[:, 2] / row_norms[:, 1] * -sum_of_p  # p − 1
        else:
            row_norms = norms[rows]
            at_target = -row_norms[:, 2] / row_norms[:, 1]
            z.sub_(row_norms[:, :1]).exp_().div_(row_norms[:, 1:2])
        logps[rows] = RowStatistics(row_norms, target).logps()
        put_at_targets_(z, targets[rows], head, at_target)
        if isinstance(slope, Tensor) or slope != 1.0:
            z.mul_(slope)
    return raw.to(out_dtype), row_factor, logps


def _softmax_(z: Tensor, targets: Tensor, head: LMHead) -> tuple[Tensor, Tensor]:
    """Replace ``z`` by its softmax, with 0 at the targets; return norms (rows, 3), and the sum of the probabilities.

    torch's softmax sums the exponentials of a row in a few lanes, with an error of about 1e-6 at 10^5 entries. The
    pairwise sum (rows,) of the probabilities, with the targets', measures this error.
    """
    top = z.amax(dim=1)
    torch.softmax(z, dim=1, out=z)
    at_top = z.amax(dim=1)  # exp(0) / (torch's total)
    at_target = at_targets(z, targets, head)
    put_at_targets_(z, targets, head, torch.zeros_like(at_top))
    others = z.sum(dim=1)
    sum_of_p = others + at_target
    return torch.stack([top, sum_of_p / at_top, others / at_top], dim=1), sum_of_p


def scale_(x: Tensor, factor: Tensor) -> None:
    """Multiply ``x`` in place by ``factor`` (), on the device."""
    x.mul_(factor)


def blocks(raw: Tensor) -> Iterator[slice]:
    """Yield slices of a few rows of (C, V)."""
    step = max(1, BLOCK_BYTES // (raw.shape[1] * raw.element_size()))
    for start in range(0, len(raw), step):
        yield slice(start, start + step)


def copy_of(raw: Tensor) -> Tensor:
    """Return a contiguous copy."""
    return raw.clone(memory_format=torch.contiguous_format)


def at_targets(z: Tensor, targets: Tensor, head: LMHead) -> Tensor:
    """Return the targets' entries (rows,) of z (rows, V); 0 for targets of another rank."""
    if head.vocab_shard is None:
        return z.gather(1, targets[:, None]).squeeze(1)
    inside = (targets >= 0) & (targets < z.shape[1])
    return z.gather(1, torch.where(inside, targets, 0)[:, None]).squeeze(1) * inside


def put_at_targets_(z: Tensor, targets: Tensor, head: LMHead, values: Tensor) -> None:
    """Write ``values`` (rows,) to the targets' entries of z (rows, V); those of another rank's targets are dropped."""
    if head.vocab_shard is not None:
        inside = (targets >= 0) & (targets < z.shape[1])
        targets, values = torch.where(inside, targets, 0), torch.where(inside, values, z[:, 0])
    z.scatter_(1, targets[:, None], values[:, None])
