"""Line charts and stacked areas as inline SVG, at a size that a phone shows unscaled; the page has their colours."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from hypo_train.report.html import Html, element
from hypo_train.report.numbers import short
from hypo_train.report.series import Point, Series

WIDTH, HEIGHT = 360, 200
LEFT, RIGHT, TOP, BOTTOM = 54, 8, 8, 24  # LEFT: seven characters and a gap
_CHARACTER = 7  # no digit of a tick is wider


def run_colour(number: int) -> str:
    """The class of a run's colour; the ninth run has the first one's again."""
    return f"c{number % 8}"


@dataclass(frozen=True)
class Curve:
    """A series as it is drawn."""

    series: Series
    colour: str  # a class
    kind: str = "line"  # dashed, or dots joined by a line


@dataclass(frozen=True)
class Axes:
    """From values to places in the picture; the ranges are not empty."""

    x: tuple[float, float]
    y: tuple[float, float]

    def place(self, step: float, value: float) -> tuple[float, float]:
        (x0, x1), (y0, y1) = self.x, self.y
        across, up = (step - x0) / (x1 - x0), (value - y0) / (y1 - y0)
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)


def line_chart(title: str, curves: Sequence[Curve]) -> Html:
    """Curves over the step, with a band or whiskers for their ``low`` and ``high``."""
    axes = _axes_of(curves)
    drawn = [part for curve in curves for part in (_band(axes, curve), _curve(axes, curve)) if part is not None]
    return _picture(f"{title}. {' '.join(filter(None, map(_summary, curves)))}", axes, drawn)


def stacked_chart(title: str, layers: Sequence[tuple[str, str, Sequence[float]]], steps: Sequence[float]) -> Html:
    """Areas on top of each other: (label, class, a value a step)."""
    tops = list(accumulate((values for _, _, values in layers), lambda below, own: _sums(below, own)))
    axes = _axes(steps, [0.0, *tops[-1]])
    drawn = []
    below: Sequence[float] = [0.0] * len(steps)
    for (label, colour, _), top in zip(layers, tops, strict=True):
        edge = _outline(axes, steps, top) + _outline(axes, steps, below)[::-1]
        drawn.append(element("polygon", element("title", label), points=_written(edge), class_=f"area {colour}"))
        below = top
    return _picture(title, axes, drawn)


def hover_data(curves: Sequence[Curve]) -> list[dict[str, Any]]:
    """What the page's script says of a chart under the pointer: a label, and [x, step, text] of each point."""
    axes = _axes_of(curves)
    return [
        {
            "label": curve.series.label,
            "colour": curve.colour,
            "points": [
                [round(axes.place(p.step, p.value)[0], 1), round(p.step, 1), _said(curve.series, p)]
                for p in curve.series.points
            ],
        }
        for curve in curves
    ]


def _summary(curve: Curve) -> str:
    """For those who hear a picture."""
    points = curve.series.points
    if not points:
        return ""
    first, last = points[0], points[-1]
    start = f"from {_said(curve.series, first)} in step {short(first.step)} to" if len(points) > 1 else "is"
    return f"{curve.series.label}: {start} {_said(curve.series, last)} in step {short(last.step)}."


def _said(series: Series, point: Point) -> str:
    error = f" ± {short(point.high - point.value)}" if series.has_errors and point.high > point.value else ""
    return short(point.value) + error


def _axes_of(curves: Sequence[Curve]) -> Axes:
    points = [point for curve in curves for point in curve.series.points]
    return _axes([p.step for p in points], [bound for p in points for bound in (p.low, p.high)])


def _axes(steps: Sequence[float], values: Sequence[float]) -> Axes:
    return Axes(_range(steps, margin=0.0), _range(values, margin=0.04))


def _range(values: Sequence[float], margin: float) -> tuple[float, float]:
    low, high = min(values, default=0.0), max(values, default=1.0)
    if not high > low:
        around = abs(low) * 0.5 or 0.5
        return low - around, high + around
    room = (high - low) * margin
    return low - (0 if low == 0 else room), high + room


