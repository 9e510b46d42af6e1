"""Compute the standard error of a mean over samples, of which several may share a prompt."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Sequence


def standard_error(values: Sequence[float], rows: Sequence[int]) -> float | None:
    """Return the cluster-robust standard error of the mean of ``values``: values of the same row may be correlated.

    With one value a row, this is the standard deviation over √n. None if all values belong to one row.
    """
    mean = statistics.fmean(values) if values else 0.0
    sums: dict[int, float] = defaultdict(float)
    for value, row in zip(values, rows, strict=True):
        sums[row] += value - mean
    count = len(sums)
    if count < 2:
        return None
    return math.sqrt(count / (count - 1) * sum(value**2 for value in sums.values())) / len(values)
