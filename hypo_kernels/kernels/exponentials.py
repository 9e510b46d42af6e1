"""Exponentials in Triton: a GEMM on hidden states whose epilogue computes the numerators of the softmax.

    C rows, V vocabulary entries, D features; z (C, V) the model's logits, fp32 in registers (``kernels.product``)
    offset = z_y + 20                of each row, by a dot product before the GEMM
    E = exp(z − offset) · slope      (C, V), rounded to bf16, the only part that reaches memory
    others = Σ_{v≠y} exp(z_v − offset), total = others + exp(z_y − offset)  from fp32 exponentials, before rounding
    LSE = offset + log total         logp = −softplus(offset + log others − z_y), in fp32: logits are never rounded

slope is ∂z/∂raw divided by its constant factor: 1, or softcap's 1 − tanh². The gradient of −logp by raw needs one more
number and one corrected entry for each row (``fix_targets``). With r = exp(offset − LSE):

    E_y ← −others / total · slope_y / r     then     r · E = (softmax − onehot) · slope

so that dHidden = (c·r) ⊙ (E·W) and dWeight = Eᵀ·((c·r) ⊙ x) are plain GEMMs on the stored E. r includes the constant
factor of ∂z/∂raw. The target's entry, p_y − 1, is made from the sum of the others: that of a likely target does not
vanish.

**Precision.** bf16 has fp32's exponents, so an offset that is off by many nats costs no digits: E is a bf16 rounding of
every p, for any offset, as long as nothing leaves the range of normal numbers, 2^−126 to 2^127. A row's total decides
whether that holds. With 2^−40 ≤ total ≤ 2^40, no entry overflows, since none exceeds the total, and an entry that
underflows is a p of less than 2^−126 / 2^−40 = 2^−86: 2^18 such entries are 2^−68 of the softmax, where fp32 resolves
2^−24. With 2^−40 ≤ r ≤ 2^40, coefficients and the fp32 sums of E·W stay in range. Since exp(z_y − offset) = e^−20 is
part of the total, a row whose target is in the vocabulary always meets the lower bound. It meets the upper bound unless
the target is more than about 47 nats below the top.

**Rows that fail this** (a very unlikely target, no target on this rank, NaN) are repaired on the device. A kernel lists
them, the GEMM of ``kernels.statistics`` computes their statistics, and the GEMM in this file computes their
exponentials again with offset = top. Both GEMMs read the length of the list on the device: an empty list costs a few
empty launches, 1 to 128 rows cost one row of tiles of the GEMM, and the host never waits, so that a step can be
captured in a CUDA graph.

Supported dtypes are bf16 and fp32 (in full precision); the range of fp16 is too small.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from hypo_kernels.head import LMHead
from hypo_kernels.kernels import product as gemm_kernels
from hypo_kernels.kernels import statistics as statistics_kernels
from hypo_kernels.kernels.head import capability, head_arguments, tile_logits
from hypo_kernels.kernels.product import (
    load_targets,
    quarters,
    take_tile,
)
from hypo_kernels.kernels.tiles import EPILOGUE_PARTS, POINTER_TILE, GemmTile, gemm_tile

OPERAND_DTYPES = (torch.bfloat16, torch.float32)
OFFSET_ABOVE_TARGET = 20.0  # nats
LARGEST_TOTAL = 2.0**40  # the smallest is its reciprocal
# Minimum of r, which would underflow on a rank whose part of the vocabulary holds the target but almost none of the
# softmax.
SMALLEST_FACTOR = 2.0**-80
SUM_ROWS, SUM_PARTIALS = 16, 64
LIST_BLOCK = 1024
TARGET_BLOCK = 128


# As in ``statistics``: numbers of rows, and alignments that depend on them, must not compile kernels of their own.
@triton.jit(do_not_specialize=["C"], do_not_specialize_on_alignment=["target_ptr", "row_ptr"])
def _exponentials_kernel(
    x,  # (C, D), descriptor or pointer
    weight,  # (V, D), descriptor or pointer
    out,  # (C, V), descriptor or pointer
    target_ptr,  # (C,) int64
    bias_ptr,  # (V,) or unused
    norms_ptr,  # (C, 3) fp32: its offset
    partial_ptr,  # (tiles along V, C) fp32, sums of exponentials but the target's: unless LISTED
    row_ptr,  # (C,) int32, if LISTED: row indices, of which the first *count_ptr are valid
    count_ptr,  # (1,) int32
    C,
    V,
    D,
    x_row_stride,
    x_stride,
    weight_row_stride,
    weight_stride,
    out_row_stride,
    factor,
    softcap,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    LISTED: tl.constexpr,
    WIDEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    WARP_SPECIALIZE: tl.constexpr,
    FLATTEN: tl.constexpr,
):
    num_rows = C
    if LISTED:
        num_rows = tl.load(count_ptr)
    num_m, num_n = tl.cdiv(num_rows, BLOCK_M), tl.cdiv(V, BLOCK_N)
    for tile in tl.range(
        tl.program_id(0), num_m * num_n, tl.num_programs(0), flatten=FLATTEN, warp_specialize=WARP_SPECIALIZE
    ):
        m, n, places, counted, rows, raw = take_tile(
            tile,
            num_m,
            num_n,
            num_rows,
            row_ptr,
            x,
            weight,
            V,
            D,
            x_row_stride,
            x_stride,
            weight_row_stride,
            weight_stride,
            DESCRIPTORS,
            LISTED,
            WIDEN,
            BLOCK_M,
            BLOCK_N,
            BLOCK_K,
            GROUP,
        )
        offset = tl.load(norms_ptr + 3 * rows)
        target = load_targets(target_ptr, rows, V)
        total = tl.zeros([BLOCK_M], tl.float32)
        parts = quarters(raw)
        for i in tl.static_range(4):
            first = n * BLOCK_N + i * (BLOCK_N // 4)
            cols = first + tl.arange(0, BLOCK_N // 4)
            z = tile_logits(parts[i], bias_ptr, cols, V, factor, softcap, HAS_BIAS, HAS_SOFTCAP)
            # The entry of a target is written by fix_targets.
            z = tl.where(cols[None, :] == target[:, None], float("-inf"), z)
            e = tl.exp(z - offset[:, None])
            if not LISTED:
                total += tl.sum(e, axis=1)
            if HAS_SOFTCAP:
                t = z / softcap
                e -= e * t * t  # NaN at targets and, not stored, from V on
            if DESCRIPTORS:
                out.store([m * BLOCK_M, first], e.to(out.dtype))
            else:
                ptrs = out + rows.to(tl.int64)[:, None] * out_row_stride + cols[None, :]
                tl.store(ptrs, e.to(out.dtype.element_ty), mask=counted[:, None] & (cols < V)[None, :])
        if not LISTED:
            tl.store(partial_ptr + n.to(tl.int64) * C + places, total, mask=counted)


@triton.jit(do_not_specialize=["C", "num_partials"], do_not_specialize_on_alignment=["target_ptr"])
def _sum_kernel(
    partial_ptr,  # (num_partials, C) fp32
    target_ptr,  # (C,) int64
    target_logit_ptr,  # (C,) fp32
    norms_ptr,  # (C, 3) fp32: its total and others
    repair_ptr,  # (C,) int32, 1 where the total is out of range
    C,
    V,
    num_partials,
    largest,
    smallest,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    counted = rows < C
    total = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for start in range(0, num_partials, BLOCK_P):
        partials = start + tl.arange(0, BLOCK_P)
        mask = (partials < num_partials)[:, None] & counted[None, :]
        total += tl.load(partial_ptr + partials.to(tl.int64)[:, None] * C + rows[None, :], mask=mask, other=0.0)
    others = tl.sum(total, axis=0)
    target = tl.load(target_ptr + rows, mask=counted, other=-1)
    z = tl.load(target_logit_ptr + rows, mask=counted, other=0.0)
    offset = tl.load(norms_ptr + 3 * rows, mask=counted, other=0.0)
    row_total = others + tl.where((target >= 0) & (target < V), tl.exp(z - offset), 0.0)
    in_range = (row_total >= smallest) & (row_total <= largest)  # False for NaN
    tl.store(norms_ptr + 3 * rows + 1, row_total, mask=counted)
    tl.store(norms_ptr + 3 * rows + 2, others, mask=counted)
    tl.store(repair_ptr + rows, tl.where(in_range, 0, 1), mask=counted)


@triton.jit(do_not_specialize=["C"], do_not_specialize_on_alignment=["repair_ptr", "row_ptr"])
def _list_kernel(repair_ptr, row_ptr, count_ptr, C, BLOCK_C: tl.constexpr):
    """List the rows with a 1 in ``repair_ptr`` (C,), in order, and count them. One program."""
    count = 0
    for start in range(0, C, BLOCK_C):
        rows = start + tl.arange(0, BLOCK_C)
        repair = tl.load(repair_ptr + rows, mask=rows < C, other=0)
        tl.store(row_ptr + count + tl.cumsum(repair, axis=0) - 1, rows, mask=repair == 1)
        count += tl.sum(repair, axis=0)
    tl.store(count_ptr, count)


@triton.jit(do_not_specialize=["C"], do_not_specialize_on_alignment=["target_ptr"])
def _target_kernel(
    out_ptr,  # (C, V)
    target_ptr,  # (C,) int64
    target_logit_ptr,  # (C,) fp32
    norms_ptr,  # (C, 3) fp32
    offset_ptr,  # (C,) fp32
    row_factor_ptr,  # (C,) fp32
    C,
    V,
    out_row_stride,
    offset_stride,
    softcap,
    slope,
    smallest_factor,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    rows = (tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)).to(tl.int64)
    counted = rows < C
    target = tl.load(target_ptr + rows, mask=counted, other=-1)
    z = tl.load(target_logit_ptr + rows, mask=counted, other=0.0)
    top = tl.load(norms_ptr + 3 * rows, mask=counted, other=0.0)
    total = tl.load(norms_ptr + 3 * rows + 1, mask=counted, other=1.0)
    others = tl.load(norms_ptr + 3 * rows + 2, mask=counted, other=0.0)
    offset = tl.load(offset_ptr + rows * offset_stride, mask=counted, other=0.0)
    # exp(offset − LSE); without vocab_shard, top is the offset. NaN must stay NaN.
    row_factor = tl.exp(offset - top) / total
    row_factor = tl.where(row_factor < smallest_factor, smallest_factor, row_factor)
    entry = -others / total / row_factor
    if HAS_SOFTCAP:
        entry *= 1.0 - (z / softcap) * (z / softcap)
    inside = (target >= 0) & (target < V)
    tl.store(out_ptr + rows * out_row_stride + target, entry.to(out_ptr.dtype.element_ty), mask=counted & inside)
    tl.store(row_factor_ptr + rows, row_factor * slope, mask=counted)


def scratch_bytes(num_rows: int, vocab_size: int, tile: GemmTile) -> int:
    """Return the bytes that a call of ``exponentials`` allocates besides its results."""
    return 4 * (max(map(math.prod, _scratch_shapes(num_rows, vocab_size, tile))) + 2 * num_rows + 1)


def _scratch_shapes(num_rows: int, vocab_size: int, tile: GemmTile) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the shapes of the tiles' sums and of the statistics of repaired rows, which share memory."""
    repaired = triton.cdiv(vocab_size, _repair_tile(tile).BLOCK_N)
    return (triton.cdiv(vocab_size, tile.BLOCK_N), num_rows), (2, repaired, num_rows)


