"""Check the numbers that pages quote from recorded results against the recorded data itself.

Each ``Quote`` is a piece of a page with its numbers left out, and how to compute them. A quote fails if the page says
something else or the data does. In the sections named in ``COMPLETE`` every decimal number must be in a quote, or among
those that are no result of ours. The win rates in the demo's table have no recorded data; only their copies in README
and docs can be compared.
"""

from __future__ import annotations

import functools
import json
import re
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from benchmarks.paper.interaction import methods, selection, world
from benchmarks.paper.interaction import report as leads
from benchmarks.paper.small import report
from benchmarks.paper.small.outcome import Evaluation, Outcome

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "paper" / "results"
README, PAPER = "README.md", "benchmarks/paper/README.md"
DOCS, COST, EXACT = "docs/results.md", "docs/cost.md", "docs/exact_kl.md"
SEEDS = 3


@functools.cache
def data(name: str) -> Any:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


@functools.cache
def text(page: str) -> str:
    """Return a page in one line, without the marks of emphasis."""
    return " ".join((ROOT / page).read_text(encoding="utf-8").replace("*", "").split())


# Numbers of small.json and online_fraction.json


def of_seeds(arm: str, name: str, epoch: int = -1, run: str = "small") -> list[float]:
    """Return a figure of each seed after an epoch, the last by default."""
    return [seed["evaluations"][epoch][name] for seed in data(run)[arm]]


def mean(values: Sequence[float], digits: int = 2) -> str:
    return f"{statistics.fmean(values):.{digits}f}"


def mean_error(values: Sequence[float], digits: int = 2) -> str:
    return f"{mean(values, digits)} ± {error(values):.{digits}f}"


def error(values: Sequence[float]) -> float:
    return statistics.stdev(values) / len(values) ** 0.5


def largest(arm: str, run: str = "small") -> float:
    """Return the largest KL of an evaluation of an arm."""
    return max(evaluation["kl"] for seed in data(run)[arm] for evaluation in seed["evaluations"])


DPO, IPO = (
    [f"dpo-beta-{b}" for b in ("0.03", "0.1", "0.3", "1")],
    [f"ipo-beta-{b}" for b in ("0.03", "0.1", "0.3", "1")],
)
HYPO = [f"hypo-lambda-{kl_coef}-k-2" for kl_coef in ("0.001", "0.003", "0.01", "0.03")]
ALL_HYPO = [*HYPO, "hypo-lambda-0.003-k-4", "hypo-lambda-0.003-k-8", "hypo-lambda-0.003-k-2-exact"]
RLOO = "rloo-beta-0.05-k-4"
MAIN = {"DPO": DPO[1], "IPO": IPO[1], "RLOO": RLOO, "HyPO": HYPO[1]}


def best_within(arms: Sequence[str], kl: float) -> list[str]:
    """Return, by seed, the highest true reward at the end of the runs that end within a KL."""
    of = [list(zip(of_seeds(arm, "kl"), of_seeds(arm, "reward"), strict=True)) for arm in arms]
    return [f"{max(run[seed][1] for run in of if run[seed][0] <= kl):.2f}" for seed in range(SEEDS)]


def paired(arm: str, name: str) -> str:
    differences = [a - b for a, b in zip(of_seeds(arm, name), of_seeds(HYPO[1], name), strict=True)]
    return mean_error(differences)


def flops(arm: str) -> str:
    """Return the FLOPs of a step in those of HyPO with 2 samples."""
    cost = {name: statistics.fmean(seed["flops"] for seed in data("small")[name]) for name in (arm, HYPO[1])}
    return f"{cost[arm] / cost[HYPO[1]]:.1f}"


def spread(arms: Sequence[str], digits: int = 2) -> list[str]:
    errors = [error(of_seeds(arm, "kl")) for arm in arms]
    return [f"{min(errors):.{digits}f}", f"{max(errors):.{digits}f}"]


