"""The row step in Triton: raw logits of a chunk -> softmax norms, target logit, unit gradients.

    C rows of a chunk, V vocabulary entries, raw = h·Wᵀ (C, V) in fp32
    z = softcap(logit_scale · (raw + bias)) / temperature            the model's logits
    top = max_v z_v        others = Σ_{v ≠ y} exp(z_v − top)        total = others + exp(z_y − top)
    U = scale · (exp(z − top) / total − onehot_y) · ∂z/∂raw           = scale · ∂(−log p_y)/∂raw

U is −others / total at the target: a difference with 1 would lose a likely target's gradient.

Each program processes one row. It reads the row once for the statistics (each lane has an online maximum and sum), and
again for U. U overwrites the row. For a large vocabulary the second read comes from memory, too: the rows of all
resident programs are larger than L2 (four programs on each of 132 multiprocessors have 271 MB of 128,256 logits).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hypo_kernels.head import LMHead
from hypo_kernels.kernels.head import block_logits, capability, head_arguments, row_logits, store_block
from hypo_kernels.kernels.tiles import RowTile, row_tile
from hypo_kernels.statistics import RowStatistics

GRADIENTS_IN_PLACE = True
SCALE_BLOCK = 8192  # entries per program


@triton.jit
def _target_logit(
    raw_ptr,  # start of the row
    target,
    bias_ptr,
    target_logit_ptr,
    row,
    V,
    factor,
    softcap,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
):
    """Return the row's logit at its target, −inf if another rank holds it, and store it, or 0."""
    inside = (target >= 0) & (target < V)
    entry = tl.where(inside, target, 0)
    z, _tanh = row_logits(tl.load(raw_ptr + entry), bias_ptr, entry, True, factor, softcap, HAS_BIAS, HAS_SOFTCAP)
    tl.store(target_logit_ptr + row, tl.where(inside, z, 0.0))
    return tl.where(inside, z, float("-inf"))


