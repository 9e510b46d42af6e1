"""Fused statistics in Triton: softmax statistics of hidden states, by a GEMM that never stores its logits.

    C rows, V vocabulary entries, D features; z (C, V) the model's logits (``kernels.product``)
    top = max_v z_v      total = Σ_v exp(z_v − top)      moment = Σ_v exp(z_v − top)·(z_v − top)
    logp = −softplus(top + log others − z_y)             entropy = log total − moment / total

others is the total without the target y. The GEMM leaves the target out of all of its statistics, and the kernel that
merges them puts it back: the total less a likely target's term would be rounded to the size of that term.

Each (BLOCK_M, BLOCK_N) tile of logits stays in registers and is reduced to a few numbers a row. A second, small kernel
merges the partials of a row in a fixed order: there are no atomics, so that calls are bitwise reproducible. The norms
of a row are stored separately: their log-sum-exp would be rounded at the magnitude of the logits, and
so would every probability.

The target's logit is a dot product in fp32, by a kernel of its own. To pick it from the GEMM's accumulators, and to
leave it out of the sums, takes more registers than there are. The log-prob, made from the sum of the others, does not
exceed 0, however the two products round.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hypo_kernels.head import LMHead
from hypo_kernels.kernels import product as gemm_kernels
from hypo_kernels.kernels.head import capability, head_arguments, shaped, tile_logits
from hypo_kernels.kernels.product import (
    load_targets,
    quarters,
    take_tile,
)
from hypo_kernels.kernels.tiles import GemmTile, gemm_tile

OPERAND_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# Block sizes of the merge kernel: rows, and partials of each row.
MERGE_ROWS, MERGE_PARTIALS = 16, 64
TARGET_BLOCK = 1024  # features


@triton.jit(do_not_specialize_on_alignment=["target_ptr"])
def _target_logit_kernel(
    x_ptr,  # (C, D)
    weight_ptr,  # (V, D)
    target_ptr,  # (C,) int64
    bias_ptr,  # (V,) or unused
    target_logit_ptr,  # (C,) fp32
    norms_ptr,  # (C, 3) fp32: its offset, if WITH_OFFSET
    V,
    D,
    x_row_stride,
    x_stride,
    weight_row_stride,
    weight_stride,
    factor,
    softcap,
    above,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    WITH_OFFSET: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(target_ptr + row)
    inside = (target >= 0) & (target < V)
    target = tl.where(inside, target, 0)
    products = tl.zeros([BLOCK_D], tl.float32)
    for start in range(0, D, BLOCK_D):
        features = (start + tl.arange(0, BLOCK_D)).to(tl.int64)
        mask = features < D
        a = tl.load(x_ptr + row * x_row_stride + features * x_stride, mask=mask, other=0.0)
        b = tl.load(weight_ptr + target * weight_row_stride + features * weight_stride, mask=mask, other=0.0)
        products += a.to(tl.float32) * b.to(tl.float32)
    raw = tl.sum(products, axis=0)
    if HAS_BIAS:
        raw += tl.load(bias_ptr + target).to(tl.float32)
    z, _tanh = shaped(raw, factor, softcap, HAS_SOFTCAP)
    tl.store(target_logit_ptr + row, tl.where(inside, z, 0.0))
    if WITH_OFFSET:
        # 0 if the row has no target here: most heads have logits around 0.
        tl.store(norms_ptr + 3 * row, tl.where(inside, z + above, 0.0))


@triton.jit
def _merged(top, total, moment, new_top, new_total, new_moment, WITH_MOMENT: tl.constexpr):
    """Return (top, total, moment) of the union of two disjoint sets of entries. The top of an empty set is −1e38."""
    both = tl.maximum(top, new_top)
    shift, new_shift = top - both, new_top - both
    factor, new_factor = tl.exp(shift), tl.exp(new_shift)
    if WITH_MOMENT:
        moment = factor * (moment + total * shift) + new_factor * (new_moment + new_total * new_shift)
    return both, factor * total + new_factor * new_total, moment


# Numbers of rows differ from batch to batch: a kernel of its own for 1 and for multiples of 16 would make runs wait for
# a compiler. So would the alignment of pointers to a chunk's first row.
@triton.jit(do_not_specialize=["C"], do_not_specialize_on_alignment=["target_ptr", "row_ptr"])
def _statistics_kernel(
    x,  # (C, D), descriptor or pointer
    weight,  # (V, D), descriptor or pointer
    target_ptr,  # (C,) int64
    bias_ptr,  # (V,) or unused
    partial_ptr,  # (2 or 3, tiles along V, C) fp32: top, total and moment of a tile's entries but the target
    row_ptr,  # (C,) int32, if LISTED: row indices, of which the first *count_ptr are valid
    count_ptr,  # (1,) int32
    C,
    V,
    D,
    x_row_stride,
    x_stride,
    weight_row_stride,
    weight_stride,
    factor,
    softcap,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    WITH_MOMENT: tl.constexpr,
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
        _m, n, places, counted, rows, raw = take_tile(
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
        target = load_targets(target_ptr, rows, V)
        top = tl.full([BLOCK_M], -1.0e38, tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        moment = tl.zeros([BLOCK_M], tl.float32)
        parts = quarters(raw)
        for i in tl.static_range(4):
            first = n * BLOCK_N + i * (BLOCK_N // 4)
            cols = first + tl.arange(0, BLOCK_N // 4)
            z = tile_logits(parts[i], bias_ptr, cols, V, factor, softcap, HAS_BIAS, HAS_SOFTCAP)
            z = tl.where(cols[None, :] == target[:, None], float("-inf"), z)
            # Finite: a tile with only −inf (columns from V on, or by the bias) would compute inf − inf.
            part_top = tl.maximum(tl.max(z, axis=1), -1.0e38)
            below = z - part_top[:, None]
            e = tl.exp(below)
            part_total = tl.sum(e, axis=1)
            part_moment = part_total
            if WITH_MOMENT:
                # For an entry at −inf, 0 · (−inf) would be NaN.
                part_moment = tl.sum(e * tl.maximum(below, -1.0e38), axis=1)
            top, total, moment = _merged(top, total, moment, part_top, part_total, part_moment, WITH_MOMENT)
        ptrs = partial_ptr + n.to(tl.int64) * C + places
        stat_stride = tl.cast(num_n, tl.int64) * C  # a vocabulary of 1 is a constant, without methods
        tl.store(ptrs, top, mask=counted)
        tl.store(ptrs + stat_stride, total, mask=counted)
        if WITH_MOMENT:
            tl.store(ptrs + 2 * stat_stride, moment, mask=counted)


@triton.jit(do_not_specialize=["C", "num_partials"], do_not_specialize_on_alignment=["target_ptr", "row_ptr"])
def _merge_kernel(
    partial_ptr,  # (2 or 3, num_partials, C) fp32
    target_ptr,  # (C,) int64
    target_logit_ptr,  # (C,) fp32
    norms_ptr,  # (C, 3) fp32
    moment_ptr,  # (C,) fp32 or unused
    row_ptr,  # (C,) int32, if LISTED: the row that each partial belongs to
    count_ptr,  # (1,) int32
    C,
    V,
    num_partials,
    WITH_MOMENT: tl.constexpr,
    LISTED: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    num_rows = C
    if LISTED:
        num_rows = tl.load(count_ptr)
    places = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    counted = places < num_rows
    stat_stride = tl.cast(num_partials, tl.int64) * C
    top = tl.full([BLOCK_P, BLOCK_C], -1.0e38, tl.float32)
    total = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    moment = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    # Programs after the end of the list read no partials.
    for start in range(0, tl.where(tl.program_id(0) * BLOCK_C < num_rows, num_partials, 0), BLOCK_P):
        partials = start + tl.arange(0, BLOCK_P)
        mask = (partials < num_partials)[:, None] & counted[None, :]
        ptrs = partial_ptr + partials.to(tl.int64)[:, None] * C + places[None, :]
        new_top = tl.load(ptrs, mask=mask, other=-1.0e38)
        new_total = tl.load(ptrs + stat_stride, mask=mask, other=0.0)
        new_moment = new_total
        if WITH_MOMENT:
            new_moment = tl.load(ptrs + 2 * stat_stride, mask=mask, other=0.0)
        top, total, moment = _merged(top, total, moment, new_top, new_total, new_moment, WITH_MOMENT)
    rows = places
    if LISTED:
        rows = tl.load(row_ptr + places, mask=counted, other=0)
    target = tl.load(target_ptr + rows, mask=counted, other=-1)
    z_target = tl.load(target_logit_ptr + rows, mask=counted, other=0.0)
    z_target = tl.where((target >= 0) & (target < V), z_target, float("-inf"))
    row_top = tl.maximum(tl.max(top, axis=0), z_target)
    shift = top - row_top[None, :]
    others = tl.sum(total * tl.exp(shift), axis=0)
    below = z_target - row_top
    at_target = tl.exp(below)
    norms_ptrs = norms_ptr + 3 * rows.to(tl.int64)
    tl.store(norms_ptrs, row_top, mask=counted)
    tl.store(norms_ptrs + 1, others + at_target, mask=counted)
    tl.store(norms_ptrs + 2, others, mask=counted)
    if WITH_MOMENT:
        row_moment = tl.sum(tl.exp(shift) * (moment + total * shift), axis=0)
        # For a target at −inf, 0 · (−inf) would be NaN.
        row_moment += at_target * tl.maximum(below, -1.0e38)
        tl.store(moment_ptr + rows, row_moment, mask=counted)


def scratch_bytes(num_rows: int, vocab_size: int, tile: GemmTile, *, with_moment: bool = False) -> int:
    """Return the bytes that a call allocates besides its results."""
    return 4 * (3 if with_moment else 2) * triton.cdiv(vocab_size, tile.BLOCK_N) * num_rows


def statistics(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    head: LMHead,
    *,
    with_moment: bool = False,
    tile: GemmTile | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return norms (C, 3), target logits (C,) and moment (C,) or None of the logits of ``x`` (C, D), all fp32.

    ``weight`` (V, D) is the head's as a GEMM operand, of the dtype of ``x``: bf16, fp16 or fp32 (multiplied in full
    precision). A target (C,) outside [0, V) belongs to another rank: its logit is 0. ``tile`` replaces the one
    from ``tiles``.
    """
    gemm_kernels.check_operands(x, weight, targets, OPERAND_DTYPES)
    norms = torch.empty(len(x), 3, dtype=torch.float32, device=x.device)
    moment = torch.empty_like(norms[:, 0]) if with_moment else None
    logits = target_logits(x, weight, targets, head)
    if len(x) == 0:
        return norms, logits, moment
    tile = tile or gemm_tile(
        "statistics",
        capability(x.device),
        x.element_size(),
        shaped=gemm_kernels.is_shaped(head),
        aligned=gemm_kernels.aligned(x, weight),
    )
    shape = (3 if with_moment else 2, triton.cdiv(weight.shape[0], tile.BLOCK_N), len(x))
    partials = torch.empty(shape, dtype=torch.float32, device=x.device)
    reduce_tiles(x, weight, targets, head, partials, tile, with_moment=with_moment)
    merge(partials, targets, logits, weight.shape[0], norms, moment)
    return norms, logits, moment


