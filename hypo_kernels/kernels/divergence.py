"""The row step of a divergence in Triton: raw logits of policy and reference -> KL(p‖q) and its gradient.

    z = policy's logits, w = reference's (C, V); each with top and total as in ``kernels/rows.py``
    moment = Σ_v exp(z_v − top_z) · ((z_v − top_z) − (w_v − top_w))
    D = KL(p‖q) = moment / total_z − log total_z + log total_w
    G = scale · (score · (p − onehot_y) + weight · p ⊙ (log p − log q − D)) · ∂z/∂raw

As in ``kernels/rows.py``, p − onehot is −others / total at the target. Each row has one score and one weight. Without
reference logits, log q = 0 and D is minus the entropy. Each program processes one row; G overwrites the policy's row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hypo_kernels.head import LMHead
from hypo_kernels.kernels.head import block_logits, head_arguments, row_logits, store_block
from hypo_kernels.kernels.rows import packed, scratch_bytes, tile_of
from hypo_kernels.statistics import RowStatistics

__all__ = ["gradients", "scratch_bytes", "statistics"]

# Lower bound of (logit − top): an entry of probability 0 then adds 0 · finite = 0, where 0 · inf would be NaN.
LEAST = tl.constexpr(-1.0e30)
# Read or written once a row. Their alignment changes with the chunk's first row, and would compile a kernel again.
PER_ROW = [
    "target_ptr",
    "norms_ptr",
    "target_logit_ptr",
    "moment_ptr",
    "ref_norms_ptr",
    "ref_target_logit_ptr",
    "divergence_ptr",
    "score_ptr",
    "weight_ptr",
]


@triton.jit
def _add_block(
    raw_ptr,  # start of the row
    ref_raw_ptr,
    bias_ptr,
    ref_bias_ptr,
    start,
    target,
    top,  # (BLOCK_V,) fp32, each lane's
    total,
    moment,
    ref_top,
    ref_total,
    V,
    factor,
    softcap,
    ref_factor,
    ref_softcap,
    HAS_REF: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    REF_HAS_BIAS: tl.constexpr,
    REF_HAS_SOFTCAP: tl.constexpr,
    BLOCK_V: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Return (top, total, moment, ref_top, ref_total) with the entries from ``start`` on, but the target."""
    cols = start + tl.arange(0, BLOCK_V)
    z, _ = block_logits(raw_ptr, bias_ptr, cols, V, factor, softcap, HAS_BIAS, HAS_SOFTCAP, MASKED)
    counted = cols != target
    if MASKED:
        counted = counted & (cols < V)
    z = tl.where(counted, z, float("-inf"))
    new_top = tl.maximum(top, z)
    shift = tl.maximum(top - new_top, LEAST)
    difference = tl.maximum(z - new_top, LEAST)
    decay = tl.exp(shift)
    exp = tl.exp(difference)
    if HAS_REF:
        w, _ = block_logits(
            ref_raw_ptr, ref_bias_ptr, cols, V, ref_factor, ref_softcap, REF_HAS_BIAS, REF_HAS_SOFTCAP, MASKED
        )
        w = tl.where(counted, w, float("-inf"))
        new_ref_top = tl.maximum(ref_top, w)
        ref_shift = tl.maximum(ref_top - new_ref_top, LEAST)
        ref_difference = tl.maximum(w - new_ref_top, LEAST)
        ref_total = ref_total * tl.exp(ref_shift) + tl.exp(ref_difference)
        ref_top = new_ref_top
        shift -= ref_shift
        difference -= ref_difference
    moment = decay * (moment + total * shift) + exp * difference
    return new_top, total * decay + exp, moment, ref_top, ref_total


