"""Products with the LM head: library GEMMs on operands of the compute dtype, accumulated in fp32.

CUDA multiplies 16-bit operands into fp32. So does ``amx``, in bf16, on a CPU with AMX. Another CPU cannot, so there the
operands are rounded to the compute dtype and then converted to fp32: the same numbers, with exact fp32 accumulation.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from hypo_kernels import amx

# A head that must be converted is converted once if its copy takes at most 1/PANEL_SHARE of the budget; otherwise panel
# by panel. On CUDA, where panels would be converted again in every pass over every chunk, all heads are converted once
# if their copies together take at most 1/CUDA_SHARE.
PANEL_SHARE = 4
CUDA_SHARE = 2
# On CUDA, a panel starts at a multiple of these rows: then its operands have the alignment that cuBLAS needs for its
# fastest kernels, for any number of features.
PANEL_ROWS = 128


@contextmanager
def undisturbed(device: torch.device) -> Iterator[None]:
    """Disable autocast and make ``device`` current inside the ``with`` block, for GEMMs and kernel launches."""
    current = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
    with torch.autocast(device.type, enabled=False), current:
        yield


def operand_dtype(device: torch.device, compute_dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of a GEMM's operands on ``device``."""
    if device.type == "cuda" or compute_dtype == torch.float64:
        return compute_dtype
    return torch.bfloat16 if compute_dtype == torch.bfloat16 and amx.is_supported() else torch.float32


def accumulator_dtype(compute_dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of statistics and of sums over tokens: fp32, or fp64 for fp64 inputs."""
    return torch.float64 if compute_dtype == torch.float64 else torch.float32


def convert(x: Tensor, compute_dtype: torch.dtype) -> Tensor:
    """Return ``x``, rounded to the compute dtype, in the dtype of a GEMM's operands on its device."""
    return x.to(compute_dtype).to(operand_dtype(x.device, compute_dtype))


def mm_(out: Tensor, a: Tensor, b: Tensor, *, accumulate: bool = False, may_round: bool = False) -> None:
    """Compute ``out = a @ b``, or ``out += a @ b``. ``out`` (fp32 or fp64) may have a wider dtype than the operands.

    With ``may_round``, the product may be rounded to the operands' dtype once, which is faster on a CPU with AMX.
    """
    if a.dtype == out.dtype:
        torch.addmm(out, a, b, out=out) if accumulate else torch.mm(a, b, out=out)
    elif out.device.type == "cpu" and amx.is_supported():
        amx.mm_(out, a, b, accumulate=accumulate, may_round=may_round)
    elif accumulate:
        torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
    else:
        torch.mm(a, b, out_dtype=out.dtype, out=out)


def copy_bytes(weights: Sequence[Tensor], compute_dtype: torch.dtype, budget: int, largest: int) -> list[int]:
    """Return the bytes of converted copies of each weight: 0 if the weight itself can be an operand.

    ``largest`` is their number of rows. Under a vocabulary shard it is the largest number on any rank, so that all
    ranks choose the same plan.
    """
    per_row = [_bytes_per_row(weight, compute_dtype) for weight in weights]
    if weights[0].device.type == "cuda" and sum(per_row) * largest <= budget // CUDA_SHARE:
        return [size * largest for size in per_row]
    return [min(size * largest, max(2 * size, budget // PANEL_SHARE)) for size in per_row]


@dataclass(frozen=True)
class Panels:
    """A weight (V, D) as GEMM operands: one operand, or panels of rows that are converted one at a time."""

    weight: Tensor
    compute_dtype: torch.dtype
    rows_per_panel: int
    operand: Tensor | None  # the weight as a single operand, or None if it is converted in panels

    @classmethod
    def of(cls, weight: Tensor, compute_dtype: torch.dtype, copy_bytes: int, largest: int) -> Panels:
        """Return the weight's panels; ``copy_bytes`` from :func:`copy_bytes` with the same ``largest``."""
        per_row = _bytes_per_row(weight, compute_dtype)
        if per_row == 0:
            return cls(weight, compute_dtype, weight.shape[0], weight)
        if copy_bytes >= per_row * largest:
            return cls(weight, compute_dtype, weight.shape[0], convert(weight, compute_dtype))
        # Divided by 2, because the next panel is made while the loop still holds the previous one.
        rows = max(1, copy_bytes // (2 * per_row))
        if weight.device.type == "cuda" and rows > PANEL_ROWS:
            rows = rows // PANEL_ROWS * PANEL_ROWS
        return cls(weight, compute_dtype, rows, None)

    def __iter__(self) -> Iterator[tuple[slice, Tensor]]:
        """Yield (vocabulary range, operand (rows, D)) of each panel."""
        if self.operand is not None:
            yield slice(0, self.weight.shape[0]), self.operand
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
