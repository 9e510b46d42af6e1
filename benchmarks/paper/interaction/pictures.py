"""The pictures of the experiment, from its recorded numbers."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from benchmarks.paper.interaction.experiment import AT_THE_SAME_BETA
from benchmarks.paper.interaction.methods import SWEEPS
from benchmarks.paper.interaction.report import RULE_NAMES, Record, lead, selected
from benchmarks.paper.interaction.selection import BUDGETS, HEADLINE, RULES
from benchmarks.paper.interaction.world import EPSILONS
from benchmarks.plots import STYLE

COLOURS = {
    "DPO": "#d55e00", "IPO": "#cc79a7", "DPO + NLL": "#e69f00", "χPO": "#56b4e9", "HyPO": "#0b3d91", "RLOO": "#009e73",
}  # fmt: skip
MARKERS = dict(zip(COLOURS, "osDvXP", strict=True))


def draw(record: Record, folder: Path) -> list[Path]:
    """Draw all pictures into ``folder`` and return their paths."""
    with plt.rc_context({**STYLE, "font.size": 11, "axes.titlesize": 12}):
        drawn = [
            _interaction(record, folder / "interaction.png"),
            _frontiers(record, folder / "interaction_frontier.png"),
            _curves(record, folder / "interaction_curves.png"),
        ]
    return drawn


def _interaction(record: Record, path: Path) -> Path:
    """Draw the lead of HyPO over DPO against ε, a panel for each rule of selection and kind of extrapolation."""
    figure, axes = plt.subplots(2, 3, figsize=(12, 6.6), sharex=True, sharey=True, constrained_layout=True)
    for row, extrapolation in zip(axes, ("misleading", "right"), strict=True):
        for axis, rule in zip(row, RULES, strict=True):
            for pairs, colour, marker in (("silent", "#0b3d91", "o"), ("covering", "#9a9a9a", "s")):
                values = [lead(record, f"{pairs}, {extrapolation}, {e:g}", HEADLINE, rule) for e in EPSILONS]
                _errorbar(axis, EPSILONS, values, colour, marker, f"{pairs} pairs")
            axis.axhline(0, color="#555555", linewidth=1)
            axis.set(xscale="log", title=f"extrapolation {'misleads' if extrapolation == 'misleading' else 'is right'}")
            axis.set_title(f"{axis.get_title(loc='left')}; {RULE_NAMES[rule]}")
    for axis in axes[:, 0]:
        axis.set_ylabel("HyPO's true reward minus DPO's")
    for axis in axes[1]:
        axis.set_xlabel("reference's mass ε on uncovered responses")
    axes[0, 0].legend(frameon=False)
    return _save(figure, path)


def _frontiers(record: Record, path: Path) -> Path:
    """Draw true reward against the KL budget, a panel for each world with ε 0.01."""
    figure, axes = plt.subplots(2, 2, figsize=(11, 8), sharex=True, constrained_layout=True)
    for row, extrapolation in zip(axes, ("misleading", "right"), strict=True):
        for axis, pairs in zip(row, ("silent", "covering"), strict=True):
            world = f"{pairs}, {extrapolation}, 0.01"
            for method in SWEEPS:
                values = [selected(record, world, method, budget) for budget in BUDGETS]
                _errorbar(axis, BUDGETS, values, COLOURS[method], MARKERS[method], method)
            axis.set_title(
                f"{pairs} pairs, extrapolation {'misleads' if extrapolation == 'misleading' else 'is right'}"
            )
        row[0].set_ylabel("true reward")
        row[0].sharey(row[1])
    for axis in axes[1]:
        axis.set_xlabel("held-out reverse KL at most, nats")
    axes[0, 0].legend(frameon=False)
    return _save(figure, path)


def _curves(record: Record, path: Path) -> Path:
    """Draw reward, KL and uncovered mass over training, at one β, under silent and under covering pairs."""
    figure, axes = plt.subplots(2, 3, figsize=(12, 6.6), sharex=True, sharey="col", constrained_layout=True)
    titles = {"reward": "true reward", "kl": "reverse KL, nats", "uncovered": "uncovered mass"}
    for row, pairs in zip(axes, ("silent", "covering"), strict=True):
        methods = record["worlds"][f"{pairs}, misleading, 0.01"]["methods"]
        for axis, (metric, title) in zip(row, titles.items(), strict=True):
            for name in AT_THE_SAME_BETA:
                method = name.split(" β")[0]
                curve = methods[method]["curves"][name][metric]
                axis.errorbar(
                    record["checkpoints"], curve["mean"], curve["error"], color=COLOURS[method],
                    marker=MARKERS[method], markersize=5, linewidth=1.6, label=name,
                )  # fmt: skip
            axis.set_title(f"{title}; {pairs} pairs")
    for axis in axes[1]:
        axis.set_xlabel("steps")
    axes[0, 1].legend(frameon=False, fontsize=9)
    return _save(figure, path)


def _errorbar(
    axis: Axes, x: Sequence[float], values: Sequence[Sequence[float]], colour: str, marker: str, label: str
) -> None:
    means = [statistics.fmean(v) for v in values]
    errors = [statistics.stdev(v) / len(v) ** 0.5 for v in values]
    axis.errorbar(x, means, errors, color=colour, marker=marker, markersize=6, linewidth=1.8, capsize=3, label=label)


def _save(figure: plt.Figure, path: Path) -> Path:
    figure.savefig(path, metadata={"Software": None})
    plt.close(figure)
    return path