def table_row(method: str) -> list[str]:
    """Return win-rate in percent, learned reward, KL and true reward of a row of Table 1 in small."""
    arm = MAIN.get(method, DPO[1])
    epoch = -1 if method in MAIN else 0
    rates = [100 * rate for rate in of_seeds(arm, "win_rate", epoch)]
    learned = [seed["learned"][epoch] for seed in data("small")[arm]]
    kl = mean_error(of_seeds(arm, "kl", epoch)) if method in MAIN else "0"
    cells = [mean_error(rates, 1), mean_error(learned), kl, mean_error(of_seeds(arm, "reward", epoch))]
    return [number for cell in cells for number in cell.split(" ± ")]


# Numbers of theory.json and RESULTS.md


def theory(table: str, column: str, form: str, *rows: int) -> list[str]:
    return [f"{data('theory')[table][row][column]:{form}}" for row in rows]


def bounds(kind: str) -> list[str]:
    """Return the three methods' bounds at ε = 1e-8."""
    row = data("theory")["three_responses"][2]
    return [f"{row[f'{method}_{kind}']:.0e}" for method in ("dpo", "rlhf", "hypo")]


def figure_2(method: str, column: str, digits: int, part: str = "figure_2") -> str:
    return mean([row[column] for row in data("theory")[part][method]], digits)


def root_error(column: str, digits: int) -> str:
    """Return DPO's root of the mean squared error without features."""
    return mean([row[column] ** 0.5 for row in data("theory")["figure_2_right"]["DPO"]], digits)


@functools.cache
def steps(workload: str) -> dict[str, list[str]]:
    """Return the cells of each line of the last table of ``RESULTS.md`` about a workload, by its first cell."""
    written = (ROOT / "benchmarks" / "RESULTS.md").read_text(encoding="utf-8")
    table = written.rsplit(f"**{workload}, ", 1)[1].split("seconds by phase")[0]
    lines = [re.split(r"\s{2,}", line.strip()) for line in table.splitlines()]
    return {line[0]: line[1:] for line in lines if len(line) > 5}


SUMMARIES, CHAT = "SmolLM2-135M-full-TLDR-fp32", "SmolLM2-135M-full-chat-fp32"
SECONDS, OF_DPO, OF_TRL, OF_GEMMS, MEMORY = 0, 2, 3, 5, 6


def cells(workload: str, step: str, *columns: int) -> list[str]:
    return [steps(workload)[step][column] for column in columns]


def rounded(workload: str, step: str, column: int) -> str:
    """Return a cell with one digit after the point."""
    return f"{float(cells(workload, step, column)[0]):.1f}"


@dataclass(frozen=True)
class Quote:
    """A piece of a page, with ``{}`` in the place of each number, and what computes the numbers."""

    page: str
    piece: str
    numbers: Callable[[], list[str]]

    def __str__(self) -> str:
        return f"{self.page}: {self.piece[:40]}"

    def written(self) -> str:
        return self.piece.format(*self.numbers())


COSTS = [
    *(
        Quote(README, f"{label} | {{}} / {{}} = {{}} | {{}} | {{}} |", lambda row=row: readme_row(*row))
        for label, row in {
            "responses 48, 2 samples of 48)": (SUMMARIES, "HyPO"),
            "samples of an eighth of the prompts": (SUMMARIES, "HyPO, recommended"),
            "responses 128, 2 samples of 192)": (CHAT, "HyPO"),
        }.items()
    ),
    *(
        Quote(DOCS, f"| {label} | {{}} | {{}} |", lambda step=step: row_of_seconds(step))
        for label, step in {
            "TRL DPO, defaults (gradient checkpointing)": "TRL DPO",
            "TRL DPO, reference precomputed": "TRL DPO, reference precomputed",
            "HyPO put together on TRL, reference precomputed for the pairs": "HyPO on TRL",
            "DPO, this project": "DPO",
            "HyPO, this project, samples of all prompts": "HyPO",
        }.items()
    ),
    Quote(
        DOCS,
        "without gradient checkpointing | {} | not measured |",
        lambda: cells(SUMMARIES, "TRL DPO, precomputed, no checkpointing", SECONDS),
    ),
    Quote(DOCS, "`online_fraction: 0.125` | {} | see below |", lambda: cells(SUMMARIES, "HyPO, recommended", SECONDS)),
    Quote(
        DOCS,
        "our HyPO, all prompts / our DPO | {} | {} |",
        lambda: [rounded(workload, "HyPO", OF_DPO) for workload in (SUMMARIES, CHAT)],
    ),
    Quote(DOCS, "prompts / our DPO | {} | | | our DPO", lambda: cells(SUMMARIES, "HyPO, recommended", OF_DPO)),
    Quote(
        DOCS,
        "our DPO / TRL's best DPO | {} | {} | | our HyPO, all prompts / TRL's best DPO | {} | {} |",
        lambda: [cells(workload, step, OF_TRL)[0] for step in ("DPO", "HyPO") for workload in (SUMMARIES, CHAT)],
    ),
    Quote(DOCS, "prompts / TRL's best DPO | {} | |", lambda: cells(SUMMARIES, "HyPO, recommended", OF_TRL)),
    Quote(DOCS, "on summaries and {} times on chat", lambda: [rounded(CHAT, "HyPO", OF_DPO)]),
    Quote(DOCS, "takes {} times as long as its matrix", lambda: [rounded(SUMMARIES, "DPO", OF_GEMMS)]),
    Quote(DOCS, "needed {} times the memory of TRL's default", lambda: [f"{memory(CHAT, 'HyPO', 'TRL DPO'):.2f}"]),
]


