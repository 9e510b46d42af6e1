"""Draw the pictures of the small experiments."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from benchmarks.paper.pictures import COLOURS as SYNTHETIC
from benchmarks.paper.small.arms import FRONTIERS, METHODS
from benchmarks.paper.small.outcome import Outcome
from benchmarks.plots import STYLE

Outcomes = dict[str, list[Outcome]]
COLOURS = {**SYNTHETIC, "RLOO": SYNTHETIC["online RL"]}
MARKERS = {"DPO": "o", "IPO": "s", "RLOO": "^", "HyPO": "D"}


def figure_1(found: Outcomes, path: Path) -> Path:
    """Draw reverse KL and true reward over the epochs: mean and standard error over seeds, a thin line per seed."""
    with plt.rc_context({**STYLE, "font.size": 11, "axes.titlesize": 12}):
        figure, axes = plt.subplots(1, 2, figsize=(10, 4), constrained_layout=True)
        for label, arm in METHODS.items():
            for axis, attribute in zip(axes, ("kl", "reward"), strict=True):
                _curve(axis, found[arm.name], attribute, label)
        axes[0].set(title="reverse KL to SFT, nats a response", xlabel="epochs", ylim=(0, None))
        axes[1].set(title="true reward", xlabel="epochs")
        axes[0].legend(frameon=False)
        figure.savefig(path)
        plt.close(figure)
    return path


def _curve(axis: Axes, seeds: Sequence[Outcome], attribute: str, label: str) -> None:
    epochs = [e.epoch for e in seeds[0].evaluations]
    values = [[getattr(e, attribute) for e in outcome.evaluations] for outcome in seeds]
    for one in values if len(values) > 1 else []:
        axis.plot(epochs, one, color=COLOURS[label], alpha=0.3, linewidth=0.8)
    means = [statistics.fmean(column) for column in zip(*values, strict=True)]
    axis.plot(epochs, means, color=COLOURS[label], linewidth=2, marker=MARKERS[label], markersize=4, label=label)


def frontier(found: Outcomes, path: Path) -> Path:
    """Draw true reward over reverse KL at the end of training: a line per method, a point per weight of the KL."""
    with plt.rc_context({**STYLE, "font.size": 11, "axes.titlesize": 12}):
        figure, axis = plt.subplots(figsize=(7, 4.8), constrained_layout=True)
        for method, points in FRONTIERS.items():
            kls, rewards = [], []
            for label, arm in points.items():
                kl = [outcome.last.kl for outcome in found[arm.name]]
                reward = [outcome.last.reward for outcome in found[arm.name]]
                kls.append(statistics.fmean(kl))
                rewards.append(statistics.fmean(reward))
                axis.errorbar(
                    kls[-1], rewards[-1], xerr=_error(kl), yerr=_error(reward), color=COLOURS[method], linewidth=1
                )
                left = method == "HyPO"  # of its point, as the others' are on the right
                axis.annotate(
                    label,
                    (kls[-1], rewards[-1]),
                    xytext=(-7, 3) if left else (6, -11),
                    textcoords="offset points",
                    ha="right" if left else "left",
                    fontsize=8,
                )
            axis.plot(kls, rewards, color=COLOURS[method], marker=MARKERS[method], label=method)
        axis.set(
            title="up and to the left is better", xlabel="reverse KL to SFT, nats a response", ylabel="true reward"
        )
        axis.set_xlim(left=0)
        axis.legend(frameon=False, loc="lower right")
        figure.savefig(path)
        plt.close(figure)
    return path


def _error(values: Sequence[float]) -> float:
    return statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
