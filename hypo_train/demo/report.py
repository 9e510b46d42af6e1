"""The demo's table of methods, and its curves of reverse KL and true reward."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hypo_train.metrics.log import read_metrics

LABELS = {"dpo": "DPO", "hypo": "HyPO"}
COLOURS = {"dpo": "#c1502e", "hypo": "#1f6f8b"}


@dataclass(frozen=True)
class Outcome:
    """The runs of one seed by method, the reward of the language model's sample by held-out row, and the runs' time."""

    seed: int
    runs: dict[str, Path]
    baseline: dict[int, float]
    seconds: dict[str, float]


def table(outcomes: Sequence[Outcome]) -> str:
    """Return a Markdown table with a row for each method; for several seeds, means and their standard errors."""
    reward = statistics.fmean(statistics.fmean(outcome.baseline.values()) for outcome in outcomes)
    lines = [
        "| | true reward | win-rate against SFT | reward accuracy | reverse KL to SFT |",
        "|---|---|---|---|---|",
        f"| SFT | {reward:.2f} | | | 0 |",
    ]
    for name in outcomes[0].runs:
        seeds = [_figures(outcome, name) for outcome in outcomes]
        cells = [_cell([s[key] for s in seeds], digits) for key, digits in _COLUMNS]
        kl = statistics.fmean(s["kl"] for s in seeds)
        error = _error([s["kl"] for s in seeds]) if len(seeds) > 1 else seeds[0]["kl_se"]
        lines.append(f"| {LABELS[name]} | {' | '.join(cells)} | {kl:.2f} ± {error:.2f} |")
    prompts, seeds_text = len(outcomes[0].baseline), "1 seed" if len(outcomes) == 1 else f"{len(outcomes)} seeds"
    spread = "over samples" if len(outcomes) == 1 else "over seeds"
    lines += ["", f"{prompts} held-out prompts, {seeds_text}; ± standard error {spread}; KL in nats a response."]
    if times := [
        f"{LABELS[name]} {statistics.fmean(outcome.seconds[name] for outcome in outcomes):.0f} s"
        for name in outcomes[0].runs
    ]:
        lines.append(f"Training and its evaluations took: {', '.join(times)}.")
    return "\n".join(lines) + "\n"


_COLUMNS = (("reward", 2), ("win_rate", 3), ("accuracy", 3))


def _figures(outcome: Outcome, name: str) -> dict[str, float]:
    """Return the table's values of one run, from its last evaluation. A win against SFT is 1, a tie one half."""
    last = _evaluations(outcome.runs[name])[-1]
    path = outcome.runs[name] / "samples" / f"step-{last['step']}.jsonl"
    samples = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    wins = [_win(sample["reward"], outcome.baseline[sample["row"]]) for sample in samples]
    return {
        "reward": last["eval_reward"],
        "win_rate": statistics.fmean(wins),
        "accuracy": last["eval_rewards/accuracies"],
        "kl": last["eval_kl"],
        "kl_se": last["eval_kl_se"],
    }


def _win(reward: float, baseline: float) -> float:
    return 0.5 if reward == baseline else float(reward > baseline)


def _cell(values: list[float], digits: int) -> str:
    mean = f"{statistics.fmean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {_error(values):.{digits}f}"


def _error(values: list[float]) -> float:
    return statistics.stdev(values) / math.sqrt(len(values))


def _evaluations(run: Path) -> list[dict[str, Any]]:
    return [line for line in read_metrics(run / "metrics.jsonl") if "eval_kl" in line]


def draw(outcomes: Sequence[Outcome], path: Path) -> Path:
    """Draw reverse KL and true reward over training to a PNG: a thin line for each seed, a thick one for their mean."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), constrained_layout=True)
    panels = (("eval_kl", "reverse KL to SFT (nats a response)"), ("eval_reward", "true reward"))
    for axis, (key, title) in zip(axes, panels, strict=True):
        for name in outcomes[0].runs:
            curves = [_evaluations(outcome.runs[name]) for outcome in outcomes]
            steps = [line["step"] for line in curves[0]]
            values = [[line[key] for line in curve] for curve in curves]
            for one in values if len(values) > 1 else []:
                axis.plot(steps, one, color=COLOURS[name], alpha=0.3, linewidth=0.8)
            mean = [statistics.fmean(column) for column in zip(*values, strict=True)]
            axis.plot(steps, mean, color=COLOURS[name], linewidth=2, marker="o", markersize=3, label=LABELS[name])
        axis.set(title=title, xlabel="optimizer step")
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return path
