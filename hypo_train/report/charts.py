"""Compute the shapes of line charts and stacked areas. The template writes them as SVG; colours are in the style sheet.

matplotlib's SVG is eight times as large and takes 0.07 seconds a chart. Its colours and inline styles do not follow
dark mode, and the page's content security policy blocks them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from hypo_train.report.series import Point, Series
from hypo_train.report.text import plain, short

WIDTH, HEIGHT = 360, 200  # fits a phone without scaling
LEFT, RIGHT, TOP, BOTTOM = 54, 8, 8, 24  # margins; the left one holds seven characters
_CHARACTER = 7  # the width of a tick's widest digit


@dataclass(frozen=True)
class Curve:
    """A series, the CSS class of its colour, and how it is drawn: "line", "dashed" or "dots"."""

    series: Series
    colour: str
    kind: str = "line"


@dataclass(frozen=True)
class Shape:
    """An SVG element with its CSS classes, its attributes and its tooltip."""

    tag: str
    css: str
    attributes: dict[str, Any]
    tooltip: str | None = None


@dataclass(frozen=True)
class Axes:
    """The ranges of a chart's two axes. A range has a positive length."""

    x: tuple[float, float]
    y: tuple[float, float]

    def place(self, step: float, value: float) -> tuple[float, float]:
        """Return the coordinates (x, y) of a value."""
        (x0, x1), (y0, y1) = self.x, self.y
        across, up = (step - x0) / (x1 - x0), (value - y0) / (y1 - y0)
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)

    def y_ticks(self) -> list[tuple[float, str]]:
        """Return the position and the text of each tick of the vertical axis."""
        return [(round(self.place(0, value)[1], 1), _tick_text(value)) for value in _ticks(*self.y, count=4)]

    def x_ticks(self) -> list[tuple[float, str]]:
        """Return the position and the text of each tick of the horizontal axis. The last text is right-aligned."""
        steps = [step for step in _ticks(*self.x, count=5) if step == int(step)]
        ends = [(self.place(step, 0)[0], short(step)) for step in steps]
        return [(round(min(x, WIDTH - len(text) * _CHARACTER / 2), 1), text) for x, text in ends]


@dataclass(frozen=True)
class Chart:
    """A chart with its caption. It has no axes and shapes if no value is finite."""

    title: str
    description: str = ""  # description for screen readers
    axes: Axes | None = None
    shapes: list[Shape] = field(default_factory=list)
    legend: list[tuple[str, str]] = field(default_factory=list)  # (CSS classes, label)
    notes: str = ""
    hover: list[dict[str, Any]] | None = None  # values that the page's script shows under the pointer


def line_chart(title: str, curves: Sequence[Curve], legend: list[tuple[str, str]], notes: str) -> Chart:
    """Return a chart of curves over the step, with a band or error bars for their ``low`` and ``high``."""
    points = [point for curve in curves for point in curve.series.points]
    if not points:
        return Chart(title, notes=notes)
    bounds = [bound for point in points for bound in (point.low, point.high)]
    axes = Axes(_range([point.step for point in points], margin=0.0), _range(bounds, margin=0.04))
    shapes = [shape for curve in curves for shape in (*_bounds(axes, curve), *_line(axes, curve))]
    description = f"{title}. {' '.join(_summary(curve.series) for curve in curves if curve.series.points)}"
    return Chart(title, description, axes, shapes, legend, notes, [_hover(axes, curve) for curve in curves])


def stacked_chart(title: str, layers: Sequence[tuple[str, str, Sequence[float]]], steps: Sequence[float]) -> Chart:
    """Return a chart of stacked areas; a layer is (label, CSS class of its colour, a value for each step)."""
    total = sum(sum(values) for _, _, values in layers) or 1.0
    legend = [(colour, f"{label} {sum(values) / total:.0%}") for label, colour, values in layers]
    tops = [[0.0] * len(steps)]
    for _, _, values in layers:
        tops.append([below + value for below, value in zip(tops[-1], values, strict=True)])
    axes = Axes(_range(steps, margin=0.0), _range([0.0, *tops[-1]], margin=0.04))
    edges = [_outline(axes, steps, top) + _outline(axes, steps, below)[::-1] for below, top in pairwise(tops)]
    shapes = [
        Shape("polygon", f"area {colour}", {"points": _written(edge)}, label)
        for (label, colour, _), edge in zip(layers, edges, strict=True)
    ]
    return Chart(title, title, axes, shapes, legend)


