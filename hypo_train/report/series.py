"""Read the values of a metric over the steps, averaged to a number of points that a chart can show."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeGuard

MOST_POINTS = 150
_LARGEST = 1e100  # the sums and squares of values below this are finite


class Point(NamedTuple):
    """A value at a step, with bounds: one standard error, the range of the averaged values, or the value itself."""

    step: float
    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Series:
    """The finite values of a metric."""

    label: str
    points: list[Point]
    per_point: int  # number of logged values that a point is the mean of
    has_errors: bool  # ``low`` and ``high`` are one standard error away
    not_finite: list[int]  # steps with values that are left out


def read_series(label: str, lines: Sequence[dict[str, Any]], metric: str, *, spread: bool = True) -> Series | None:
    """Return the series of ``metric``, or None if no line holds it.

    Bounds are one ``<metric>_se`` away if the lines hold it. Otherwise, with ``spread``, they are the minimum and the
    maximum of the values of a point.
    """
    logged = [line for line in lines if is_number(line.get(metric))]
    if not logged:
        return None
    finite = [line for line in logged if abs(line[metric]) < _LARGEST]
    not_finite = [line["step"] for line in logged if not abs(line[metric]) < _LARGEST]
    per_point = max(1, math.ceil(len(finite) / MOST_POINTS))
    has_errors = any(f"{metric}_se" in line for line in finite)
    groups = [finite[i : i + per_point] for i in range(0, len(finite), per_point)]
    points = [_point(group, metric, has_errors=has_errors, spread=spread) for group in groups]
    return Series(label, points, per_point, has_errors, not_finite)


def last(lines: Sequence[dict[str, Any]], metric: str) -> float | None:
    """Return the newest value of a metric, or None."""
    return next((line[metric] for line in reversed(lines) if is_number(line.get(metric))), None)


def is_number(value: Any) -> TypeGuard[float]:
    """Return whether ``value`` is a number. A bool is not, although Python's bool is an int."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _point(group: Sequence[dict[str, Any]], metric: str, *, has_errors: bool, spread: bool) -> Point:
    values = [line[metric] for line in group]
    mean = math.fsum(values) / len(values)
    step = group[0]["step"] if len(group) == 1 else math.fsum(line["step"] for line in group) / len(group)
    if not has_errors:
        return Point(step, mean, min(values), max(values)) if spread else Point(step, mean, mean, mean)
    error = math.sqrt(math.fsum(_error(line.get(f"{metric}_se")) ** 2 for line in group)) / len(group)
    return Point(step, mean, mean - error, mean + error)


def _error(value: Any) -> float:
    return float(value) if is_number(value) and abs(value) < _LARGEST else 0.0
