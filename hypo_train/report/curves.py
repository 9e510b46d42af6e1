"""The page's curves: which metrics share a picture, and what is said below it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hypo_train.metrics.timing import OTHER, PHASES
from hypo_train.report.charts import Curve, hover_data, line_chart, run_colour, stacked_chart
from hypo_train.report.html import Html, element, foreign, join
from hypo_train.report.runs import RecordedRun
from hypo_train.report.series import Series, series


@dataclass(frozen=True)
class Panel:
    """Metrics in one picture, each with its evaluation's value where there is one; the second one is dashed."""

    title: str
    metrics: tuple[tuple[str, str], ...]  # name -> what it is of, in the legend


LEARNING = (
    Panel("Loss", (("loss", ""),)),
    Panel("Reward accuracy", (("rewards/accuracies", ""), ("accuracy", ""))),
    Panel("Reward margin", (("rewards/margins", ""), ("margin", ""))),
    Panel("Reverse KL to the reference, nats a response", (("kl", ""),)),
    Panel("Reward of samples", (("reward", ""),)),
    Panel("Implicit rewards", (("rewards/chosen", "chosen"), ("rewards/rejected", "rejected"))),
    Panel("Log-probs", (("logps/chosen", "chosen"), ("logps/rejected", "rejected"))),
    Panel("Tokens of a sample", (("completions/mean_length", ""),)),
    Panel("Share of samples cut off", (("completions/clipped_ratio", ""),)),
    Panel("Gradient norm", (("grad_norm", ""),)),
    Panel("Learning rate", (("learning_rate", ""),)),
)
COSTS = (
    Panel("Tokens a second", (("tokens_per_second", ""),)),
    Panel("Peak memory, GiB", (("memory/peak_gb", "allocated"), ("memory/reserved_gb", "reserved"))),
    Panel("Share of the device's peak FLOP/s (MFU)", (("mfu", ""),)),
    Panel("Model TFLOP a second", (("tflops_per_second", ""),)),
)
_NO_CURVE = {"step", "epoch", "time/step"}


class Charts:
    """Pictures as they are drawn, and what a script tells of them under the pointer."""

    def __init__(self, runs: Sequence[RecordedRun]) -> None:
        self._runs = runs
        self.hover: dict[str, Any] = {}

    def learning(self) -> Html | None:
        return self._grid([self._panel(panel) for panel in LEARNING])

    def costs(self) -> Html | None:
        return self._grid([*(self._phases(run) for run in self._runs), *(self._panel(panel) for panel in COSTS)])

    def others(self) -> Html | None:
        """Every metric that no other picture has."""
        drawn = {metric for panel in (*LEARNING, *COSTS) for metric, _ in panel.metrics}
        logged = dict.fromkeys(name for run in self._runs for line in run.lines for name in line)
        names = dict.fromkeys(name.removeprefix("eval_") for name in logged if not name.endswith("_se"))
        left = [name for name in names if name not in drawn | _NO_CURVE and not name.startswith("time/")]
        return self._grid([self._panel(Panel(name, ((name, ""),))) for name in left])

    def _grid(self, figures: Sequence[Html | None]) -> Html | None:
        drawn = [figure for figure in figures if figure is not None]
        return element("div", *drawn, class_="charts") if drawn else None

    def _panel(self, panel: Panel) -> Html | None:
        curves = [curve for number, run in enumerate(self._runs) for curve in self._curves(panel, number, run)]
        if not any(curve.series.points for curve in curves):
            return _never_finite(panel.title, curves)
        name = f"chart-{len(self.hover)}"
        self.hover[name] = hover_data(curves)
        legend = _legend(curves) if len(curves) > 1 else None
        return element(
            "figure",
            element("h3", panel.title),
            line_chart(panel.title, curves),
            element("p", class_="readout", aria_live="off"),
            element("figcaption", legend, _notes(curves)),
            data_chart=name,
        )

    def _curves(self, panel: Panel, number: int, run: RecordedRun) -> list[Curve]:
        curves = []
        found = [(metric, of) for metric, of in panel.metrics if any(_logs(run, metric))]
        for place, (metric, of) in enumerate(found):
            colour = run_colour(number if len(self._runs) > 1 else place)
            kind = "dashed" if place else "line"
            for lines, name, part in ((run.trained, metric, ""), (run.evaluated, f"eval_{metric}", "evaluation")):
                label = ", ".join(filter(None, [run.name if len(self._runs) > 1 else "", of, part])) or "training"
                # Smallest to largest of several runs would cover each other's curves, and squeeze them all.
                drawn = series(label, lines, name, spread=len(self._runs) == 1)
                if drawn is not None:
                    curves.append(Curve(drawn, colour, "dots" if part else kind))
        return curves

    def _phases(self, run: RecordedRun) -> Html | None:
        """Seconds of a step, phase on phase."""
        title = "Seconds a step, by phase" + (f": {run.name}" if len(self._runs) > 1 else "")
        found = {phase: series(phase, run.trained, f"time/{phase}") for phase in (*PHASES, OTHER)}
        phases = {phase: drawn for phase, drawn in found.items() if drawn is not None and drawn.points}
        if not phases:
            return None
        longest = max(phases.values(), key=lambda drawn: len(drawn.points))
        steps = [point.step for point in longest.points]
        layers = [
            (phase, f"p{place}", _values_at(steps, phases[phase]))
            for place, phase in enumerate((*PHASES, OTHER))
            if phase in phases
        ]
        totals = {phase: sum(values) / len(steps) for phase, _, values in layers}
        whole = sum(totals.values()) or 1.0
        legend = element(
            "ul",
            *(
                element("li", element("span", class_=f"swatch {colour}"), f"{phase} {totals[phase] / whole:.0%}")
                for phase, colour, _ in layers
            ),
            class_="legend",
        )
        return element(
            "figure", foreign(title, "h3"), stacked_chart(title, layers, steps), element("figcaption", legend)
        )


