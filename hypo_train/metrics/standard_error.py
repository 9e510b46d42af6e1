"""How far a mean may be off, where values that share a row (its prompt) resemble each other."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Sequence


def standard_error(values: Sequence[float], rows: Sequence[int]) -> float | None:
    """Of the mean of ``values``, where those of one row may depend on each other; None for a single row.

    With one value a row it is the standard deviation over √n.
    """
    mean = statistics.fmean(values) if values else 0.0
    sums: dict[int, float] = defaultdict(float)
    for value, row in zip(values, rows, strict=True):
        sums[row] += value - mean
    count = len(sums)
    if count < 2:
        return None
    return math.sqrt(count / (count - 1) * sum(value**2 for value in sums.values())) / len(values)