def readme_row(workload: str, step: str) -> list[str]:
    """Return seconds of a step and of DPO's, and ratios: step / DPO, DPO / TRL's best, step / TRL's best."""
    of_dpo = rounded(workload, step, OF_DPO) if step == "HyPO" else cells(workload, step, OF_DPO)[0]
    of_trl = [cells(workload, name, OF_TRL)[0] for name in ("DPO", step)]
    return [*cells(workload, step, SECONDS), rounded(workload, "DPO", SECONDS), of_dpo, *of_trl]


def row_of_seconds(step: str) -> list[str]:
    chat = cells(CHAT, step, SECONDS)[0]
    return [*cells(SUMMARIES, step, SECONDS), chat if step == "DPO" else f"{float(chat):.1f}"]


def memory(workload: str, step: str, other: str) -> float:
    of, to = (float(cells(workload, name, MEMORY)[0]) for name in (step, other))
    return of / to


SMALL = [
    *(
        Quote(
            DOCS,
            f"| {{}} ± {{}} %, {{}} ± {{}}, {{}}{'' if method == 'SFT' else ' ± {}'} | {{}} ± {{}} |",
            lambda method=method: table_row(method),
        )
        for method in ("SFT", *MAIN)
    ),
    Quote(
        DOCS,
        "a true reward of {} at a KL of {}, where HyPO at λ 0.01 has {} at {}. DPO at β 0.3 has {} at {}, HyPO at "
        "λ 0.001 has {} at {}.",
        lambda: [
            value
            for arm in (IPO[1], HYPO[2], DPO[2], HYPO[0])
            for value in (mean(of_seeds(arm, "reward")), mean(of_seeds(arm, "kl"), 1))
        ],
    ),
    Quote(DOCS, "is {}, {} and {} for DPO, and {}, {} and {} for", lambda: best_within(DPO, 4) + best_within(HYPO, 4)),
    Quote(DOCS, "runs end at a KL of at most {},", lambda: [f"{max(max(of_seeds(a, 'kl')) for a in ALL_HYPO):.1f}"]),
    Quote(DOCS, "seed 1 has a KL of {} and a reward of {} after", lambda: runaway()),
    Quote(DOCS, "DPO at β 1 and IPO at β 0.1 never pass {}.", lambda: [f"{max(map(largest, (DPO[3], IPO[1]))):.1f}"]),
    Quote(PAPER, "at the end {} times as high", lambda: [ratio_of_means(MAIN["DPO"], MAIN["HyPO"])]),
    Quote(PAPER, "highest reward of all ({} ± {},", lambda: split(mean_error(of_seeds(RLOO, "reward")))),
    Quote(
        PAPER,
        "(true rewards {} and {}, HyPO's {} and {}) and far below in the one that ran away ({}; HyPO's {})",
        lambda: [
            f"{of_seeds(MAIN[m], 'reward')[i]:.2f}"
            for i, m in ((0, "DPO"), (2, "DPO"), (0, "HyPO"), (2, "HyPO"), (1, "DPO"), (1, "HyPO"))
        ],
    ),
    Quote(
        PAPER,
        "HyPO has {} ± {} at a KL of {}.",
        lambda: [*split(mean_error(of_seeds(HYPO[0], "reward"))), mean(of_seeds(HYPO[0], "kl"))],
    ),
    Quote(
        PAPER,
        "by seed {}, {} and {} for DPO and {}, {} and {} for HyPO; at most 5, it is {}, {} and {} against {}, {} and "
        "{}.",
        lambda: [value for kl in (4, 5) for arms in (DPO, HYPO) for value in best_within(arms, kl)],
    ),
    Quote(PAPER, "ends between a KL of {} and {}.", lambda: around(DPO, 4, seed=0)),
    Quote(
        PAPER,
        "IPO's β 0.1 has {} at {} where HyPO's λ 0.01 has {} at {}.",
        lambda: [mean(of_seeds(arm, name)) for arm in (IPO[1], HYPO[2]) for name in ("reward", "kl")],
    ),
    Quote(
        PAPER,
        "is at most {}, whatever λ, and spreads by {} to {} over seeds, DPO's at β ≤ 0.3 by {} to {}, IPO's at β 0.03 "
        "by {} (",
        lambda: [
            f"{max(max(of_seeds(arm, 'kl')) for arm in ALL_HYPO):.2f}",
            *(spread(HYPO) + spread(DPO[:3]) + spread(IPO[:1])[:1]),
        ],
    ),
    Quote(PAPER, "seed 1 has a KL of {} and a reward of {} after the first epoch", lambda: runaway()),
    Quote(PAPER, "seed 2 has a KL of {} after the third", lambda: [f"{of_seeds(ALL_HYPO[6], 'kl', 3)[2]:.1f}"]),
    Quote(PAPER, "seed 1 has {} after the first", lambda: [f"{of_seeds(HYPO[0], 'kl', 1)[1]:.1f}"]),
    Quote(
        PAPER,
        "never passed {}; nor did IPO at β ≥ 0.1 pass {} or DPO at β 1 pass {}.",
        lambda: [f"{max(map(largest, arms)):.2f}" for arms in (HYPO[1:], IPO[1:], DPO[3:])],
    ),
    Quote(PAPER, "for {}, {} and {} times the FLOPs of a step", lambda: [flops(arm) for arm in ALL_HYPO[4:]]),
    Quote(
        PAPER,
        "by +{} ± {} with 4 samples, {} ± {} with 8, and {} ± {} with the exact",
        lambda: [value for arm in ALL_HYPO[4:] for value in split(paired(arm, "reward"))],
    ),
]


