"""Draw the pictures of the synthetic experiments: mean and standard error over the seeds."""

from __future__ import annotations

import math
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from torch import Tensor

from benchmarks.paper.counterexamples import Uncovered
from benchmarks.plots import STYLE

COLOURS = {"online RL": "#009e73", "DPO": "#d55e00", "IPO": "#cc79a7", "HyPO": "#0b3d91"}
Curves = dict[str, Tensor]  # each (points + 1, S)


def figure_2(linear: dict[str, Curves], bandit: dict[str, Curves], path: Path) -> Path:
    """Draw the paper's Figure 2 with HyPO added."""
    with plt.rc_context({**STYLE, "font.size": 11, "axes.titlesize": 12}):
        figure, axes = plt.subplots(1, 3, figsize=(13.5, 4.2), constrained_layout=True)
        for axis, shown in zip(axes, (["online RL"], ["DPO", "HyPO"]), strict=False):
            for name in shown:
                dashes = "--" if name == "HyPO" else "-"
                _band(axis, linear[name]["best"], COLOURS[name], dashes, f"{name}: the best response")
                _band(axis, linear[name]["preferred"], _pale(COLOURS[name]), dashes, f"{name}: preferred ones")
            axis.set(
                title=f"{shown[0]}, linear features", xlabel="share of the training", ylabel="log-probability, nats"
            )
            axis.legend(frameon=False, fontsize=9, loc="center right", bbox_to_anchor=(1.0, 0.6))
        for name, curves in bandit.items():
            method, parametrisation = name.split(", ")
            dashes = "-" if parametrisation == "weights" else ":"
            _band(axes[2], curves["outside"], COLOURS[method], dashes, f"{method}, {parametrisation}")
        axes[2].axhline(1.0, color="#9a9a9a", linewidth=1)
        axes[2].set(title="no features: responses outside the data", xlabel="share of the training")
        axes[2].set_ylabel("mean probability over the reference's")
        axes[2].legend(frameon=False, fontsize=9, loc="center right", bbox_to_anchor=(1.0, 0.35))
        figure.savefig(path)
        plt.close(figure)
    return path


def counterexamples(found: Uncovered, path: Path) -> Path:
    """Draw the reverse KL over the reference's mass on the response that the data does not cover."""
    with plt.rc_context({**STYLE, "font.size": 11, "axes.titlesize": 12}):
        figure, axis = plt.subplots(figsize=(6.4, 4.2), constrained_layout=True)
        decades = (-found.epsilons.log() / math.log(10)).tolist()
        for name, label, marker, size in (("dpo", "DPO", "o", 13), ("ipo", "IPO", "s", 6), ("hypo", "HyPO", "D", 6)):
            axis.plot(
                decades, found.kl[name].tolist(), color=COLOURS[label], marker=marker, markersize=size, label=label
            )
        axis.plot(decades, found.kl_bound.tolist(), color="#9a9a9a", linestyle="--", label="bound on HyPO's")
        axis.set(
            title="Policies with the least loss there is",
            xlabel="the reference's mass on the third response: 10 to the minus",
            ylabel="reverse KL, nats",
        )
        axis.legend(frameon=False)
        figure.savefig(path)
        plt.close(figure)
    return path


def _band(axis: Axes, curve: Tensor, colour: str | tuple[float, float, float], dashes: str, label: str) -> None:
    """Draw the mean over seeds of a curve (points, S), and one standard error on both sides."""
    mean, error = curve.mean(1), curve.std(1) / math.sqrt(curve.shape[1])
    share = [i / (len(curve) - 1) for i in range(len(curve))]
    axis.plot(share, mean, color=colour, linestyle=dashes, linewidth=1.8, label=label)
    axis.fill_between(share, mean - error, mean + error, color=colour, alpha=0.2, linewidth=0)


def _pale(colour: str) -> tuple[float, float, float]:
    red, green, blue = matplotlib.colors.to_rgb(colour)
    return (0.45 + 0.55 * red, 0.45 + 0.55 * green, 0.45 + 0.55 * blue)
