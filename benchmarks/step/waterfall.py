"""Draw the times from HyPO on TRL to this project's step as a waterfall, one bar per saving."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")
from matplotlib import patheffects
from matplotlib import pyplot as plt

from benchmarks.plots import GEMMS_COLOUR, OURS_COLOUR, PEER_COLOURS, STYLE
from benchmarks.step.session import MeasuredCase
from benchmarks.step.variants import HYPO, HYPO_PLAIN, TRL_DPO, TRL_HYPO, savings, without

PLAIN_LOOP, TOGETHER = "plain loop\n(all off)", "overlap of\nsavings"


class Bar(NamedTuple):
    """A bar from ``start`` to ``end`` seconds; a total starts at 0."""

    label: str
    start: float
    end: float
    is_total: bool = False

    @property
    def change(self) -> float:
        return self.end - self.start


def bars(measured: MeasuredCase) -> list[Bar]:
    """Return the bars of a case; none if TRL's or our time is missing.

    A saving's bar is the extra time of a step without it while all others are on. Savings overlap, so the bars do not
    add up to the total saving; one more bar shows the difference.
    """
    first, last = measured.seconds(TRL_HYPO), measured.seconds(HYPO)
    if first is None or last is None:
        return []
    found = [Bar("HyPO on TRL", 0.0, first, is_total=True)]
    plain = measured.seconds(HYPO_PLAIN)
    level = first
    if plain is not None:
        found.append(Bar(PLAIN_LOOP, first, plain))
        level = plain
        for saving in savings(measured.case):
            alone = measured.seconds(without(saving.name))
            if alone is not None:
                found.append(Bar(saving.name.replace(" ", "\n", 1), level, level - (alone - last)))
                level = found[-1].end
        found.append(Bar(TOGETHER, level, last))
    else:
        found.append(Bar("all of\nthis loop", first, last))
    return [*found, Bar("HyPO", 0.0, last, is_total=True)]


def draw(measured: MeasuredCase, where: str, path: Path) -> Path | None:
    """Draw the picture at ``path`` and return it; None if there are no bars."""
    found = bars(measured)
    if not found:
        return None
    path.parent.mkdir(parents=True, exist_ok=True)
    top = max(max(bar.start, bar.end) for bar in found)
    with plt.rc_context({**STYLE, "figure.figsize": (max(7.2, 1.25 * len(found) + 2.6), 5.2)}):
        figure, axes = plt.subplots()
        axes.grid(visible=False, axis="x")
        axes.set_axisbelow(True)
        for i, bar in enumerate(found):
            colour = (PEER_COLOURS[0] if i == 0 else OURS_COLOUR) if bar.is_total else _colour(bar.change)
            axes.bar(i, abs(bar.change), bottom=min(bar.start, bar.end), color=colour, width=0.68)
            text = f"{bar.end:.3g} s" if bar.is_total else _signed(bar.change)
            label = axes.annotate(
                text, (i, max(bar.start, bar.end)), xytext=(0, 4), textcoords="offset points", ha="center", fontsize=12
            )
            label.set_path_effects([patheffects.withStroke(linewidth=4, foreground="white")])  # a line may cross it
            label.set_zorder(4)
            if i + 1 < len(found):
                axes.plot([i + 0.34, i + 0.66], [bar.end, bar.end], color=GEMMS_COLOUR, linewidth=1)
        dpo, right = measured.seconds(TRL_DPO), len(found) - 0.4
        if dpo is not None:
            axes.plot([-0.6, right], [dpo, dpo], color="black", linewidth=1.5, linestyle="--", zorder=3)
            axes.text(right + 0.08, dpo, f"DPO on TRL\n{dpo:.3g} s", va="center", fontsize=12)
        axes.set_xticks(range(len(found)), [bar.label for bar in found], fontsize=12)
        axes.set(ylabel="seconds an optimizer step", ylim=(0, 1.12 * max(top, dpo or 0.0)), xlim=(-0.6, right + 1.1))
        figure.text(0.015, 0.985, "Where a HyPO step's time went", va="top", fontsize=15, fontweight="bold")
        figure.text(0.015, 0.925, f"{measured.case.title}\n{where}", va="top", fontsize=11)
        figure.tight_layout(rect=(0, 0, 1, 0.85))
        figure.savefig(path)
        plt.close(figure)
    return path


def _signed(seconds: float) -> str:
    return f"{seconds:+.2g} s".replace("-", "\N{MINUS SIGN}")


def _colour(change: float) -> str:
    """Return light blue for saved and yellow for added time: colour-blind readers and grey print tell them apart."""
    return "#56b4e9" if change <= 0 else "#e69f00"