@triton.jit
def _write_block(
    raw_ptr,  # start of the row
    ref_raw_ptr,
    bias_ptr,
    ref_bias_ptr,
    grad_ptr,
    start,
    target,
    row_top,
    row_total,
    others,
    ref_top,
    score,
    weight,
    level,
    V,
    factor,
    softcap,
    ref_factor,
    ref_softcap,
    HAS_REF: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    REF_HAS_BIAS: tl.constexpr,
    REF_HAS_SOFTCAP: tl.constexpr,
    BLOCK_V: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Replace the policy's logits from ``start`` on by their gradients."""
    cols = start + tl.arange(0, BLOCK_V)
    z, capped = block_logits(raw_ptr, bias_ptr, cols, V, factor, softcap, HAS_BIAS, HAS_SOFTCAP, MASKED)
    difference = tl.maximum(z - row_top, LEAST)
    exp = tl.exp(difference)
    if HAS_REF:
        w, _ = block_logits(
            ref_raw_ptr, ref_bias_ptr, cols, V, ref_factor, ref_softcap, REF_HAS_BIAS, REF_HAS_SOFTCAP, MASKED
        )
        difference -= tl.maximum(w - ref_top, LEAST)
    by_logp = score * tl.where(cols == target, -others, exp)
    grad = (by_logp + weight * exp * (difference - level)) / row_total
    if HAS_SOFTCAP:
        grad *= 1.0 - capped * capped
    # A narrower gradient is packed into the front of its row, over columns that every thread of the program must have
    # read before.
    tl.debug_barrier()
    store_block(grad_ptr, cols, grad, V, MASKED)


@triton.jit(do_not_specialize_on_alignment=PER_ROW)
def _statistics_kernel(
    raw_ptr,  # (C, V) fp32, row pitch `raw_pitch`
    ref_raw_ptr,  # (C, V) fp32, row pitch `ref_pitch`, or unused
    target_ptr,  # (C,) int64; outside [0, V) if another rank holds the target
    bias_ptr,  # (V,) or unused
    ref_bias_ptr,  # (V,) or unused
    norms_ptr,  # (C, 3) fp32
    target_logit_ptr,  # (C,) fp32
    moment_ptr,  # (C,) fp32
    ref_norms_ptr,  # (C, 3) fp32, or unused
    ref_target_logit_ptr,  # (C,) fp32, or unused
    V,
    raw_pitch,
    ref_pitch,
    factor,
    softcap,
    ref_factor,
    ref_softcap,
    HAS_REF: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    REF_HAS_BIAS: tl.constexpr,
    REF_HAS_SOFTCAP: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    raw_ptr += row * raw_pitch
    target = tl.load(target_ptr + row)
    inside = (target >= 0) & (target < V)
    at_target = tl.load(raw_ptr + target, mask=inside, other=0.0)
    z_target, _tanh = row_logits(at_target, bias_ptr, target, inside, factor, softcap, HAS_BIAS, HAS_SOFTCAP)
    tl.store(target_logit_ptr + row, tl.where(inside, z_target, 0.0))
    z_target = tl.where(inside, z_target, float("-inf"))
    w_target = z_target
    if HAS_REF:
        ref_raw_ptr += row * ref_pitch
        at_target = tl.load(ref_raw_ptr + target, mask=inside, other=0.0)
        w_target, _tanh = row_logits(
            at_target, ref_bias_ptr, target, inside, ref_factor, ref_softcap, REF_HAS_BIAS, REF_HAS_SOFTCAP
        )
        tl.store(ref_target_logit_ptr + row, tl.where(inside, w_target, 0.0))
        w_target = tl.where(inside, w_target, float("-inf"))

    # Each lane has a maximum, sum and moment, all without the target. Finite initial maxima: a lane of masked columns
    # would compute inf − inf.
    top = tl.full([BLOCK_V], -1.0e38, tl.float32)
    total = tl.zeros([BLOCK_V], tl.float32)
    moment = tl.zeros([BLOCK_V], tl.float32)
    ref_top = tl.full([BLOCK_V], -1.0e38, tl.float32)
    ref_total = tl.zeros([BLOCK_V], tl.float32)
    complete = V // BLOCK_V * BLOCK_V  # entries in blocks that need no mask
    for start in range(0, complete, BLOCK_V):
        top, total, moment, ref_top, ref_total = _add_block(
            raw_ptr,
            ref_raw_ptr,
            bias_ptr,
            ref_bias_ptr,
            start,
            target,
            top,
            total,
            moment,
            ref_top,
            ref_total,
            V,
            factor,
            softcap,
            ref_factor,
            ref_softcap,
            HAS_REF,
            HAS_BIAS,
            HAS_SOFTCAP,
            REF_HAS_BIAS,
            REF_HAS_SOFTCAP,
            BLOCK_V,
            False,
        )
    if complete < V:
        top, total, moment, ref_top, ref_total = _add_block(
            raw_ptr,
            ref_raw_ptr,
            bias_ptr,
            ref_bias_ptr,
            complete,
            target,
            top,
            total,
            moment,
            ref_top,
            ref_total,
            V,
            factor,
            softcap,
            ref_factor,
            ref_softcap,
            HAS_REF,
            HAS_BIAS,
            HAS_SOFTCAP,
            REF_HAS_BIAS,
            REF_HAS_SOFTCAP,
            BLOCK_V,
            True,
        )
    row_top = tl.maximum(tl.max(top, axis=0), z_target)
    shift = tl.maximum(top - row_top, LEAST)
    decay = tl.exp(shift)
    difference_of_target = tl.maximum(z_target - row_top, LEAST)
    at_target = tl.exp(difference_of_target)
    if HAS_REF:
        row_ref_top = tl.maximum(tl.max(ref_top, axis=0), w_target)
        ref_shift = tl.maximum(ref_top - row_ref_top, LEAST)
        shift -= ref_shift
        ref_difference_of_target = tl.maximum(w_target - row_ref_top, LEAST)
        difference_of_target -= ref_difference_of_target
        ref_others = tl.sum(ref_total * tl.exp(ref_shift), axis=0)
        tl.store(ref_norms_ptr + 3 * row, row_ref_top)
        tl.store(ref_norms_ptr + 3 * row + 1, ref_others + tl.exp(ref_difference_of_target))
        tl.store(ref_norms_ptr + 3 * row + 2, ref_others)
    others = tl.sum(total * decay, axis=0)
    tl.store(norms_ptr + 3 * row, row_top)
    tl.store(norms_ptr + 3 * row + 1, others + at_target)
    tl.store(norms_ptr + 3 * row + 2, others)
    row_moment = tl.sum(decay * (moment + total * shift), axis=0)
    tl.store(moment_ptr + row, row_moment + at_target * difference_of_target)


@triton.jit(do_not_specialize_on_alignment=PER_ROW)
def _gradient_kernel(
    raw_ptr,  # (C, V) fp32, row pitch `raw_pitch`
    ref_raw_ptr,  # (C, V) fp32, row pitch `ref_pitch`, or unused
    target_ptr,  # (C,) int64
    bias_ptr,
    ref_bias_ptr,
    norms_ptr,  # (C, 3) fp32
    ref_norms_ptr,  # (C, 3) fp32, or unused
    divergence_ptr,  # (C,) fp32
    score_ptr,  # (C,) fp32
    weight_ptr,  # (C,) fp32
    grad_ptr,  # (C, V) in the GEMM's dtype, row pitch `grad_pitch`, in the memory of raw_ptr
    V,
    raw_pitch,
    ref_pitch,
    grad_pitch,
    factor,
    softcap,
    ref_factor,
    ref_softcap,
    slope,  # scale · logit_scale / temperature
    HAS_REF: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    REF_HAS_BIAS: tl.constexpr,
    REF_HAS_SOFTCAP: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    raw_ptr += row * raw_pitch
    grad_ptr += row * grad_pitch
    target = tl.load(target_ptr + row)
    row_top = tl.load(norms_ptr + 3 * row)
    row_total = tl.load(norms_ptr + 3 * row + 1)
    others = tl.load(norms_ptr + 3 * row + 2)
    score = tl.load(score_ptr + row) * slope
    weight = tl.load(weight_ptr + row) * slope
    # log p − log q − D = (z − top_z) − (w − top_w) − level
    level = tl.log(row_total) + tl.load(divergence_ptr + row)
    ref_top = 0.0
    if HAS_REF:
        ref_raw_ptr += row * ref_pitch
        ref_top = tl.load(ref_norms_ptr + 3 * row)
        level -= tl.log(tl.load(ref_norms_ptr + 3 * row + 1))
    complete = V // BLOCK_V * BLOCK_V
    for start in range(0, complete, BLOCK_V):
        _write_block(
            raw_ptr,
            ref_raw_ptr,
            bias_ptr,
            ref_bias_ptr,
            grad_ptr,
            start,
            target,
            row_top,
            row_total,
            others,
            ref_top,
            score,
            weight,
            level,
            V,
            factor,
            softcap,
            ref_factor,
            ref_softcap,
            HAS_REF,
            HAS_BIAS,
            HAS_SOFTCAP,
            REF_HAS_BIAS,
            REF_HAS_SOFTCAP,
            BLOCK_V,
            False,
        )
    if complete < V:
        _write_block(
            raw_ptr,
            ref_raw_ptr,
            bias_ptr,
            ref_bias_ptr,
            grad_ptr,
            complete,
            target,
            row_top,
            row_total,
            others,
            ref_top,
            score,
            weight,
            level,
            V,
            factor,
            softcap,
            ref_factor,
            ref_softcap,
            HAS_REF,
            HAS_BIAS,
            HAS_SOFTCAP,
            REF_HAS_BIAS,
            REF_HAS_SOFTCAP,
            BLOCK_V,
            True,
        )


def statistics(
    raw: Tensor, ref_raw: Tensor | None, targets: Tensor, head: LMHead, ref_head: LMHead | None
) -> tuple[RowStatistics, RowStatistics | None]:
    """Return norms (C, 3), target logit (C,) and moment (C,) of raw logits (C, V), and the reference's statistics.

    The reference's statistics have no moment. Neither tensor of logits is modified.
    """
    rows = len(raw)
    out = RowStatistics(raw.new_empty(rows, 3), raw.new_empty(rows), raw.new_empty(rows))
    ref = None if ref_raw is None else RowStatistics(raw.new_empty(rows, 3), raw.new_empty(rows))
    tile = tile_of(raw)
    _statistics_kernel[(rows,)](
        raw_ptr=raw,
        target_ptr=targets,
        norms_ptr=out.norms,
        target_logit_ptr=out.target,
        moment_ptr=out.moment,
        ref_norms_ptr=None if ref is None else ref.norms,
        ref_target_logit_ptr=None if ref is None else ref.target,
        V=raw.shape[1],
        raw_pitch=raw.stride(0),
        **_heads(head, ref_raw, ref_head),
        BLOCK_V=tile.BLOCK_V // 2,  # twice the live vectors of the row kernel
        num_warps=tile.num_warps,
    )
    return out, ref


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
    """Return ``scale · (score · ∂(−log p(target)) + weight · ∂D)/∂raw`` (C, V) in ``out_dtype``; overwrite ``raw``."""
    grad = packed(raw, out_dtype)
    tile = tile_of(raw)
    _gradient_kernel[(len(raw),)](
        raw_ptr=raw,
        target_ptr=targets,
        norms_ptr=norms,
        ref_norms_ptr=ref_norms,
        divergence_ptr=divergence,
        score_ptr=score,
        weight_ptr=weight,
        grad_ptr=grad,
        V=raw.shape[1],
        raw_pitch=raw.stride(0),
        grad_pitch=grad.stride(0),
        slope=scale * head.slope,
        **_heads(head, ref_raw, ref_head),
        BLOCK_V=tile.BLOCK_V // 2,
        num_warps=tile.num_warps,
    )
    return grad


def _heads(head: LMHead, ref_raw: Tensor | None, ref_head: LMHead | None) -> dict[str, object]:
    """Return the kernels' arguments for the heads of policy and reference."""
    ref = head_arguments(ref_head if ref_head is not None else LMHead(head.weight))
    return {
        **head_arguments(head),
        "ref_raw_ptr": ref_raw,
        "ref_bias_ptr": ref["bias_ptr"],
        "ref_pitch": 0 if ref_raw is None else ref_raw.stride(0),
        "ref_factor": ref["factor"],
        "ref_softcap": ref["softcap"],
        "HAS_REF": ref_raw is not None,
        "REF_HAS_BIAS": ref["HAS_BIAS"],
        "REF_HAS_SOFTCAP": ref["HAS_SOFTCAP"],
    }
