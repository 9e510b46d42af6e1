"""The row step in Triton: raw logits of a chunk -> softmax norms, target log-prob, unit gradients.

    C rows of a chunk, V vocabulary entries, raw = h·Wᵀ (C, V) in fp32
    z = softcap(logit_scale · (raw + bias)) / temperature            the model's logits
    top = max_v z_v        total = Σ_v exp(z_v − top)        logp = z_y − top − log total
    U = scale · (exp(z − top) / total − onehot_y) · ∂z/∂raw           = scale · ∂(−logp)/∂raw

The norms of a row, top and total, are kept apart: added up to a log-sum-exp, they would be rounded at the
size of the logits, and every probability with them.

One program a row. The row is read once for the statistics (online maximum and sum, one of each a lane)
and once more, out of L2 where it fits, for U, which overwrites the row it came from.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hypo_kernels.head import LMHead
from hypo_kernels.tiles import row_tile

GRADIENTS_IN_PLACE = True


@triton.jit
def _tanh(x):
    # exp(−2|x|) never overflows; libdevice's tanh does not run under the interpreter.
    e = tl.exp(-2.0 * tl.abs(x))
    t = (1.0 - e) / (1.0 + e)
    return tl.where(x < 0, -t, t)


@triton.jit
def _logits(raw, bias_ptr, cols, mask, factor, softcap, HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr):
    """(z, tanh term): ``factor`` is logit_scale / temperature, or logit_scale / softcap under a softcap."""
    if HAS_BIAS:
        raw += tl.load(bias_ptr + cols, mask=mask, other=0.0).to(tl.float32)
    capped = raw * factor
    z = capped
    if HAS_SOFTCAP:
        capped = _tanh(capped)
        z = capped * softcap
    return z, capped


@triton.jit
def _row_kernel(
    raw_ptr,  # (C, V) fp32, row pitch `raw_pitch`
    target_ptr,  # (C,) int64
    bias_ptr,  # (V,) or unused
    norms_ptr,  # (C, 2) fp32, top and total: read if NORMS_ARE_KNOWN, else written
    logp_ptr,  # (C,) fp32
    grad_ptr,  # (C, V), row pitch `grad_pitch`: the same memory as raw_ptr, seen in the GEMM's dtype
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
    target = tl.load(target_ptr + row)

    # The target's logit is read before anything overwrites the row.
    at_target = tl.load(raw_ptr + target)
    if HAS_BIAS:
        at_target += tl.load(bias_ptr + target).to(tl.float32)
    z_target = at_target * factor
    if HAS_SOFTCAP:
        z_target = _tanh(z_target) * softcap

    if NORMS_ARE_KNOWN:
        row_top = tl.load(norms_ptr + 2 * row)
        row_total = tl.load(norms_ptr + 2 * row + 1)
    else:
        # Finite, so that a lane that has seen nothing but masked columns never meets inf − inf.
        top = tl.full([BLOCK_V], -1.0e38, tl.float32)
        total = tl.zeros([BLOCK_V], tl.float32)
        for start in range(0, V, BLOCK_V):
            cols = start + tl.arange(0, BLOCK_V)
            mask = cols < V
            raw = tl.load(raw_ptr + cols, mask=mask, other=0.0)
            z, _ = _logits(raw, bias_ptr, cols, mask, factor, softcap, HAS_BIAS, HAS_SOFTCAP)
            z = tl.where(mask, z, float("-inf"))  # phantom columns must not count
            new_top = tl.maximum(top, z)
            total = total * tl.exp(top - new_top) + tl.exp(z - new_top)
            top = new_top
        row_top = tl.max(top, axis=0)
        row_total = tl.sum(total * tl.exp(top - row_top), axis=0)
        tl.store(norms_ptr + 2 * row, row_top)
        tl.store(norms_ptr + 2 * row + 1, row_total)
    tl.store(logp_ptr + row, z_target - row_top - tl.log(row_total))

    if WITH_GRADIENTS:
        peak = slope / row_total
        for start in range(0, V, BLOCK_V):
            cols = start + tl.arange(0, BLOCK_V)
            mask = cols < V
            raw = tl.load(raw_ptr + cols, mask=mask, other=0.0)
            z, capped = _logits(raw, bias_ptr, cols, mask, factor, softcap, HAS_BIAS, HAS_SOFTCAP)
            # The one-hot is subtracted in fp32, before rounding: p − 1 of a likely target would vanish.
            grad = tl.exp(z - row_top) * peak - tl.where(cols == target, slope, 0.0)
            if HAS_SOFTCAP:
                grad *= 1.0 - capped * capped
            # A narrower gradient is packed into the front of its own row, over columns that every thread
            # of the program has to have read by now.
            tl.debug_barrier()
            tl.store(grad_ptr + cols, grad.to(grad_ptr.dtype.element_ty), mask=mask)


def scratch_bytes(num_rows: int, row_bytes: int) -> int:
    """Nothing beside the chunk."""
    return 0


def statistics(raw: Tensor, targets: Tensor, head: LMHead) -> tuple[Tensor, Tensor]:
    """Norms (C, 2) and target log-prob (C,) of raw logits (C, V)."""
    norms = torch.empty(len(raw), 2, dtype=raw.dtype, device=raw.device)
    return norms, _launch(raw, targets, head, norms, norms_are_known=False, grad=None, scale=1.0)


def unit_gradients(
    raw: Tensor, targets: Tensor, head: LMHead, *, norms: Tensor | None, out_dtype: torch.dtype, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """``scale · ∂(−log p(target))/∂raw`` (C, V) in ``out_dtype``, norms (C, 2) and target log-prob (C,).

    The gradients lie in the memory of ``raw``, which is spent. ``norms`` skip the statistics when an
    earlier pass has them.
    """
    known = norms is not None
    norms = norms if norms is not None else torch.empty(len(raw), 2, dtype=raw.dtype, device=raw.device)
    packed = raw.as_strided((len(raw), raw.stride(0)), (raw.stride(0), 1)).view(out_dtype)[:, : raw.shape[1]]
    logps = _launch(raw, targets, head, norms, norms_are_known=known, grad=packed, scale=scale)
    return packed, norms, logps


def _launch(
    raw: Tensor,
    targets: Tensor,
    head: LMHead,
    norms: Tensor,
    *,
    norms_are_known: bool,
    grad: Tensor | None,
    scale: float,
) -> Tensor:
    rows, vocab = raw.shape
    logps = torch.empty(rows, dtype=raw.dtype, device=raw.device)
    capability = torch.cuda.get_device_capability(raw.device) if raw.is_cuda else (0, 0)
    tile = row_tile(vocab, capability)
    softcap = head.logit_softcap
    _row_kernel[(rows,)](
        raw_ptr=raw,
        target_ptr=targets,
        bias_ptr=head.bias,
        norms_ptr=norms,
        logp_ptr=logps,
        grad_ptr=raw if grad is None else grad,
        V=vocab,
        raw_pitch=raw.stride(0),
        grad_pitch=0 if grad is None else grad.stride(0),
        factor=head.logit_scale / (head.temperature if softcap is None else softcap),
        softcap=0.0 if softcap is None else softcap / head.temperature,
        slope=scale * head.logit_scale / head.temperature,
        NORMS_ARE_KNOWN=norms_are_known,
        WITH_GRADIENTS=grad is not None,
        HAS_BIAS=head.bias is not None,
        HAS_SOFTCAP=softcap is not None,
        BLOCK_V=tile.BLOCK_V,
        num_warps=tile.num_warps,
    )
    return logps