def split(mean_and_error: str) -> list[str]:
    return mean_and_error.split(" ± ")


def runaway() -> list[str]:
    """Return KL and reward of λ 0.003 with 8 samples after the first epoch of seed 1."""
    return [f"{of_seeds(ALL_HYPO[5], 'kl', 1)[1]:.1f}", f"{of_seeds(ALL_HYPO[5], 'reward', 1)[1]:.2f}"]


def ratio_of_means(arm: str, other: str) -> str:
    return f"{statistics.fmean(of_seeds(arm, 'kl')) / statistics.fmean(of_seeds(other, 'kl')):.1f}"


def around(arms: Sequence[str], kl: float, seed: int) -> list[str]:
    """Return the KLs at the end on both sides of ``kl``."""
    ends = sorted(of_seeds(arm, "kl")[seed] for arm in arms)
    return [f"{max(end for end in ends if end <= kl):.1f}", f"{min(end for end in ends if end > kl):.1f}"]


THEORY = [
    Quote(
        PAPER,
        "to the optimum is {}, {}, {}, {} and {} for ε = {}, {}, {}, {} and {},",
        lambda: (
            theory("three_responses", "dpo_gap", ".1f", *range(5))
            + [f"{float(e):.0e}".replace("e-0", "e-") for e in theory("three_responses", "epsilon", "", *range(5))]
        ),
    ),
    Quote(PAPER, "under the reference falls to {}.", lambda: theory("three_responses", "dpo_error", ".0e", 4)),
    Quote(
        PAPER,
        "HyPO's gap falls to {}, RLHF's to {}.",
        lambda: theory("three_responses", "hypo_gap", ".1e", 4) + theory("three_responses", "rlhf_gap", ".0e", 4),
    ),
    Quote(PAPER, "the bounds are {} (DPO), {} (RLHF) and {} (HyPO)", lambda: bounds("bound")),
    Quote(PAPER, "in place of C the bounds are {}, {} and {}.", lambda: bounds("realised_bound")),
    Quote(
        PAPER,
        "the KL reaches {} of 2R'/β = {}.",
        lambda: [f"{lemma()['kl'] / lemma()['bound']:.2f}", f"{lemma()['bound']:g}"],
    ),
    Quote(PAPER, "the policy may have {}.", lambda: theory("remark_4_1", "mass", ".3f", 4)),
    Quote(
        PAPER,
        "is {} for DPO where C_glo √error is {}; the gap is {}. HyPO pays for its KL: its gap is {}.",
        lambda: [
            figure_2("DPO", "linear_bound", 1),
            figure_2("DPO", "bound", 0),
            figure_2("DPO", "gap", 3),
            figure_2("HyPO", "gap", 2),
        ],
    ),
    Quote(
        PAPER,
        "DPO's error is {} on the data's pairs and {} on pairs from the reference",
        lambda: [root_error("error_on_pairs", 2), root_error("error", 1)],
    ),
    Quote(
        PAPER,
        "DPO's gap is {} there, HyPO's {}:",
        lambda: [figure_2(method, "gap", 1, "figure_2_right") for method in ("DPO", "HyPO")],
    ),
    Quote(
        PAPER,
        "with the L2 norm in {} of 10.",
        lambda: [str(sum(data("theory")["readings"]["L2 norm, last e₁"]["last_is_best"]))],
    ),
    Quote(
        PAPER, "HyPO in {} of 10 under L1.", lambda: [str(sum(data("theory")["readings"]["L1 norm, last e₁"]["HyPO"]))]
    ),
    Quote(
        DOCS, "without bound ({} at ε = 1e-2, {} at 1e-64)", lambda: theory("three_responses", "dpo_gap", ".1f", 0, 4)
    ),
]