def _logs(run: RecordedRun, metric: str) -> list[dict[str, Any]]:
    return [line for line in run.lines if metric in line or f"eval_{metric}" in line]


def _values_at(steps: Sequence[float], phase: Series) -> list[float]:
    """A phase that did not run in some steps took no time there."""
    known = {point.step: point.value for point in phase.points}
    return [known.get(step, 0.0) for step in steps]


def _legend(curves: Sequence[Curve]) -> Html:
    """Among several runs, dots are said to be evaluations once, below."""
    lines = [curve for curve in curves if curve.kind != "dots"]
    shown = lines + [curve for curve in curves if curve.colour not in {line.colour for line in lines}]
    items = [
        element("li", element("span", class_=f"swatch {curve.kind} {curve.colour}"), element("bdi", curve.series.label))
        for curve in (shown if len(lines) > 1 else curves)
    ]
    return element("ul", *items, class_="legend")


def _notes(curves: Sequence[Curve]) -> Html | None:
    """What a reader has to know to read the curves."""
    notes = []
    if sum(curve.kind != "dots" for curve in curves) > 1 and any(curve.kind == "dots" for curve in curves):
        notes.append("Dots: evaluations.")
    if any(curve.series.has_errors for curve in curves):
        bands = any(point.high > point.low for curve in curves if curve.kind != "dots" for point in curve.series.points)
        notes.append(f"{'Bands and bars' if bands else 'Bars'}: one standard error.")
    means = max((curve.series.per_point for curve in curves), default=1)
    if means > 1:
        points = [point for curve in curves if not curve.series.has_errors for point in curve.series.points]
        spread = "; bands: smallest to largest" if any(point.high > point.low for point in points) else ""
        notes.append(f"Each point is the mean of {means} logged values{spread}.")
    notes += [_left_out(curve) for curve in curves if curve.series.not_finite]
    return element("p", " ".join(notes)) if notes else None


def _left_out(curve: Curve) -> str:
    steps = curve.series.not_finite
    named = ", ".join(map(str, steps[:5])) + (" …" if len(steps) > 5 else "")
    return f"{curve.series.label}: not finite in step {named}."


def _never_finite(title: str, curves: Sequence[Curve]) -> Html | None:
    if not curves:
        return None
    return element("figure", element("h3", title), element("figcaption", join([_notes(curves)])))
