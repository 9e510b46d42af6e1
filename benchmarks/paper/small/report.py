"""Write the tables of the small experiments (mean ± standard error over the seeds) and their data."""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.paper.small import pictures
from benchmarks.paper.small.arms import ESTIMATES, FRONTIERS, METHODS, Arm, arms
from benchmarks.paper.small.outcome import Evaluation, Outcome, read_outcomes
from benchmarks.paper.small.stages import REWARD_MODEL, Scale
from hypo_train.metrics.log import read_metrics

# Arm name -> its outcome with each seed.
Outcomes = dict[str, list[Outcome]]


def write(folders: dict[int, Path], scale: Scale, results_dir: Path) -> list[str]:
    """Write ``small.md``, ``small.json`` and the pictures of finished runs; return the lines of ``small.md``."""
    found = read(folders)
    results_dir.mkdir(parents=True, exist_ok=True)
    figure_1 = pictures.figure_1(found, results_dir / "figure1.png")
    frontier = pictures.frontier(found, results_dir / "frontier.png")
    everything = {name: [dataclasses.asdict(outcome) for outcome in seeds] for name, seeds in found.items()}
    (results_dir / "small.json").write_text(json.dumps(everything, indent=1) + "\n", encoding="utf-8")
    accuracies = [_accuracy(folder / REWARD_MODEL) for folder in folders.values()]
    lines = [
        f"`python -m benchmarks.paper.small --seeds {len(folders)}`; mean ± standard error over the seeds; "
        f"{scale.epochs} epochs of {scale.sizes.num_pairs:,} pairs, {scale.sizes.num_held_out} held-out prompts. The "
        f"reward model, which RLOO learns from, agrees with {_mean(accuracies, 3)} of the held-out labels.",
        "",
        "**Table 1 in small**",
        "",
        *table_1(found),
        "",
        f"![Reverse KL and true reward over training]({figure_1.name})",
        "",
        "**What the weight of the KL buys**: sweeps of DPO's and IPO's β and of HyPO's λ",
        "",
        *frontier_table(found),
        "",
        f"![True reward against reverse KL]({frontier.name})",
        "",
        "**Samples a prompt, and the exact estimator**: HyPO, at its λ of the table",
        "",
        *estimates_table(found),
    ]
    (results_dir / "small.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return lines


def read(folders: dict[int, Path]) -> Outcomes:
    names = [arm.name for arm in arms()]
    seeds = [read_outcomes(folder, names) for folder in folders.values()]
    return {name: list(outcomes) for name, outcomes in zip(names, zip(*seeds, strict=True), strict=True)}


def table_1(found: Outcomes) -> Iterator[str]:
    """Return a Markdown table with a row per method, at the end of its training."""
    yield "| | win-rate against written reviews | learned reward | true reward | reverse KL to SFT |"
    yield "|---|---|---|---|---|"
    start = found[METHODS["DPO"].name]
    yield _row("SFT", [seed.first for seed in start], [seed.learned[0] for seed in start])
    for label, arm in METHODS.items():
        yield _row(label, _last(found, arm), [seed.learned[1] for seed in found[arm.name]])


def _row(label: str, evaluations: Sequence[Evaluation], learned: Sequence[float]) -> str:
    kls = [e.kl for e in evaluations]
    cells = [
        _mean([e.win_rate for e in evaluations], 3),
        _mean(learned, 2),
        _mean([e.reward for e in evaluations], 2),
        _mean(kls, 2) if any(kls) else "0",
    ]
    return f"| {label} | {' | '.join(cells)} |"


def frontier_table(found: Outcomes) -> Iterator[str]:
    yield "| | | true reward | reverse KL |"
    yield "|---|---|---|---|"
    for method, points in FRONTIERS.items():
        for label, arm in points.items():
            last = _last(found, arm)
            yield f"| {method} | {label} | {_mean([e.reward for e in last], 2)} | {_mean([e.kl for e in last], 2)} |"


def estimates_table(found: Outcomes) -> Iterator[str]:
    yield "| | true reward | reverse KL | model FLOPs of a step, of DPO's |"
    yield "|---|---|---|---|"
    dpo = statistics.fmean(outcome.flops for outcome in found[METHODS["DPO"].name])
    for label, arm in ESTIMATES.items():
        last, flops = _last(found, arm), statistics.fmean(outcome.flops for outcome in found[arm.name])
        cells = [_mean([e.reward for e in last], 2), _mean([e.kl for e in last], 2), f"{flops / dpo:.2f}"]
        yield f"| {label} | {' | '.join(cells)} |"


def _last(found: Outcomes, arm: Arm) -> list[Evaluation]:
    return [outcome.last for outcome in found[arm.name]]


def _accuracy(reward_model: Path) -> float:
    return float(read_metrics(reward_model / "metrics.jsonl")[-1]["eval_accuracy"])


def _mean(values: Sequence[float], digits: int) -> str:
    mean = f"{statistics.fmean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {standard_error(values):.{digits}f}"


def standard_error(values: Sequence[float]) -> float:
    """Return the standard error of the mean."""
    return statistics.stdev(values) / len(values) ** 0.5