def _repair_tile(tile: GemmTile) -> GemmTile:
    """Return ``tile`` without TMA, which cannot gather the rows of a list."""
    return POINTER_TILE if tile.descriptors else tile


def exponentials(
    x: Tensor, weight: Tensor, targets: Tensor, head: LMHead, out: Tensor, *, tile: GemmTile | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Fill ``out`` (C, V) with E; return offset (C,), norms (C, 3) and target logits (C,), all fp32.

    ``x`` (C, D) and ``weight`` (V, D), the head's as a GEMM operand, are bf16 (or fp32), and so is ``out``,
    whose row stride is free. Norms are (offset, total, others): like those with a top, they give log-softmax as
    (z − norms[:, 0]) − log norms[:, 1]. Under a vocab_shard, the caller merges them over the ranks into a new tensor;
    ``offset``, a view of these norms, keeps the offsets of E. A target (C,) outside [0, V) belongs to another rank: its
    logit is 0. ``tile`` replaces the one from ``tiles``.
    """
    gemm_kernels.check_operands(x, weight, targets, OPERAND_DTYPES)
    if out.shape != (x.shape[0], weight.shape[0]) or out.dtype not in OPERAND_DTYPES or out.stride(1) != 1:
        raise ValueError(
            f"out is {tuple(out.shape)}, {out.dtype}, strides {out.stride()}: expected "
            f"{(x.shape[0], weight.shape[0])} in one of {OPERAND_DTYPES}, entries of a row next to each other"
        )
    num_rows, vocab = out.shape
    norms = torch.empty(num_rows, 3, dtype=torch.float32, device=x.device)
    if num_rows == 0:
        return norms[:, 0], norms, norms[:, 0]
    tile = tile or gemm_tile(
        "exponentials",
        capability(x.device),
        x.element_size(),
        shaped=gemm_kernels.is_shaped(head),
        aligned=gemm_kernels.aligned(x, weight, out),
    )
    repair_tile = _repair_tile(tile)
    shapes = _scratch_shapes(num_rows, vocab, tile)
    scratch = torch.empty(max(map(math.prod, shapes)), dtype=torch.float32, device=x.device)
    sums, statistics = (scratch[: math.prod(shape)].view(shape) for shape in shapes)

    target_logits = statistics_kernels.target_logits(x, weight, targets, head, norms, OFFSET_ABOVE_TARGET)
    _fill(x, weight, targets, head, out, norms, sums, tile)
    listed = _add_up(sums, targets, target_logits, vocab, norms)
    statistics_kernels.reduce_tiles(x, weight, targets, head, statistics, repair_tile, listed=listed)
    # A repaired row's offset is its top.
    statistics_kernels.merge(statistics, targets, target_logits, vocab, norms, None, listed)
    _fill(x, weight, targets, head, out, norms, sums, repair_tile, listed=listed)
    return norms[:, 0], norms, target_logits


def fix_targets(
    out: Tensor, targets: Tensor, target_logits: Tensor, offset: Tensor, norms: Tensor, head: LMHead
) -> Tensor:
    """Write the targets' entries of E (C, V); return the row factor (C,) fp32.

    After this, row factor × E is the gradient of −logp by raw. ``norms`` (C, 3) and ``target_logits`` (C,) are
    those of the full vocabulary, ``offset`` (C,) that of ``out``.
    """
    row_factor = torch.empty(len(out), dtype=torch.float32, device=out.device)
    if len(out) == 0:
        return row_factor
    _target_kernel[(triton.cdiv(len(out), TARGET_BLOCK),)](
        out_ptr=out,
        target_ptr=targets,
        target_logit_ptr=target_logits,
        norms_ptr=norms,
        offset_ptr=offset,
        row_factor_ptr=row_factor,
        C=out.shape[0],
        V=out.shape[1],
        out_row_stride=out.stride(0),
        offset_stride=offset.stride(0),
        softcap=head.outer_factor,
        slope=head.slope,
        smallest_factor=SMALLEST_FACTOR,
        HAS_SOFTCAP=head.logit_softcap is not None,
        BLOCK_C=TARGET_BLOCK,
    )
    return row_factor


def _fill(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    head: LMHead,
    out: Tensor,
    norms: Tensor,
    sums: Tensor,
    tile: GemmTile,
    *,
    listed: tuple[Tensor, Tensor] | None = None,
) -> None:
    """Compute E with the offsets norms[:, 0]; without ``listed``, also sums (tiles along V, C) without the targets."""
    rows, count = listed if listed is not None else (None, None)
    num_tiles = triton.cdiv(out.shape[0], tile.BLOCK_M) * triton.cdiv(out.shape[1], tile.BLOCK_N)
    _exponentials_kernel[(gemm_kernels.num_programs(x.device, num_tiles),)](
        out=gemm_kernels.descriptor(out, [tile.BLOCK_M, tile.BLOCK_N // EPILOGUE_PARTS], tile),
        target_ptr=targets,
        norms_ptr=norms,
        partial_ptr=sums,
        row_ptr=rows,
        count_ptr=count,
        out_row_stride=out.stride(0),
        LISTED=listed is not None,
        **head_arguments(head),
        **gemm_kernels.operand_arguments(x, weight, tile),
    )


def _add_up(
    sums: Tensor, targets: Tensor, target_logits: Tensor, vocab_size: int, norms: Tensor
) -> tuple[Tensor, Tensor]:
    """Write totals and others to norms[:, 1:]; list the rows with a total out of range.

    Returns the rows' indices (C,) and their count (1,).
    """
    num_partials, num_rows = sums.shape
    repair, rows = torch.empty(2, num_rows, dtype=torch.int32, device=sums.device)
    count = torch.empty(1, dtype=torch.int32, device=sums.device)
    _sum_kernel[(triton.cdiv(num_rows, SUM_ROWS),)](
        partial_ptr=sums,
        target_ptr=targets,
        target_logit_ptr=target_logits,
        norms_ptr=norms,
        repair_ptr=repair,
        C=num_rows,
        V=vocab_size,
        num_partials=num_partials,
        largest=LARGEST_TOTAL,
        smallest=1.0 / LARGEST_TOTAL,
        BLOCK_C=SUM_ROWS,
        BLOCK_P=SUM_PARTIALS,
    )
    _list_kernel[(1,)](repair_ptr=repair, row_ptr=rows, count_ptr=count, C=num_rows, BLOCK_C=LIST_BLOCK)
    return rows, count