def lemma() -> dict[str, float]:
    return dict(data("theory")["lemma_4_1"][-1])


ENDS_LOWER = [
    Quote(EXACT, "ended {} ± {} lower", lambda: split(paired(ALL_HYPO[6], "reward").removeprefix("-"))),
]
FRACTIONS = [f"HyPO, {fraction}" for fraction in ("1", "0.5", "0.25", "0.125", "0.0625")]
ONLINE = [
    Quote(
        COST, "had none above {}", lambda: [f"{max(largest(FRACTIONS[i], 'online_fraction') for i in (0, 2, 4)):.1f}"]
    ),
]


def demo(name: str) -> list[dict[str, Any]]:
    return list(data("demo_fractions")["runs"][name])


def demo_row(name: str) -> list[str]:
    """Return reward, KL, largest KL and relative CPU seconds of a fraction in the demo, by seed but for the last."""
    runs = demo(name)
    dpo = {run["seed"]: run["cpu_seconds"] for run in demo("DPO")}
    ratio = sum(run["cpu_seconds"] for run in runs) / sum(dpo[run["seed"]] for run in runs)
    return [
        ", ".join(f"{run['evaluations'][-1]['reward']:.2f}" for run in runs),
        ", ".join(f"{run['evaluations'][-1]['kl']:.2f}" for run in runs),
        ", ".join(f"{max(e['kl'] for e in run['evaluations']):.1f}" for run in runs),
        f"{ratio:.2f}",
    ]


def demo_end(name: str) -> list[str]:
    """Return the reward, reward accuracy and KL of the demo's table."""
    last = [run["evaluations"][-1] for run in demo(name)]
    cells = (("reward", 2), ("accuracy", 3), ("kl", 2))
    return [mean_error([end[key] for end in last], digits) for key, digits in cells]