def _hover(axes: Axes, curve: Curve) -> dict[str, Any]:
    """Return a curve's label, and [x, step, text] of each of its points."""
    series = curve.series
    places = [[round(axes.place(p.step, p.value)[0], 1), round(p.step, 1), _text(series, p)] for p in series.points]
    return {"label": plain(series.label), "points": places}


def _summary(series: Series) -> str:
    first, last = series.points[0], series.points[-1]
    start = f"from {_text(series, first)} in step {short(first.step)} to" if len(series.points) > 1 else "is"
    return f"{series.label}: {start} {_text(series, last)} in step {short(last.step)}."


def _text(series: Series, point: Point) -> str:
    error = f" ± {short(point.high - point.value)}" if series.has_errors and point.high > point.value else ""
    return short(point.value) + error


def _range(values: Sequence[float], margin: float) -> tuple[float, float]:
    low, high = min(values), max(values)
    if not high > low:
        if margin and low:  # a constant series starts at 0, so that an accuracy of 1 has no ticks above 1
            return min(low * (1 + margin), 0.0), max(low * (1 + margin), 0.0)
        around = abs(low) * 0.5 or 0.5
        return low - around, high + around
    room = (high - low) * margin
    return low - (0 if low == 0 else room), high + room


def _bounds(axes: Axes, curve: Curve) -> list[Shape]:
    points = curve.series.points
    if not any(p.high > p.low for p in points):
        return []
    high = [axes.place(p.step, p.high) for p in points]
    low = [axes.place(p.step, p.low) for p in points]
    if curve.kind == "dots":
        bars = "".join(f"M{x:.1f} {y0:.1f}V{y1:.1f}" for (x, y0), (_, y1) in zip(low, high, strict=True))
        return [Shape("path", f"whisker {curve.colour}", {"d": bars})]
    return [Shape("polygon", f"band {curve.colour}", {"points": _written(high + low[::-1])})]


def _line(axes: Axes, curve: Curve) -> list[Shape]:
    series = curve.series
    places = [axes.place(p.step, p.value) for p in series.points]
    line = Shape("polyline", f"line {curve.kind} {curve.colour}", {"points": _written(places)})
    if curve.kind != "dots" and len(places) > 1:
        return [line]
    dots = [
        Shape(
            "circle",
            f"dot {curve.colour}",
            {"cx": f"{x:.1f}", "cy": f"{y:.1f}", "r": 2.6},
            f"{series.label}, step {short(p.step)}: {_text(series, p)}",
        )
        for p, (x, y) in zip(series.points, places, strict=True)
    ]
    return [line, *dots]


def _outline(axes: Axes, steps: Sequence[float], values: Sequence[float]) -> list[tuple[float, float]]:
    """Return the coordinates of ``values``. A single step gets the full width."""
    if len(steps) == 1:
        return [axes.place(x, values[0]) for x in axes.x]
    return [axes.place(step, value) for step, value in zip(steps, values, strict=True)]


def _written(places: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in places)


def _tick_text(value: float) -> str:
    """Return a number as at most seven characters: 1.25e-06 becomes 1.25e-6."""
    text = short(value)
    if len(text) <= 7:
        return text
    digits, exponent = f"{value:.2e}".split("e")
    return f"{float(digits):g}e{int(exponent)}"


def _ticks(low: float, high: float, count: int) -> list[float]:
    """Return about ``count`` round numbers between ``low`` and ``high``."""
    rough = (high - low) / count
    if not (rough > 0 and math.isfinite(rough)):
        return [low]
    power = 10.0 ** math.floor(math.log10(rough))
    size = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)
    first = math.ceil(low / size - 1e-9)
    return [i * size for i in range(first, math.floor(high / size + 1e-9) + 1)]
