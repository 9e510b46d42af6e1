"""Compare results with float64, and tell wrong results from rounded ones."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks import float64
from benchmarks.measure import peak_extra_bytes
from benchmarks.workloads import Batch

EXPECTED = {"forward": ("logps",), "frozen": ("logps", "hidden"), "trained": ("logps", "hidden", "weight")}
WRONG_FACTOR = 10


@dataclass(frozen=True)
class Truth:
    """Sequence log-probs (S,) and the gradients of the counted rows (N, D) and of the weight (V, D), in float64."""

    logps: Tensor
    hidden: Tensor | None
    weight: Tensor | None
    rounded: dict[str, float]  # errors of rounding the exact gradients of logits to 16 bits
    peak_bytes: int


def truth(batch: Batch, *, gradients: bool) -> Truth:
    """Compute the truth in chunks of rows, to fit into memory beside the largest workload; the peak is checked."""
    rows, targets, dtype = batch.counted_rows, batch.counted_targets, batch.weight.dtype

    def compute() -> tuple[Tensor, Tensor | None, Tensor | None, dict[str, float]]:
        token_logps = float64.row_logprobs(batch.hidden[rows], batch.weight, targets)
        logps = torch.segment_reduce(token_logps, "sum", lengths=batch.lengths, unsafe=True, initial=0.0)
        if not gradients:
            return logps, None, None, {}
        _, slope = batch.loss_and_coefficients(logps, batch.ref_logps.double())
        per_row = slope.repeat_interleave(batch.lengths)
        hidden, weight = float64.gradients(batch.hidden[rows], batch.weight, targets, per_row)
        if dtype.itemsize > 2:
            return logps, hidden, weight, {}
        by_rounded = float64.gradients(batch.hidden[rows], batch.weight, targets, per_row, rounded=dtype)
        rounded = {
            name: _error(gradient.to(dtype), exact)
            for name, gradient, exact in zip(("hidden", "weight"), by_rounded, (hidden, weight), strict=True)
        }
        return logps, hidden, weight, rounded

    with torch.no_grad():
        (logps, hidden, weight, rounded), peak = peak_extra_bytes(compute, batch.hidden.device)
    # The exact gradients, the rounded ones, and the memory of their difference.
    held = 0 if not gradients else 1 if dtype.itemsize > 2 else 5
    allowed = float64.bound(len(rows), *batch.weight.shape, gradients=held)
    if peak > allowed:
        raise MemoryError(f"the float64 truth of {batch.workload} took {peak} bytes, more than its bound {allowed}")
    return Truth(logps, hidden, weight, rounded, peak)


def errors(exact: Truth, batch: Batch, logps: Tensor) -> dict[str, float]:
    """Return max |result − truth| / max |truth| for ``logps`` (S,) and for the gradients of the batch."""
    out = {"logps": _error(logps, exact.logps)}
    if batch.hidden.grad is not None and exact.hidden is not None:
        out["hidden"] = _error(batch.hidden.grad[batch.counted_rows], exact.hidden)
    if batch.weight.grad is not None and exact.weight is not None:
        out["weight"] = _error(batch.weight.grad, exact.weight)
    return out


def _error(result: Tensor, exact: Tensor) -> float:
    worst = (result.double() - exact).abs_().max() / exact.abs().max()
    return worst.item() if worst.isfinite() else math.inf


def wrong(error: Mapping[str, float], eager: Mapping[str, float], mode: str, dtype: torch.dtype) -> str:
    """Return why a result is wrong (a part is missing, or far worse than eager torch's), or an empty text.

    If eager torch ran out of memory, the dtype's epsilon takes the place of its error.
    """
    eps = torch.finfo(dtype).eps
    for quantity in EXPECTED[mode]:
        if quantity not in error:
            return f"no gradient of {quantity}"
        usual = eager.get(quantity, eps)
        if error[quantity] > WRONG_FACTOR * usual + eps:
            return f"error of {quantity} is {error[quantity]:.1e}, eager torch's {usual:.1e}"
    return ""