DEMO = [
    *(
        Quote(
            DOCS,
            f"| {fraction} | {seeds} | {{}} | {{}} | {{}} | {{}} |",
            functools.partial(demo_row, f"HyPO, {fraction}"),
        )
        for fraction, seeds in (("1", "0, 2"), ("0.125", "0, 1, 2"), ("0.0625", "0, 1, 2"))
    ),
    # The win rates are not in the recorded data.
    Quote(DOCS, "| DPO | {} | 0.656 ± 0.203 | {} | {} |", lambda: demo_end("DPO")),
    Quote(DOCS, "| HyPO | {} | 0.930 ± 0.011 | {} | {} |", lambda: demo_end("HyPO, 0.0625")),
]


# Numbers of interaction.json


def rewards_row(name: str) -> list[str]:
    """Return the methods' true rewards in a world, by the main rule."""
    return [leads.mean(leads.selected(data("interaction"), name, m, selection.HEADLINE)) for m in methods.SWEEPS]


def leads_row(rule: str, extrapolation: str, epsilon: float) -> list[str]:
    """Return HyPO's lead over DPO under silent and under covering pairs, and their difference."""
    record = data("interaction")
    found = [
        leads.lead(record, f"{pairs}, {extrapolation}, {epsilon:g}", selection.HEADLINE, rule)
        for pairs in ("silent", "covering")
    ]
    found.append(leads.interaction(record, extrapolation, epsilon, selection.HEADLINE, rule))
    return [leads.mean(values, signed=True) for values in found]


def hypo_lead(
    over: str, *epsilons: float, pairs: str = "silent", rule: str = "accuracy", budget: float = selection.HEADLINE
) -> list[str]:
    """Return HyPO's lead over a method where extrapolation misleads, for each ε."""
    return [
        leads.mean(leads.lead(data("interaction"), f"{pairs}, misleading, {e:g}", budget, rule, over=over), signed=True)
        for e in epsilons
    ]


def of_candidates(metric: str, epsilon: float, *of: str, rule: str = "accuracy") -> list[float]:
    """Return the methods' means of a metric with silent pairs and misleading extrapolation."""
    name = f"silent, misleading, {epsilon:g}"
    return [
        statistics.fmean(leads.selected(data("interaction"), name, method, selection.HEADLINE, rule, metric))
        for method in of
    ]


def two_digits(values: Sequence[float]) -> list[str]:
    return [f"{value:.2f}" for value in values]


def curve(setting: str, metric: str, checkpoint: int = -1) -> float:
    found = data("interaction")["worlds"]["silent, misleading, 0.01"]["methods"][setting.split(" β")[0]]
    return float(found["curves"][setting][metric]["mean"][checkpoint])


ALL_PROMPTS = "1, 1"
FEWER = ("0.5, 1", "0.25, 1", "0.0625, 1")


def drawn(name: str, budget: str = "2") -> str:
    """Return the true reward with fewer samples, selected by the main rule."""
    return leads.mean(data("interaction")["online"][name]["selected"]["accuracy"][budget]["reward"])


def at_the_end(name: str, metric: str) -> list[float]:
    values: list[float] = data("interaction")["online"][name]["last"][leads.SHOWN][metric]
    return values


def loss_at_the_end(name: str) -> str:
    """Return the final true reward with fewer samples minus that with samples of all prompts."""
    both = zip(at_the_end(name, "reward"), at_the_end(ALL_PROMPTS, "reward"), strict=True)
    return leads.mean([a - b for a, b in both], signed=True)


