"""The charts of a report: the metrics in each chart, and its caption."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hypo_train.metrics.timing import OTHER, PHASES
from hypo_train.report.charts import Chart, Curve, line_chart, stacked_chart
from hypo_train.report.runs import RecordedRun
from hypo_train.report.series import read_series
from hypo_train.report.text import first_of


@dataclass(frozen=True)
class Panel:
    """The metrics of one chart. Values from evaluations are dots; the second metric is a dashed line."""

    title: str
    metrics: tuple[tuple[str, str], ...]  # (metric, its label in the legend)
    algorithm: str | None = None  # show only runs of this algorithm; None: all runs

    def shows(self, run: RecordedRun) -> bool:
        only = self.algorithm
        return only is None or only == run.algorithm


LEARNING = (
    Panel("Reward accuracy", (("rewards/accuracies", ""), ("accuracy", ""))),
    Panel("Reward margin", (("rewards/margins", ""), ("margin", ""))),
    Panel("Reverse KL to the reference, nats a response", (("kl", ""),)),
    Panel("Reward of samples", (("reward", ""),)),
    Panel("Implicit rewards", (("rewards/chosen", "chosen"), ("rewards/rejected", "rejected"))),
    Panel("Log-probs", (("logps/chosen", "chosen"), ("logps/rejected", "rejected"))),
    Panel("Tokens of a sample", (("completions/mean_length", ""),)),
    Panel("Fraction of samples cut off", (("completions/clipped_ratio", ""),)),
    Panel("Gradient norm", (("grad_norm", ""),)),
    Panel("Learning rate", (("learning_rate", ""),)),
)
COSTS = (
    Panel("Tokens a second", (("tokens_per_second", ""),)),
    Panel("Peak memory, GiB", (("memory/peak_gb", "allocated"), ("memory/reserved_gb", "reserved"))),
    Panel("Fraction of the device's peak FLOP/s (MFU)", (("mfu", ""),)),
    Panel("Model TFLOP a second", (("tflops_per_second", ""),)),
)
_NO_CURVE = {"step", "epoch", "time/step", "loss"}  # the loss has separate panels


def run_colour(number: int) -> str:
    """Return the CSS class of a run's colour; the ninth run has the colour of the first."""
    return f"c{number % 8}"


def learning_charts(runs: Sequence[RecordedRun]) -> list[Chart]:
    """Return charts of the loss, of rewards, KL, log-probs and samples."""
    return _charts((*_loss_panels(runs), *LEARNING), runs)


def cost_charts(runs: Sequence[RecordedRun]) -> list[Chart]:
    """Return charts of each run's time by phase, and of throughput and memory."""
    return [chart for run in runs for chart in _phases(run, len(runs) > 1)] + _charts(COSTS, runs)


def other_charts(runs: Sequence[RecordedRun]) -> list[Chart]:
    """Return one chart for each metric that no other chart shows."""
    shown = {metric for panel in (*LEARNING, *COSTS) for metric, _ in panel.metrics} | _NO_CURVE
    logged = dict.fromkeys(name for run in runs for line in run.lines for name in line)
    names = dict.fromkeys(name.removeprefix("eval_") for name in logged if not name.endswith("_se"))
    panels = [Panel(name, ((name, ""),)) for name in names if name not in shown and not name.startswith("time/")]
    return _charts(panels, runs)


def _loss_panels(runs: Sequence[RecordedRun]) -> list[Panel]:
    """Return one panel for each algorithm: losses of different algorithms have different terms."""
    algorithms = dict.fromkeys(run.algorithm for run in runs)
    methods = {run.algorithm: f" of {run.method}" if len(algorithms) > 1 else "" for run in runs}
    terms = {run.algorithm: ", KL term included" if run.loss_has_kl_term else "" for run in runs}
    return [Panel(f"Loss{methods[name]}{terms[name]}", (("loss", ""),), name) for name in algorithms]


def _charts(panels: Sequence[Panel], runs: Sequence[RecordedRun]) -> list[Chart]:
    return [chart for panel in panels if (chart := _chart(panel, runs)) is not None]


def _chart(panel: Panel, runs: Sequence[RecordedRun]) -> Chart | None:
    curves = [
        curve
        for number, run in enumerate(runs)
        if panel.shows(run)
        for curve in _curves(panel, run, number, len(runs) > 1)
    ]
    return line_chart(panel.title, curves, _legend(curves), _notes(curves)) if curves else None


def _curves(panel: Panel, run: RecordedRun, number: int, among_others: bool) -> list[Curve]:
    curves = []
    logged = [(m, part) for m, part in panel.metrics if any(m in line or f"eval_{m}" in line for line in run.lines)]
    for place, (metric, part) in enumerate(logged):
        colour = run_colour(number if among_others else place)
        for lines, name, kind in (
            (run.trained, metric, "dashed" if place else "line"),
            (run.evaluated, f"eval_{metric}", "dots"),
        ):
            parts = [run.name if among_others else "", part, "evaluation" if kind == "dots" else ""]
            label = ", ".join(filter(None, parts)) or "training"
            # With several runs, the bands of ranges would hide other curves.
            series = read_series(label, lines, name, spread=not among_others)
            if series is not None:
                curves.append(Curve(series, colour, kind))
    return curves


def _phases(run: RecordedRun, among_others: bool) -> list[Chart]:
    """Return a stacked chart of the seconds of a step by phase, in a list that is empty if no phase was logged."""
    logged = {phase: read_series(phase, run.trained, f"time/{phase}") for phase in (*PHASES, OTHER)}
    points = {phase: series.points for phase, series in logged.items() if series is not None and series.points}
    if not points:
        return []
    steps = [point.step for point in max(points.values(), key=len)]
    layers = []
    for place, phase in enumerate((*PHASES, OTHER)):
        if phase in points:
            values = {point.step: point.value for point in points[phase]}
            layers.append((phase, f"p{place}", [values.get(step, 0.0) for step in steps]))
    title = "Seconds a step, by phase" + (f": {run.name}" if among_others else "")
    return [stacked_chart(title, layers, steps)]


def _legend(curves: Sequence[Curve]) -> list[tuple[str, str]]:
    """Return (CSS classes, label) of each curve; with several lines, a note explains the dots."""
    lines = [curve for curve in curves if curve.kind != "dots"]
    if len(curves) == 1:
        return []
    only_dots = [curve for curve in curves if curve.colour not in {line.colour for line in lines}]
    shown = [*lines, *only_dots] if len(lines) > 1 else curves
    return [(f"{curve.kind} {curve.colour}", curve.series.label) for curve in shown]


def _notes(curves: Sequence[Curve]) -> str:
    notes = []
    if sum(curve.kind != "dots" for curve in curves) > 1 and any(curve.kind == "dots" for curve in curves):
        notes.append("Dots: evaluations.")
    if any(curve.series.has_errors for curve in curves):
        bands = any(point.high > point.low for curve in curves if curve.kind != "dots" for point in curve.series.points)
        notes.append(f"{'Bands and bars' if bands else 'Bars'}: one standard error.")
    means = max(curve.series.per_point for curve in curves)
    if means > 1:
        points = [point for curve in curves if not curve.series.has_errors for point in curve.series.points]
        spread = "; bands: smallest to largest" if any(point.high > point.low for point in points) else ""
        notes.append(f"Each point is the mean of {means} logged values{spread}.")
    series = [curve.series for curve in curves if curve.series.not_finite]
    notes += [f"{one.label}: not finite in step {first_of(one.not_finite)}." for one in series]
    return " ".join(notes)
