"""The map from raw products to logits in Triton, and the kernels' arguments for it."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from hypo_kernels.head import LMHead
from hypo_kernels.kernels.tiles import INTERPRETER


@triton.jit
def tanh(x):
    """Return tanh(x). exp(−2|x|) never overflows; libdevice's tanh does not run under the interpreter."""
    e = tl.exp(-2.0 * tl.abs(x))
    t = (1.0 - e) / (1.0 + e)
    return tl.where(x < 0, -t, t)


@triton.jit
def shaped(raw, factor, softcap, HAS_SOFTCAP: tl.constexpr):
    """Return (z, tanh) of ``raw`` = product + bias, of any shape: the logits, and the tanh in them under a softcap."""
    capped = raw * factor
    z = capped
    if HAS_SOFTCAP:
        capped = tanh(capped)
        z = capped * softcap
    return z, capped


@triton.jit
def row_logits(raw, bias_ptr, cols, mask, factor, softcap, HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr):
    """Return (z, tanh) of one row's raw products at the entries ``cols``; entries outside ``mask`` are not read."""
    if HAS_BIAS:
        raw += tl.load(bias_ptr + cols, mask=mask, other=0.0).to(tl.float32)
    return shaped(raw, factor, softcap, HAS_SOFTCAP)


@triton.jit
def block_logits(
    raw_ptr, bias_ptr, cols, V, factor, softcap, HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, MASKED: tl.constexpr
):
    """Return (z, tanh) of a row's raw products at ``cols``, from memory. If MASKED, entries from V on are not read.

    A row's complete blocks must not be MASKED: a mask by a V that is no multiple of 16 would make every load a scalar.
    """
    if MASKED:
        mask = cols < V
        raw = tl.load(raw_ptr + cols, mask=mask, other=0.0)
        if HAS_BIAS:
            raw += tl.load(bias_ptr + cols, mask=mask, other=0.0).to(tl.float32)
    else:
        raw = tl.load(raw_ptr + cols)
        if HAS_BIAS:
            raw += tl.load(bias_ptr + cols).to(tl.float32)
    return shaped(raw, factor, softcap, HAS_SOFTCAP)


@triton.jit
def store_block(out_ptr, cols, values, V, MASKED: tl.constexpr):
    """Store ``values`` at ``cols`` of a row, in its dtype; entries from V on are not written if MASKED."""
    values = values.to(out_ptr.dtype.element_ty)
    if MASKED:
        tl.store(out_ptr + cols, values, mask=cols < V)
    else:
        tl.store(out_ptr + cols, values)


@triton.jit
def tile_logits(raw, bias_ptr, cols, V, factor, softcap, HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr):
    """Return z of raw products (rows, entries) at the entries ``cols``; entries from V on are −inf."""
    mask = cols < V
    if HAS_BIAS:
        raw += tl.load(bias_ptr + cols, mask=mask, other=0.0).to(tl.float32)[None, :]
    z, _tanh = shaped(raw, factor, softcap, HAS_SOFTCAP)
    return tl.where(mask[None, :], z, float("-inf"))


def head_arguments(head: LMHead) -> dict[str, Any]:
    """Return the kernels' arguments for a head.

    ``z = (raw + bias)·factor``, or ``tanh((raw + bias)·factor)·softcap`` under a softcap: ``factor`` is logit_scale /
    temperature, or logit_scale / softcap under a softcap; ``softcap`` is softcap / temperature.
    """
    return {
        "bias_ptr": head.bias,
        "factor": head.inner_factor,
        "softcap": head.outer_factor,
        "HAS_BIAS": head.bias is not None,
        "HAS_SOFTCAP": head.logit_softcap is not None,
    }


def capability(device: torch.device) -> tuple[int, int]:
    """Return the compute capability of ``device``; INTERPRETER for a CPU."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else INTERPRETER