THREE = "{}, {} and {}"
NLL = "DPO + NLL"
INTERACTION = [
    *(
        Quote(
            DOCS,
            f"| {leads.RULE_NAMES[rule].removeprefix('by ')} | {extrapolation} | {epsilon:g} | {{}} | {{}} | {{}} |",
            functools.partial(leads_row, rule, extrapolation, epsilon),
        )
        for rule in selection.RULES
        for extrapolation in ("misleading", "right")
        for epsilon in world.EPSILONS
    ),
    *(
        Quote(DOCS, f"| {kind.name} | {' | '.join(['{}'] * 6)} |", functools.partial(rewards_row, kind.name))
        for kind in world.KINDS
        if kind.misleading
    ),
    Quote(
        DOCS,
        "it is, by the main rule at ε 0.01, {}, {}, {}, {} and {}. At the smallest",
        lambda: [value for budget in selection.BUDGETS for value in hypo_lead("DPO", 0.01, budget=budget)],
    ),
    Quote(
        DOCS,
        "have a mass of at most {} on responses",
        lambda: [f"{max(of_candidates('uncovered', 0.001, *methods.SWEEPS)):.3f}"],
    ),
    Quote(
        DOCS,
        "the lead is {} by the main rule and {} by most KL",
        lambda: [value for rule in ("accuracy", "kl") for value in hypo_lead("DPO", 0.001, rule=rule, budget=4)],
    ),
    Quote(
        DOCS,
        "a mass of {} on the uncovered responses, DPO's {}.",
        lambda: two_digits(of_candidates("uncovered", 0.1, "HyPO", "DPO")),
    ),
    Quote(DOCS, f"and 0.001, is {THREE}. Selected", lambda: hypo_lead(NLL, *world.EPSILONS)),
    Quote(DOCS, f"by true reward it is {THREE}: at", lambda: hypo_lead(NLL, *world.EPSILONS, rule="reward")),
    Quote(
        DOCS,
        f"extrapolation it is {THREE} by the main rule: NLL",
        lambda: hypo_lead(NLL, *world.EPSILONS, pairs="covering"),
    ),
    Quote(
        DOCS,
        "is {} by the main rule and {} by most KL at ε 0.01; at ε 0.1 it is {} and {}.",
        lambda: [
            value
            for epsilon in (0.01, 0.1)
            for rule in ("accuracy", "kl")
            for value in hypo_lead(NLL, epsilon, rule=rule, budget=4)
        ],
    ),
    *(
        Quote(
            DOCS,
            f"{start} {THREE} by the main rule and {THREE} by most KL",
            lambda pairs=pairs: [
                value
                for rule in ("accuracy", "kl")
                for value in hypo_lead("χPO", *world.EPSILONS, pairs=pairs, rule=rule)
            ],
        )
        for start, pairs in (("lead over it is", "covering"), ("With silent pairs it is", "silent"))
    ),
    Quote(
        DOCS,
        "DPO's true reward rises to {} at step 100 and ends at {}, with a mass of {} on",
        lambda: two_digits(
            [curve("DPO β 0.1", "reward", 2), curve("DPO β 0.1", "reward"), curve("DPO β 0.1", "uncovered")]
        ),
    ),
    Quote(
        DOCS,
        "HyPO (λ 0.03) ends at {}, DPO + NLL (0.01) at {}, with masses of {} and {}.",
        lambda: two_digits(
            [
                curve(setting, metric)
                for metric in ("reward", "uncovered")
                for setting in ("HyPO β 0.1 λ 0.03", "DPO + NLL β 0.1 NLL 0.01")
            ]
        ),
    ),
    Quote(
        DOCS,
        "32 prompts give {}, {}, {} and {}; at most 3, {}, {}, {} and {}.",
        lambda: [drawn(name, budget) for budget in ("2", "3") for name in (ALL_PROMPTS, *FEWER)],
    ),
    Quote(
        DOCS,
        "from that of all prompts by {}, its uncovered mass is {} instead of {}. For a half and a quarter it differs "
        "by {} and {}.",
        lambda: [
            loss_at_the_end(FEWER[2]),
            *(mean(at_the_end(name, "uncovered")) for name in (FEWER[2], ALL_PROMPTS)),
            *map(loss_at_the_end, FEWER[:2]),
        ],
    ),
    Quote(
        DOCS,
        "4 steps gives {} and {} at a KL of at most 2, and differs by {} and {} at the end.",
        lambda: [of(name) for of in (drawn, loss_at_the_end) for name in ("1, 2", "1, 4")],
    ),
    Quote(
        DOCS,
        "is {} and {} behind it",
        lambda: [value.split(" ± ")[0].removeprefix("+") for value in hypo_lead(NLL, 0.1, 0.01)],
    ),
    Quote(
        DOCS,
        f"candidates have a KL of {{}} (DPO), {{}} (HyPO) and {{}} (DPO + NLL). By most KL they have {THREE}.",
        lambda: [
            value
            for rule in ("accuracy", "kl")
            for value in two_digits(of_candidates("kl", 0.1, "DPO", "HyPO", NLL, rule=rule))
        ],
    ),
]
QUOTES = [*COSTS, *SMALL, *THEORY, *ENDS_LOWER, *ONLINE, *DEMO, *INTERACTION]