@triton.jit
def _add_block(
    raw_ptr,  # start of the row
    bias_ptr,
    start,
    target,
    top,  # (BLOCK_V,) fp32, each lane's
    total,
    V,
    factor,
    softcap,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK_V: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Return (top, total) with the entries from ``start`` on, but the target."""
    cols = start + tl.arange(0, BLOCK_V)
    z, _ = block_logits(raw_ptr, bias_ptr, cols, V, factor, softcap, HAS_BIAS, HAS_SOFTCAP, MASKED)
    if MASKED:
        z = tl.where(cols < V, z, float("-inf"))  # masked columns must not count
    new_top = tl.maximum(top, z)
    return new_top, total * tl.exp(top - new_top) + tl.where(cols == target, 0.0, tl.exp(z - new_top))


@triton.jit
def _write_block(
    raw_ptr,  # start of the row
    bias_ptr,
    grad_ptr,
    start,
    target,
    row_top,
    others,
    peak,
    V,
    factor,
    softcap,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK_V: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Replace the logits from ``start`` on by their gradients."""
    cols = start + tl.arange(0, BLOCK_V)
    z, capped = block_logits(raw_ptr, bias_ptr, cols, V, factor, softcap, HAS_BIAS, HAS_SOFTCAP, MASKED)
    grad = tl.where(cols == target, -others, tl.exp(z - row_top)) * peak
    if HAS_SOFTCAP:
        grad *= 1.0 - capped * capped
    # A narrower gradient is packed into the front of its row, over columns that every thread of the program must have
    # read before.
    tl.debug_barrier()
    store_block(grad_ptr, cols, grad, V, MASKED)


# The alignment of what is read once a row changes with the chunk's first row, and would compile the kernel again.
@triton.jit(do_not_specialize_on_alignment=["target_ptr", "norms_ptr", "target_logit_ptr"])
def _row_kernel(
    raw_ptr,  # (C, V) fp32, row pitch `raw_pitch`
    target_ptr,  # (C,) int64; outside [0, V) if another rank holds the target
    bias_ptr,  # (V,) or unused
    norms_ptr,  # (C, 3) fp32, top, total and others: read if NORMS_ARE_KNOWN, else written
    target_logit_ptr,  # (C,) fp32, 0 for a target beyond the vocabulary
    grad_ptr,  # (C, V) in the GEMM's dtype, row pitch `grad_pitch`, in the memory of raw_ptr
    V,
    raw_pitch,
    grad_pitch,
    factor,  # raw -> z, or raw -> tanh's argument under a softcap
    softcap,  # softcap / temperature
    slope,  # scale · logit_scale / temperature
    NORMS_ARE_KNOWN: tl.constexpr,
    WITH_GRADIENTS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    raw_ptr += row * raw_pitch
    grad_ptr += row * grad_pitch
    complete = V // BLOCK_V * BLOCK_V  # entries in blocks that need no mask
    target = tl.load(target_ptr + row)
    # First, because the gradients overwrite the row.
    z_target = _target_logit(
        raw_ptr, target, bias_ptr, target_logit_ptr, row, V, factor, softcap, HAS_BIAS, HAS_SOFTCAP
    )
    if NORMS_ARE_KNOWN:
        row_top = tl.load(norms_ptr + 3 * row)
        row_total = tl.load(norms_ptr + 3 * row + 1)
        others = tl.load(norms_ptr + 3 * row + 2)
    else:
        # Finite: a lane with only masked columns would compute inf − inf.
        top = tl.full([BLOCK_V], -1.0e38, tl.float32)
        total = tl.zeros([BLOCK_V], tl.float32)
        for start in range(0, complete, BLOCK_V):
            top, total = _add_block(
                raw_ptr, bias_ptr, start, target, top, total, V, factor, softcap, HAS_BIAS, HAS_SOFTCAP, BLOCK_V, False
            )
        if complete < V:
            top, total = _add_block(
                raw_ptr,
                bias_ptr,
                complete,
                target,
                top,
                total,
                V,
                factor,
                softcap,
                HAS_BIAS,
                HAS_SOFTCAP,
                BLOCK_V,
                True,
            )
        row_top = tl.maximum(tl.max(top, axis=0), z_target)
        others = tl.sum(total * tl.exp(top - row_top), axis=0)
        row_total = others + tl.exp(z_target - row_top)
        tl.store(norms_ptr + 3 * row, row_top)
        tl.store(norms_ptr + 3 * row + 1, row_total)
        tl.store(norms_ptr + 3 * row + 2, others)

    if WITH_GRADIENTS:
        peak = slope / row_total
        for start in range(0, complete, BLOCK_V):
            _write_block(
                raw_ptr,
                bias_ptr,
                grad_ptr,
                start,
                target,
                row_top,
                others,
                peak,
                V,
                factor,
                softcap,
                HAS_BIAS,
                HAS_SOFTCAP,
                BLOCK_V,
                False,
            )
        if complete < V:
            _write_block(
                raw_ptr,
                bias_ptr,
                grad_ptr,
                complete,
                target,
                row_top,
                others,
                peak,
                V,
                factor,
                softcap,
                HAS_BIAS,
                HAS_SOFTCAP,
                BLOCK_V,
                True,
            )


def scratch_bytes(num_rows: int, row_bytes: int) -> int:
    """Return 0: a call allocates no temporaries."""
    return 0


def statistics(raw: Tensor, targets: Tensor, head: LMHead) -> RowStatistics:
    """Return norms (C, 3) and target logit (C,) of raw logits (C, V), which stay unchanged."""
    return _launch(raw, targets, head, norms=None, grad=None, scale=1.0)


def unit_gradients(
    raw: Tensor, targets: Tensor, head: LMHead, *, norms: Tensor | None, out_dtype: torch.dtype, scale: float
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Return (U, None, target's log-prob (C,)) with U = ``scale · ∂(−log p(target))/∂raw`` (C, V) in ``out_dtype``.

    U overwrites ``raw``. With ``norms`` (C, 3) from an earlier pass, the statistics are not computed again. Under a
    vocabulary shard they are required, and the log-prob is valid only on the rank that holds the target.
    """
    unit = packed(raw, out_dtype)
    return unit, None, _launch(raw, targets, head, norms=norms, grad=unit, scale=scale).logps()


@triton.jit
def _scale_kernel(x_ptr, factor_ptr, count, BLOCK: tl.constexpr):
    factor = tl.load(factor_ptr).to(tl.float32)
    if factor != 1.0:  # the upstream gradient of a loss is usually 1
        index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        mask = index < count
        x = tl.load(x_ptr + index, mask=mask, other=0.0).to(tl.float32) * factor
        tl.store(x_ptr + index, x.to(x_ptr.dtype.element_ty), mask=mask)


def scale_(x: Tensor, factor: Tensor) -> None:
    """Multiply ``x`` (contiguous) in place by ``factor`` (), on the device. A factor of 1 reads nothing."""
    _scale_kernel[(triton.cdiv(x.numel(), SCALE_BLOCK),)](
        x_ptr=x, factor_ptr=factor, count=x.numel(), BLOCK=SCALE_BLOCK, num_warps=8
    )


def packed(raw: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a (C, V) view of ``raw``'s memory in ``dtype``: each row starts where its row of ``raw`` starts."""
    return raw.as_strided((len(raw), raw.stride(0)), (raw.stride(0), 1)).view(dtype)[:, : raw.shape[1]]


def tile_of(raw: Tensor) -> RowTile:
    """Return the row tile for logits (C, V) on their device."""
    return row_tile(raw.shape[1], capability(raw.device))


def _launch(
    raw: Tensor, targets: Tensor, head: LMHead, *, norms: Tensor | None, grad: Tensor | None, scale: float
) -> RowStatistics:
    rows, vocab = raw.shape
    target_logits = torch.empty(rows, dtype=raw.dtype, device=raw.device)
    norms_are_known = norms is not None
    if norms is None:
        norms = torch.empty(rows, 3, dtype=raw.dtype, device=raw.device)
    tile = tile_of(raw)
    _row_kernel[(rows,)](
        raw_ptr=raw,
        target_ptr=targets,
        norms_ptr=norms,
        target_logit_ptr=target_logits,
        grad_ptr=raw if grad is None else grad,
        V=vocab,
        raw_pitch=raw.stride(0),
        grad_pitch=0 if grad is None else grad.stride(0),
        slope=scale * head.slope,
        NORMS_ARE_KNOWN=norms_are_known,
        WITH_GRADIENTS=grad is not None,
        **head_arguments(head),
        BLOCK_V=tile.BLOCK_V,
        num_warps=tile.num_warps,
    )
    return RowStatistics(norms, target_logits)