def target_logits(
    x: Tensor, weight: Tensor, targets: Tensor, head: LMHead, norms: Tensor | None = None, above: float = 0.0
) -> Tensor:
    """Return the target's logit of each row of ``x`` (C, D), (C,) fp32; 0 for a target outside [0, V).

    With ``norms`` (C, 3), also write offsets to norms[:, 0]: the logit + ``above``, or 0 for a target outside.
    """
    out = torch.empty(len(x), dtype=torch.float32, device=x.device)
    if len(x) == 0:
        return out
    _target_logit_kernel[(len(x),)](
        x_ptr=x,
        weight_ptr=weight,
        target_ptr=targets,
        target_logit_ptr=out,
        norms_ptr=norms,
        V=weight.shape[0],
        D=x.shape[1],
        x_row_stride=x.stride(0),
        x_stride=x.stride(1),
        weight_row_stride=weight.stride(0),
        weight_stride=weight.stride(1),
        above=above,
        WITH_OFFSET=norms is not None,
        BLOCK_D=TARGET_BLOCK,
        **head_arguments(head),
    )
    return out


def reduce_tiles(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    head: LMHead,
    partials: Tensor,
    tile: GemmTile,
    *,
    with_moment: bool = False,
    listed: tuple[Tensor, Tensor] | None = None,
) -> None:
    """Compute partials (2 or 3, tiles along V, C) of all rows of ``x``, or of those ``listed``.

    ``listed`` is (rows (C,) int32, count (1,) int32), both on the device: only the first ``count`` rows are
    processed, and their partials are in the order of the list. An empty list costs one empty launch. The tile must not
    use descriptors: TMA cannot gather.
    """
    rows, count = listed if listed is not None else (None, None)
    num_tiles = triton.cdiv(len(x), tile.BLOCK_M) * triton.cdiv(weight.shape[0], tile.BLOCK_N)
    _statistics_kernel[(gemm_kernels.num_programs(x.device, num_tiles),)](
        target_ptr=targets,
        partial_ptr=partials,
        row_ptr=rows,
        count_ptr=count,
        WITH_MOMENT=with_moment,
        LISTED=listed is not None,
        **head_arguments(head),
        **gemm_kernels.operand_arguments(x, weight, tile),
    )


def merge(
    partials: Tensor,
    targets: Tensor,
    target_logits: Tensor,
    vocab_size: int,
    norms: Tensor,
    moment: Tensor | None,
    listed: tuple[Tensor, Tensor] | None = None,
) -> None:
    """Compute norms (C, 3) and moment (C,) from partials (2 or 3, P, C) and the targets, which these leave out."""
    rows, count = listed if listed is not None else (None, None)
    _merge_kernel[(triton.cdiv(partials.shape[2], MERGE_ROWS),)](
        partial_ptr=partials,
        target_ptr=targets,
        target_logit_ptr=target_logits,
        norms_ptr=norms,
        moment_ptr=moment,
        row_ptr=rows,
        count_ptr=count,
        C=partials.shape[2],
        V=vocab_size,
        num_partials=partials.shape[1],
        WITH_MOMENT=moment is not None,
        LISTED=listed is not None,
        BLOCK_C=MERGE_ROWS,
        BLOCK_P=MERGE_PARTIALS,
    )