@pytest.mark.parametrize("quote", QUOTES, ids=str)
def test_a_quote_is_what_the_data_says(quote):
    assert quote.written() in text(quote.page)


@dataclass(frozen=True)
class Section:
    """A part of a page all of whose decimal numbers are quotes, but for ``others``, which are no results of ours."""

    page: str
    start: str
    end: str
    others: str  # numbers, separated by spaces

    def __str__(self) -> str:
        return f"{self.page}: {self.start}"


COMPLETE = [
    Section(PAPER, "## The theory, computed", "## Table 1 and", "0.9 1e-8 1e-64"),
    # 0.9: million parameters; 1.7 and 1.4: the paper's Table 1.
    Section(PAPER, "## Table 1 and Figure 1, in small", "", "0.9 1.7 1.4"),
    # ε of the worlds, a budget of KL, and weights of the NLL.
    Section(
        DOCS, "## Coverage \N{MULTIPLICATION SIGN} method", "## The paper, in small", "0.1 0.01 0.001 0.5 0.03 0.06"
    ),
    # The paper's Table 1.
    Section(DOCS, "## The paper, in small", "", "42.2 0.16 44.9 44.4 2.43 69.0 46.4 0.37 27.1 50.5 2.51 49.0"),
    Section(README, "What an online step costs.", "What HyPO changes.", "1.16"),  # TRL's version
    # TRL's version; the steps of 32 pairs on chat, of which no raw data was kept.
    Section(DOCS, "## What an online step costs", "### Earlier figures", "1.16 0.125 29.8 48.2 1.62 41.2 1.38 18.4"),
]


@pytest.mark.parametrize("section", COMPLETE, ids=str)
def test_no_number_of_a_section_is_unchecked(section):
    part = text(section.page).split(section.start, 1)[1]
    part = part.split(section.end, 1)[0] if section.end else part
    no_results = (
        r"[βλ]( of| is| ≥| ≤)? [\d.]+\d",  # settings
        r"(Proposition|Theorem|Lemma|Remark|Example|section)s? [\d., and]+",
        r"\d.\dB",  # models
    )
    known = [re.escape(quote.written()) for quote in QUOTES] + list(no_results)
    spans = [match.span() for pattern in known for match in re.finditer(pattern, part)]
    numbers = [
        match[0]
        for match in re.finditer(r"(?<![\w.])\d+\.\d+|\d+e-\d+", part)
        if not any(start <= match.start() and match.end() <= end for start, end in spans)
    ]
    assert [number for number in numbers if number not in section.others.split()] == []


def test_the_recorded_tables_are_those_of_the_recorded_numbers():
    found = {
        name: [
            Outcome([Evaluation(**e) for e in seed["evaluations"]], seed["learned"], seed["flops"]) for seed in seeds
        ]
        for name, seeds in data("small").items()
    }
    lines = (RESULTS / "small.md").read_text(encoding="utf-8").splitlines()
    tables = [*report.table_1(found), *report.frontier_table(found), *report.estimates_table(found)]
    assert [line for line in lines if line.startswith("|")] == tables


def test_the_tables_of_the_interaction_are_those_of_its_numbers():
    written = (RESULTS / "interaction.md").read_text(encoding="utf-8").splitlines()
    assert written == list(leads.lines(data("interaction")))


def test_readme_quotes_the_demo_as_the_documentation_does():
    readme, docs = (text(page) for page in (README, DOCS))
    [ours] = re.findall(r"reverse KL to SFT, nats a response \|(.*?)It shows", readme)
    theirs = docs.split("## What HyPO changes", 1)[1]
    for method in ("DPO", "HyPO"):
        [short] = re.findall(rf"\| {method} \| (\S+ ± \S+) \| (\S+ ± \S+) \| (\S+ ± \S+) \|", ours)
        [long] = re.findall(rf"\| {method} \| (\S+ ± \S+) \| (\S+ ± \S+) \| \S+ ± \S+ \| (\S+ ± \S+) \|", theirs)
        assert short[:2] == long[:2]
        assert short[2] == " ± ".join(f"{float(value):.1f}" for value in long[2].split(" ± "))