def _band(axes: Axes, curve: Curve) -> Html | None:
    points = curve.series.points
    if not any(p.high > p.low for p in points):
        return None
    if curve.kind == "dots":
        whiskers = [(axes.place(p.step, p.low), axes.place(p.step, p.high)) for p in points]
        path = "".join(f"M{x:.1f} {y0:.1f}V{y1:.1f}" for (x, y0), (_, y1) in whiskers)
        return element("path", d=path, class_=f"whisker {curve.colour}")
    edge = [axes.place(p.step, p.high) for p in points] + [axes.place(p.step, p.low) for p in reversed(points)]
    return element("polygon", points=_written(edge), class_=f"band {curve.colour}")


def _curve(axes: Axes, curve: Curve) -> Html:
    places = [axes.place(p.step, p.value) for p in curve.series.points]
    line = element("polyline", points=_written(places), class_=f"line {curve.kind} {curve.colour}")
    if curve.kind != "dots" and len(places) > 1:
        return line
    dots = [
        element(
            "circle",
            element("title", f"{curve.series.label}, step {short(p.step)}: {_said(curve.series, p)}"),
            cx=f"{x:.1f}", cy=f"{y:.1f}", r="2.6", class_=f"dot {curve.colour}",
        )
        for p, (x, y) in zip(curve.series.points, places, strict=True)
    ]  # fmt: skip
    return element("g", line, *dots)


def _outline(axes: Axes, steps: Sequence[float], values: Sequence[float]) -> list[tuple[float, float]]:
    """A single step is as wide as the picture."""
    if len(steps) == 1:
        return [axes.place(x, values[0]) for x in axes.x]
    return [axes.place(step, value) for step, value in zip(steps, values, strict=True)]


def _sums(below: Sequence[float], own: Sequence[float]) -> list[float]:
    return [a + b for a, b in zip(below, own, strict=True)]


def _written(places: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in places)


def _picture(said: str, axes: Axes, drawn: Sequence[Html]) -> Html:
    grid, labels = [], []
    for value in _ticks(*axes.y, count=4):
        _, y = axes.place(axes.x[0], value)
        grid.append(element("line", x1=LEFT, x2=WIDTH - RIGHT, y1=f"{y:.1f}", y2=f"{y:.1f}"))
        labels.append(element("text", _tick_text(value), x=LEFT - 5, y=f"{y + 3.5:.1f}", text_anchor="end"))
    for step in _ticks(*axes.x, count=5):
        if step == int(step):
            x, _ = axes.place(step, axes.y[0])
            text = short(step)
            x = min(x, WIDTH - len(text) * _CHARACTER / 2)  # the last one ends with the picture
            labels.append(element("text", text, x=f"{x:.1f}", y=HEIGHT - 8, text_anchor="middle"))
    labels.append(element("text", "step", x=LEFT - 12, y=HEIGHT - 8, text_anchor="end"))
    return element(
        "svg",
        element("g", *grid, class_="grid"),
        *drawn,
        element("line", x1=0, x2=0, y1=TOP, y2=HEIGHT - BOTTOM, class_="pointer"),
        element("g", *labels, class_="ticks"),
        viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img", aria_label=said,
    )  # fmt: skip


def _tick_text(value: float) -> str:
    """Short enough for the margin: 1.25e-06 is 1.25e-6 there."""
    text = short(value)
    if len(text) <= 7:
        return text
    digits, exponent = f"{value:.2e}".split("e")
    return f"{float(digits):g}e{int(exponent)}"


def _ticks(low: float, high: float, count: int) -> list[float]:
    """About ``count`` round numbers between the two."""
    rough = (high - low) / count
    if not (rough > 0 and math.isfinite(rough)):
        return [low]
    power = 10.0 ** math.floor(math.log10(rough))
    size = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)
    first = math.ceil(low / size - 1e-9)
    return [i * size for i in range(first, math.floor(high / size + 1e-9) + 1)]
