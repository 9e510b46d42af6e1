"""Products with the LM head: library GEMMs on the operands' own dtype, accumulated in fp32.

CUDA multiplies 16-bit operands into fp32 directly. A CPU cannot, so there the operands are rounded to
the compute dtype (the caller's precision) and then widened: the same numbers, exact fp32 accumulation.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

# A head that has to be converted is converted once if the copy takes at most this share of the budget,
# else panel by panel.
PANEL_SHARE = 4


@contextmanager
def undisturbed(device: torch.device) -> Iterator[None]:
    """Products in the operands' own dtype, and kernels launched on ``device``, whichever is current."""
    current = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
    with torch.autocast(device.type, enabled=False), current:
        yield


def operand_dtype(device: torch.device, compute_dtype: torch.dtype) -> torch.dtype:
    """The dtype in which matrices meet a GEMM on ``device``."""
    if device.type == "cuda" or compute_dtype == torch.float64:
        return compute_dtype
    return torch.float32


def accumulator_dtype(compute_dtype: torch.dtype) -> torch.dtype:
    """fp32, and fp64 for fp64 inputs: the dtype of statistics and of sums over tokens."""
    return torch.float64 if compute_dtype == torch.float64 else torch.float32


def convert(x: Tensor, compute_dtype: torch.dtype) -> Tensor:
    """``x`` rounded to the compute dtype, in the dtype its device multiplies."""
    return x.to(compute_dtype).to(operand_dtype(x.device, compute_dtype))


def mm_(out: Tensor, a: Tensor, b: Tensor, *, accumulate: bool = False) -> None:
    """``out = a @ b`` or ``out += a @ b``; ``out`` (fp32/fp64) may be wider than the operands."""
    if a.dtype == out.dtype:
        torch.addmm(out, a, b, out=out) if accumulate else torch.mm(a, b, out=out)
    elif accumulate:
        torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
    else:
        torch.mm(a, b, out_dtype=out.dtype, out=out)


@dataclass(frozen=True)
class Panels:
    """A weight (V, D) served as GEMM operands, in panels of rows when it has to be converted."""

    weight: Tensor
    compute_dtype: torch.dtype
    rows_per_panel: int
    whole: Tensor | None  # the operand itself, when one panel serves the whole call

    @staticmethod
    def copy_bytes(weight: Tensor, compute_dtype: torch.dtype, budget: int, largest: int) -> int:
        """Bytes that serving the weight takes: 0 when it is an operand as it stands.

        ``largest`` is its number of rows, or that of the largest share where ranks have shares of a vocabulary: all
        of them plan alike.
        """
        per_row = _bytes_per_row(weight, compute_dtype)
        return min(per_row * largest, max(2 * per_row, budget // PANEL_SHARE))

    @classmethod
    def of(cls, weight: Tensor, compute_dtype: torch.dtype, budget: int, largest: int) -> Panels:
        per_row = _bytes_per_row(weight, compute_dtype)
        if per_row == 0:
            return cls(weight, compute_dtype, weight.shape[0], weight)
        share = cls.copy_bytes(weight, compute_dtype, budget, largest)
        if share >= per_row * largest:
            return cls(weight, compute_dtype, weight.shape[0], convert(weight, compute_dtype))
        # Two, because the next panel is made while the loop still holds the last one.
        return cls(weight, compute_dtype, max(1, share // (2 * per_row)), None)

    def __iter__(self) -> Iterator[tuple[slice, Tensor]]:
        """(vocabulary range, operand (rows, D)) of each panel."""
        if self.whole is not None:
            yield slice(0, self.weight.shape[0]), self.whole
            return
        for start in range(0, self.weight.shape[0], self.rows_per_panel):
            panel = self.weight[start : start + self.rows_per_panel]
            yield slice(start, start + panel.shape[0]), convert(panel, self.compute_dtype)


def _bytes_per_row(weight: Tensor, compute_dtype: torch.dtype) -> int:
    operand = operand_dtype(weight.device, compute_dtype)
    if weight.dtype == operand == compute_dtype:
        return 0
    # Rounding to 16 bits and widening again holds both copies for a moment.
    rounding = 0 if weight.dtype == compute_dtype or compute_dtype == operand else compute_dtype.itemsize
    return weight.shape[1] * (operand.itemsize + rounding)
