"""Products of bf16 matrices, with sums in fp32, on a CPU with AMX.

torch's CPU products of two bf16 matrices are summed in fp32 and then rounded to bf16. That is enough for a part of a
gradient, which is added in fp32. It is too little for logits, so a second product computes what the first one lost:

    high = bf16(a·b)          low = bf16(a·b − high)          a·b ≈ high + low, within 2^-17 of a·b

oneDNN subtracts in fp32, before it rounds. (It can also round fp32 operands itself and keep the result in fp32, but
that is a switch of the process: it would round the positions of another thread's RoPE.)

AVX512-BF16 without AMX does not count: an Intel CPU with it reached 162 GFLOP/s in bf16 and 284 in fp32, with AMX 1,271
and 227 (2 threads each).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

BLOCK_BYTES = 2**20  # of a block of a product in bf16, small enough for the caches


def is_supported() -> bool:
    """Return whether torch multiplies bf16 matrices with AMX on this machine's CPU."""
    return torch.backends.mkldnn.is_available() and torch.cpu._is_amx_tile_supported()


def mm_(out: Tensor, a: Tensor, b: Tensor, *, accumulate: bool, may_round: bool) -> None:
    """Compute ``out = a @ b``, or ``out += a @ b``, of bf16 matrices into fp32.

    With ``may_round``, the product is rounded to bf16 once.
    """
    for rows, columns in _blocks(out):
        part, x, y = out[rows, columns], a[rows], b[:, columns]
        high = x @ y
        part.add_(high) if accumulate else part.copy_(high)
        if not may_round:
            part.add_(torch.addmm(high.neg_(), x, y, out=high))


def _blocks(out: Tensor) -> Iterator[tuple[slice, slice]]:
    """Yield (rows, columns) of blocks of ``out``, which are cut along its longer side."""
    rows, columns = out.shape
    step = max(1, BLOCK_BYTES // (2 * min(rows, columns)))
    for start in range(0, max(rows, columns), step):
        part = slice(start, start + step)
        yield (part, slice(None)) if rows > columns else (slice(None), part)
