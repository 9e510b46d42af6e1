"""The tables of the experiment, from its recorded numbers."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from typing import Any

from benchmarks.paper.interaction.methods import SWEEPS
from benchmarks.paper.interaction.selection import BUDGETS, HEADLINE, RULES
from benchmarks.paper.interaction.world import EPSILONS

SHOWN = "HyPO β 0.1 λ 0.03"  # the setting whose final checkpoint the table of fractions shows
RULE_NAMES = {"accuracy": "by pair accuracy", "kl": "by most KL", "reward": "by true reward"}
Record = dict[str, Any]


def mean(values: Sequence[float], signed: bool = False) -> str:
    """Return the mean ± its standard error over the seeds."""
    error = statistics.stdev(values) / len(values) ** 0.5
    return f"{statistics.fmean(values):{'+' if signed else ''}.2f} ± {error:.2f}"


def selected(
    record: Record, world: str, method: str, budget: float, rule: str = RULES[0], metric: str = "reward"
) -> list[float]:
    """Return a metric of each seed's selected candidate."""
    values: list[float] = record["worlds"][world]["methods"][method]["selected"][rule][f"{budget:g}"][metric]
    return values


def lead(
    record: Record, world: str, budget: float, rule: str = RULES[0], method: str = "HyPO", over: str = "DPO"
) -> list[float]:
    """Return the difference of two methods' true rewards, seed by seed."""
    return _minus(selected(record, world, method, budget, rule), selected(record, world, over, budget, rule))


def _minus(left: Sequence[float], right: Sequence[float]) -> list[float]:
    return [a - b for a, b in zip(left, right, strict=True)]


def interaction(
    record: Record, extrapolation: str, epsilon: float, budget: float, rule: str = RULES[0], method: str = "HyPO"
) -> list[float]:
    """Return a method's lead over DPO under silent pairs, minus that under covering pairs, seed by seed."""
    return _minus(
        *(
            lead(record, f"{pairs}, {extrapolation}, {epsilon:g}", budget, rule, method)
            for pairs in ("silent", "covering")
        )
    )


def lines(record: Record) -> Iterator[str]:
    """Yield the Markdown of all tables."""
    seeds, methods = record["seeds"], list(SWEEPS)
    yield (
        f"`python -m benchmarks.paper.interaction`, seeds {seeds[0]} to {seeds[-1]}; mean ± standard error over "
        f"{len(seeds)} seeds, differences paired by seed. Every method has {len(SWEEPS['DPO'])} settings and "
        f"{len(record['checkpoints'])} checkpoints to select from."
    )
    for rule in RULES:
        yield from ("", f"**HyPO's true reward minus DPO's, at a held-out KL of at most {HEADLINE:g}, "
                    f"selected {RULE_NAMES[rule]}**", "")  # fmt: skip
        yield "| extrapolation | ε | silent pairs | covering pairs | interaction |"
        yield "|---|---|---|---|---|"
        for extrapolation in ("misleading", "right"):
            for epsilon in EPSILONS:
                of_pairs = [
                    lead(record, f"{pairs}, {extrapolation}, {epsilon:g}", HEADLINE, rule)
                    for pairs in ("silent", "covering")
                ]
                cells = [*of_pairs, interaction(record, extrapolation, epsilon, HEADLINE, rule)]
                yield f"| {extrapolation} | {epsilon:g} | {' | '.join(mean(cell, signed=True) for cell in cells)} |"
    for rule in RULES:
        yield from ("", f"**True reward at a held-out KL of at most {HEADLINE:g}, selected {RULE_NAMES[rule]}**", "")
        yield f"| pairs, extrapolation, ε | {' | '.join(methods)} |"
        yield "|---|" + "---|" * len(methods)
        for world in record["worlds"]:
            cells_of = [mean(selected(record, world, method, HEADLINE, rule)) for method in methods]
            yield f"| {world} | {' | '.join(cells_of)} |"
    for metric, title in (
        ("kl", "Held-out KL"),
        ("uncovered", "Mass on uncovered responses"),
        ("ratio", "E_π[π / π_ref]"),
    ):
        yield from (
            "",
            f"**{title} of the candidates selected {RULE_NAMES[RULES[0]]} at a KL of at most {HEADLINE:g}**",
            "",
        )
        yield f"| pairs, extrapolation, ε | C_glo | {' | '.join(methods)} |"
        yield "|---|---|" + "---|" * len(methods)
        for world, found in record["worlds"].items():
            values = [selected(record, world, method, HEADLINE, metric=metric) for method in methods]
            cells_of = [f"{statistics.fmean(v):.3g}" for v in values]
            yield f"| {world} | {found['c_glo']:,.0f} | {' | '.join(cells_of)} |"
    for world in ("silent, misleading, 0.01", "covering, misleading, 0.01"):
        yield from ("", f"**Frontier in the world “{world}”, selected {RULE_NAMES[RULES[0]]}**; "
                    "below the reward, the difference to HyPO's", "")  # fmt: skip
        yield f"| held-out KL at most | {' | '.join(methods)} |"
        yield "|---|" + "---|" * len(methods)
        for budget in BUDGETS:
            yield f"| {budget:g} | {' | '.join(mean(selected(record, world, m, budget)) for m in methods)} |"
            differences = [
                "" if method == "HyPO" else mean(lead(record, world, budget, method=method, over="HyPO"), signed=True)
                for method in methods
            ]
            yield f"| | {' | '.join(differences)} |"
    yield from online_lines(record)


def online_lines(record: Record) -> Iterator[str]:
    """Yield the table of how few online samples are enough."""
    yield from (
        "",
        "**Fewer samples, in the world “silent, misleading, 0.01”**: 32 prompts a step, 2 samples of each",
        "",
    )
    yield (
        f"| share of prompts, a draw for … steps | reward at a KL of at most {HEADLINE:g} | at most 3 | "
        f"{SHOWN} at the end: reward | KL | uncovered mass |"
    )
    yield "|---|---|---|---|---|---|"
    for name, found in record["online"].items():
        rewards = [found["selected"][RULES[0]][budget]["reward"] for budget in (f"{HEADLINE:g}", "3")]
        last = found["last"][SHOWN]
        cells = [mean(values) for values in (*rewards, last["reward"], last["kl"], last["uncovered"])]
        yield f"| {name} | {' | '.join(cells)} |"
