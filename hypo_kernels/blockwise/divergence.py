"""The row step of a divergence in torch: raw logits of policy and reference -> KL(p‖q) and its gradient.

    D = Σ_v p_v (log p_v − log q_v)        ∂D/∂z_v = p_v (log p_v − log q_v − D)

``kernels/divergence.py`` has the same functions in Triton. Without reference logits, log q = 0 and D is minus the
entropy.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hypo_kernels.blockwise.rows import at_targets, blocks, copy_of, put_at_targets_
from hypo_kernels.blockwise.rows import scratch_bytes as row_scratch_bytes
from hypo_kernels.head import LMHead
from hypo_kernels.statistics import RowStatistics

# Lower bound of (logit − top): an entry of probability 0 then adds 0 · finite = 0, where 0 · inf would be NaN.
LEAST = -1.0e30


def scratch_bytes(num_rows: int, row_bytes: int) -> int:
    """Return an upper bound on the bytes that a call allocates besides the chunks' logits."""
    return 2 * row_scratch_bytes(num_rows, row_bytes)


def statistics(
    raw: Tensor, ref_raw: Tensor | None, targets: Tensor, head: LMHead, ref_head: LMHead | None
) -> tuple[RowStatistics, RowStatistics | None]:
    """Return norms (C, 3), target logit (C,) and moment (C,) of raw logits (C, V), and the reference's statistics.

    The reference's statistics have no moment. Neither tensor of logits is modified.
    """
    out = RowStatistics(raw.new_empty(len(raw), 3), raw.new_empty(len(raw)), raw.new_empty(len(raw)))
    ref = None if ref_raw is None else RowStatistics(raw.new_empty(len(raw), 3), raw.new_empty(len(raw)))
    assert out.moment is not None
    for rows in blocks(raw):
        z = _shifted(raw[rows], targets[rows], head, out, rows)
        exp = z.exp()
        _sum_up(exp, targets[rows], head, out, rows)
        if ref is not None and ref_raw is not None and ref_head is not None:
            w = _shifted(ref_raw[rows], targets[rows], ref_head, ref, rows)
            z.sub_(w)
            _sum_up(w.exp_(), targets[rows], ref_head, ref, rows)
        out.moment[rows] = exp.mul_(z).sum(dim=1)
    return out, ref


def _shifted(raw: Tensor, targets: Tensor, head: LMHead, out: RowStatistics, rows: slice) -> Tensor:
    """Return logits minus their maximum, (rows, V); write the maximum and the target's logit to ``out``."""
    z = head.logits_(copy_of(raw))
    out.target[rows] = at_targets(z, targets, head)
    top = z.amax(dim=1, keepdim=True)
    out.norms[rows, :1] = top
    return z.sub_(top).clamp_min_(LEAST)


def _sum_up(exp: Tensor, targets: Tensor, head: LMHead, out: RowStatistics, rows: slice) -> None:
    """Write the sums of the exponentials (rows, V), with and without the targets', to ``out``."""
    at_target = at_targets(exp, targets, head)
    put_at_targets_(exp, targets, head, torch.zeros_like(at_target))
    others = exp.sum(dim=1)
    out.norms[rows, 1], out.norms[rows, 2] = others + at_target, others
    put_at_targets_(exp, targets, head, at_target)


def gradients(
    raw: Tensor,
    ref_raw: Tensor | None,
    targets: Tensor,
    head: LMHead,
    ref_head: LMHead | None,
    *,
    norms: Tensor,  # (C, 3)
    ref_norms: Tensor | None,  # (C, 3)
    divergence: Tensor,  # (C,)
    score: Tensor,  # (C,)
    weight: Tensor,  # (C,)
    out_dtype: torch.dtype,
    scale: float,
) -> Tensor:
    """Return ``scale · (score · ∂(−log p(target)) + weight · ∂D)/∂raw`` (C, V); overwrite ``raw``."""
    for rows in blocks(raw):
        z = head.logits_(raw[rows])
        slope = head.slope_at(z) * scale
        z.sub_(norms[rows, :1]).clamp_min_(LEAST)
        p = z.exp().div_(norms[rows, 1:2])
        z.sub_((norms[rows, 1].log() + divergence[rows])[:, None])
        if ref_raw is not None and ref_norms is not None and ref_head is not None:
            w = ref_head.logits_(copy_of(ref_raw[rows])).sub_(ref_norms[rows, :1]).clamp_min_(LEAST)
            z.sub_(w.sub_(ref_norms[rows, 1:2].log()))
        z.mul_(weight[rows, None])
        at_target = at_targets(z, targets[rows], head) * at_targets(p, targets[rows], head)
        z.add_(score[rows, None]).mul_(p)
        p_minus_1 = -norms[rows, 2] / norms[rows, 1]
        put_at_targets_(z, targets[rows], head, torch.addcmul(at_target, score[rows], p_minus_1))
        if isinstance(slope, Tensor) or slope != 1.0:
            z.mul_(slope)
    return raw.to(out_dtype)
