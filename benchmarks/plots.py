"""Draw the pictures of a sweep: ``python -m benchmarks.plots SWEEP.json`` writes them beside the numbers."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from benchmarks.providers import GEMMS

OURS_COLOUR, GEMMS_COLOUR = "#0b3d91", "#9a9a9a"
# Okabe and Ito's palette, which colour-blind readers can tell apart, in the order of the peers.
PEER_COLOURS = ("#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
PEER_MARKERS = ("s", "^", "D", "v", "P", "X")
STYLE: dict[Any, Any] = {
    "font.size": 13,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "axes.titlelocation": "left",
    "axes.titlesize": 13,
    "figure.dpi": 150,
    "figure.figsize": (6.4, 8.0),
}
TITLES = {"tokens": "tokens (counted rows)", "vocabulary": "vocabulary (rows of the head)"}
Number = Callable[[dict[str, Any]], float | None]


def draw(path: Path) -> list[tuple[str, Path]]:
    """Draw the pictures and return the title and file of each."""
    sweep = json.loads(path.read_text())
    pictures: list[tuple[str, Path]] = []
    with plt.rc_context(STYLE):
        for axis in sweep["axes"]:
            figure, (above, below) = plt.subplots(2, 1, sharex=True)
            _lines(above, sweep, axis, lambda found: found["ms"])
            _lines(below, sweep, axis, lambda found: found["peak MiB"], without=GEMMS)
            above.set(ylabel="time (ms)", yscale="log", title="forward and backward")
            below.set(ylabel="peak memory (MiB)", yscale="log", title="beyond the inputs, gradients included")
            for panel in (above, below):
                _plain_ticks(panel.yaxis)
            below.set_xlabel(TITLES[axis])
            name = f"Time and memory against {axis}"
            pictures.append((name, _finish(figure, above, name, sweep, axis, path.with_name(f"{axis}.png"))))
        figure, panels = plt.subplots(len(sweep["axes"]), 1, sharey=True, squeeze=False)
        for panel, axis in zip(panels[:, 0], sweep["axes"], strict=True):
            _lines(panel, sweep, axis, _percent, without=GEMMS)
            panel.axhline(100, color=GEMMS_COLOUR, linewidth=1.5, linestyle="--", label=GEMMS)
            panel.set(ylabel="share of GEMM rate (%)", xlabel=TITLES[axis], title=_fixed(sweep, axis))
        highest = max(max(line.get_ydata()) for panel in panels[:, 0] for line in panel.get_lines())
        panels[0, 0].set_ylim(0, max(110, 1.05 * highest))
        name = "Share of the measured GEMM rate"
        pictures.append((name, _finish(figure, panels[0, 0], name, sweep, None, path.with_name("gemm-rate.png"))))
    return pictures


def _percent(found: dict[str, Any]) -> float | None:
    share = found["share of the GEMM rate"]
    return None if share is None else 100 * share


def _lines(panel: Axes, sweep: dict[str, Any], axis: str, number: Number, without: str = "") -> None:
    """Draw one line per provider, over the points where it ran and was right."""
    points = sweep["axes"][axis]["points"]
    names = dict.fromkeys(name for point in points for name in point["providers"])
    peers = [name for name in names if name not in (sweep["ours"], GEMMS)]
    for name in [sweep["ours"], *peers, GEMMS]:
        found = [(point[axis], point["providers"].get(name, {})) for point in points]
        right = [(x, y) for x, of in found if "ms" in of and not of["wrong"] and (y := number(of)) is not None]
        if name == without or not right:
            continue
        if name == sweep["ours"]:
            style: dict[str, Any] = {"color": OURS_COLOUR, "linewidth": 3, "marker": "o", "zorder": 3}
        elif name == GEMMS:
            style = {"color": GEMMS_COLOUR, "linewidth": 1.5, "linestyle": "--"}
        else:
            i = peers.index(name) % len(PEER_COLOURS)
            style = {"color": PEER_COLOURS[i], "linewidth": 1.5, "marker": PEER_MARKERS[i]}
        panel.plot(*zip(*right, strict=True), label=name, markersize=6, **style)
    panel.set_xscale("log", base=2)
    panel.set_xticks([point[axis] for point in points])
    panel.xaxis.set_minor_locator(NullLocator())
    panel.xaxis.set_major_formatter(FuncFormatter(lambda x, _: _thousands(x)))


def _thousands(x: float) -> str:
    """Format a number: 512, 8k for 8192, 128k for 128256."""
    if x < 1000:
        return f"{x:.0f}"
    return f"{x / 1024:.0f}k" if x % 1024 == 0 else f"{x / 1000:.0f}k"


def _plain_ticks(axis: Any) -> None:
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:,.10g}"))


def _fixed(sweep: dict[str, Any], axis: str) -> str:
    fixed = sweep["axes"][axis]["fixed"]
    names = {"rows": "{:,} tokens", "vocab": "V = {:,}", "width": "D = {:,}", "dtype": "{}"}
    return ", ".join(names[name].format(value) for name, value in fixed.items())


def _finish(figure: Figure, labelled: Axes, name: str, sweep: dict[str, Any], axis: str | None, path: Path) -> Path:
    """Add title, device and legend above the panels."""
    handles, labels = labelled.get_legend_handles_labels()
    where = sweep["hardware"].split(" (")[0]
    sizes = "" if axis is None else f"{_fixed(sweep, axis)}\n"
    figure.text(0.02, 0.985, name, va="top", fontsize=15, fontweight="bold")
    figure.text(0.02, 0.95, f"{sizes}{sweep['mode']} head, {where}, {sweep['date']}", va="top", fontsize=11)
    rows = -(-len(labels) // 2)
    top = 0.95 - (0.05 if axis else 0.025)
    figure.legend(handles, labels, loc="upper left", bbox_to_anchor=(0.0, top), ncols=2, frameon=False, fontsize=12)
    figure.tight_layout(rect=(0, 0, 1, top - 0.02 - 0.03 * rows))
    figure.savefig(path)
    plt.close(figure)
    return path


if __name__ == "__main__":
    for _, picture in draw(Path(sys.argv[1])):
        print(picture)
