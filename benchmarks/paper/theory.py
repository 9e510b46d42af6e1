"""Compute the paper's theory in its own worlds: ``python -m benchmarks.paper.theory``.

Each bound stands beside what happened: Proposition 4.1, Theorems 4.1, 4.2 and D.1 in the world of three responses and
in those of Figure 2, Lemmas A.1 and 4.1 in random worlds, Remark 4.1, Example 6.1, and Figure 2 under other readings of
its features. Exact and seeded, in float64, half a minute. It writes ``theory.md`` and its numbers, ``theory.json``.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.paper import constants
from benchmarks.paper.bandit import (
    Gradient,
    Linear,
    Pairs,
    World,
    hypo,
    independent_world,
    learned_rewards,
    linear_world,
    online_rl,
    preference,
    reverse_kl,
    train,
)
from benchmarks.paper.counterexamples import BETA, OUTSIDE, three_responses, uncovered

RESULTS = Path(__file__).parent / "results"
EPSILONS = (1e-2, 1e-4, 1e-8, 1e-16, 1e-64)
REWARD_BOUND = 1.0  # R′ of Assumption 4.4 in the world of three responses, whose true rewards are 1, 0, 0
FIGURE_2_BETA, FIGURE_2_KL_COEF = 0.5, 0.02
BANDIT_BETA, BANDIT_KL_COEF = 5.0, 0.1
READINGS: dict[str, dict[str, Any]] = {
    "L2 norm, last θ*/‖θ*‖": {"norm": 2, "last": "θ*"},
    "L1 norm, last e₁": {"norm": 1, "last": "e₁"},
    "L2 norm, last e₁": {"norm": 2, "last": "e₁"},
}
Row = dict[str, float]


def three_response_rows() -> list[dict[str, Any]]:
    """Return, for each mass ε of the reference on the third response, the J gaps and bounds of three policies.

    - DPO: the counterexample of Proposition 4.1, with 0.9 of its mass on the third response.
    - RLHF: the best policy for a learned reward that is right on the covered responses and, on the third, as wrong as
      the bound R′ of Assumption 4.4 permits.
    - HyPO: the minimum of its loss.
    """
    found = uncovered(EPSILONS)
    world = three_responses(torch.tensor(EPSILONS, dtype=torch.float64))
    wrong = world.rewards.clone()
    wrong[:, 2] = REWARD_BOUND
    policies = {
        "dpo": found.log_probs["dpo"],
        "rlhf": constants.optimal(wrong, world.log_ref, beta=BETA),
        "hypo": found.hypo_log_probs,
    }
    kl = 2 * REWARD_BOUND / BETA  # Lemma 4.1
    best = constants.optimal(world.rewards, world.log_ref, beta=BETA)
    columns = {
        "epsilon": found.epsilons,
        "global": constants.global_coverage(world.log_ref),
        "local": constants.local_coverage(world.log_ref, kl),
    }
    for name, log_pi in policies.items():
        errors = world.rewards - constants.implicit_rewards(log_pi, world.log_ref, beta=BETA)
        errors = errors - errors[:, :1]
        if name != "hypo":
            errors[:, 1] = 0.0  # exact by construction; rounding would drown an ε of 1e-64
        error = constants.pair_error(errors, world.log_ref)
        realised = torch.maximum(*(constants.realised_coverage(p, world.log_ref) for p in (best, log_pi)))
        columns |= {
            f"{name}_gap": constants.gap(log_pi, world.rewards, world.log_ref, beta=BETA),
            f"{name}_error": error,
            f"{name}_realised": realised,
            f"{name}_bound": columns["global" if name == "dpo" else "local"] * error.sqrt(),
            f"{name}_realised_bound": realised * error.sqrt(),
        }
    return _rows(columns)


def _rows(columns: dict[str, Tensor]) -> list[dict[str, Any]]:
    lists = {name: column.tolist() for name, column in columns.items()}
    return [dict(zip(lists, values, strict=True)) for values in zip(*lists.values(), strict=True)]


def figure_2_rows(seeds: Sequence[int]) -> dict[str, list[Row]]:
    """Return each method's J gap, errors and bounds in the worlds of Figure 2, left, a row per seed."""
    world = linear_world(seeds)
    rewards = learned_rewards(world, steps=2000, learning_rate=20.0)
    coverage = constants.linear_coverage(world.features, world.pairs.shares)
    found = {}
    for name, log_pi in _trained(world, rewards).items():
        columns = _judged(world, log_pi, beta=FIGURE_2_BETA)
        found[name] = _rows({**columns, "linear_bound": coverage * columns["error_on_pairs"].sqrt()})
    return found


def figure_2_right_rows(seeds: Sequence[int]) -> dict[str, list[Row]]:
    """Return the same for DPO and HyPO without features (Figure 2, right). No linear bound is finite there."""
    world = independent_world(seeds)
    methods = {
        "DPO": preference(world, beta=BANDIT_BETA),
        "HyPO": hypo(world, beta=BANDIT_BETA, kl_coef=BANDIT_KL_COEF),
    }
    return {
        name: _rows(_judged(world, _end_of_training(world, gradient, 20_000, 1.0), beta=BANDIT_BETA))
        for name, gradient in methods.items()
    }


def _judged(world: World, log_pi: Tensor, *, beta: float) -> dict[str, Tensor]:
    """Return J gap, KL, errors and the bounds of Theorems 4.1 and D.1, each (S,), of a policy (S, K)."""
    best = constants.optimal(world.rewards, world.log_ref, beta=beta)
    errors = world.rewards - constants.implicit_rewards(log_pi, world.log_ref, beta=beta)
    n = world.num_paired
    between = (errors[:, :n, None] - errors[:, None, :n]).square()
    by_reference = constants.pair_error(errors, world.log_ref)
    kl = torch.maximum(reverse_kl(best, world.log_ref), reverse_kl(log_pi, world.log_ref))
    return {
        "gap": constants.gap(log_pi, world.rewards, world.log_ref, beta=beta),
        "kl": reverse_kl(log_pi, world.log_ref),
        "error": by_reference,
        "bound": constants.global_coverage(world.log_ref) * by_reference.sqrt(),
        "local_bound": constants.local_coverage(world.log_ref, kl) * by_reference.sqrt(),
        "error_on_pairs": (world.pairs.shares * between).sum((1, 2)),
    }


def _end_of_training(world: World, gradient: Gradient, steps: int, learning_rate: float) -> Tensor:
    """Return log π (S, K) of a log-linear policy after gradient descent."""
    policy = Linear(world.features)
    curves = train(policy, gradient, lambda p: {"p": p}, steps=steps, points=1, learning_rate=learning_rate)
    return curves["p"][-1]


def _trained(world: World, rewards: Tensor) -> dict[str, Tensor]:
    """Return log π (S, K) at the end of the training of each method of Figure 2."""
    methods = {
        "online RL": (online_rl(rewards, world.log_ref, beta=FIGURE_2_BETA), 0.1),
        "DPO": (preference(world, beta=FIGURE_2_BETA), 1.0),
        "HyPO": (hypo(world, beta=FIGURE_2_BETA, kl_coef=FIGURE_2_KL_COEF), 1.0),
    }
    return {name: _end_of_training(world, gradient, 5000, rate) for name, (gradient, rate) in methods.items()}


def readings_rows(seeds: Sequence[int]) -> dict[str, dict[str, list[bool]]]:
    """Return, for each reading of Figure 2's features, what holds in each seed at the end of the training."""
    found: dict[str, dict[str, list[bool]]] = {}
    for reading, options in READINGS.items():
        world = linear_world(seeds, **options)
        last = torch.full_like(world.best, world.rewards.shape[1] - 1)
        found[reading] = {"last_is_best": (world.best == last).squeeze(1).tolist()}
        rewards = learned_rewards(world, steps=2000, learning_rate=20.0)
        for name, log_pi in _trained(world, rewards).items():
            rises = (log_pi - world.log_ref).gather(1, world.best).squeeze(1) > 0
            falls = world.pairs.of_preferred(log_pi - world.log_ref) < 0
            found[reading][name] = (rises & falls).tolist()
    return found


def random_worlds(count: int, seed: int = 0) -> dict[str, float]:
    """Return the largest KL(π) / (2R′/β) and the largest J gap / bound of Lemma A.1 over random worlds.

    Each has 2 to 200 responses, a β from 0.01 to 10 and true and learned rewards within ± R′ = ± 1. The reference is a
    softmax of normal logits times 0 to 5.
    """
    generator = torch.Generator().manual_seed(seed)
    kl_shares, gap_shares = [], []
    for _ in range(count):
        k = int(torch.randint(2, 201, (1,), generator=generator))
        beta = 10 ** float(torch.empty(1).uniform_(-2, 1, generator=generator))
        spread = float(torch.empty(1).uniform_(0, 5, generator=generator))
        log_ref = (spread * torch.randn(k, generator=generator, dtype=torch.float64)).log_softmax(0)
        true, learned = torch.empty(2, k, dtype=torch.float64).uniform_(-1, 1, generator=generator)
        log_pi = constants.optimal(learned, log_ref, beta=beta)
        kl_shares.append(float((log_pi.exp() * (log_pi - log_ref)).sum()) / (2 / beta))
        best, error = constants.optimal(true, log_ref, beta=beta), true - learned
        lemma_a1 = float(((best.exp() - log_pi.exp()) * error).sum())
        gap_shares.append(float(constants.gap(log_pi, true, log_ref, beta=beta)) / lemma_a1)
    return {"worlds": count, "kl": max(kl_shares), "gap": max(gap_shares)}


def tightest_lemma_4_1(limits: Sequence[float] = (1.0, 10.0, 100.0)) -> list[Row]:
    """Return how much of Lemma 4.1's bound 2R′/β the KL of a policy can reach with two responses, for each bound.

    One response has the learned reward R′ and the reference's mass p, the other has −R′. The largest KL is over p.
    """
    rows = []
    for limit in limits:
        log_p = torch.linspace(-limit - 20, -1e-3, 200_001, dtype=torch.float64)
        log_ref = torch.stack([log_p, torch.log(-torch.expm1(log_p))], dim=1)
        kl = reverse_kl(constants.optimal(torch.tensor([limit, 0.0]).double(), log_ref, beta=1.0), log_ref)
        rows.append({"bound": limit, "kl": float(kl.max()), "mass": float(log_p[kl.argmax()].exp())})
    return rows


def remark_4_1(kl: float = 1.0) -> list[Row]:
    """Return log C_KL of a KL ball for each mass ε of the reference on a response, and KL / π of the policy there."""
    log_p = torch.tensor(EPSILONS, dtype=torch.float64).log()
    log_ref = torch.stack([log_p, torch.log(-torch.expm1(log_p))], dim=1)
    q = constants.heaviest(log_ref, kl)[:, 0]
    return _rows({"epsilon": log_p.exp(), "mass": q, "log_local": q.log() - log_p, "log_reading": kl / q})


def example_6_1(betas: Sequence[float] = (1.0, 3.0, 10.0)) -> list[Row]:
    """Return the probabilities of the three responses under DPO's and the RLHF policy, for each β.

    Reading: φ = (1, 0), (½, ½), (0, 1), uniform reference, r* = ⟨(1, 10), φ⟩, infinitely many pairs of the first two.
    Features that are shared let the pairs speak about the third, which is the best.
    """
    world, rows = example_world(), []
    for beta in betas:
        log_dpo = _end_of_training(world, preference(world, beta=beta), 5000, 40 / beta**2)
        log_rlhf = constants.optimal(world.rewards, world.log_ref, beta=beta)
        columns = {f"dpo_{i + 1}": log_dpo[:, i].exp() for i in range(3)}
        columns |= {f"rlhf_{i + 1}": log_rlhf[:, i].exp() for i in range(3)}
        rows.append({"beta": beta, **_rows(columns)[0]})
    return rows


def example_world() -> World:
    """Create the world of Example 6.1, as read."""
    features = torch.tensor([[1.0, 0.0], [0.5, 0.5], [0.0, 1.0]], dtype=torch.float64)
    rewards = features @ torch.tensor([1.0, 10.0], dtype=torch.float64)
    p = torch.sigmoid(rewards[0] - rewards[1])
    shares = torch.stack([torch.zeros_like(p), p, 1 - p, torch.zeros_like(p)]).view(1, 2, 2)
    return World(rewards[None], features[None], torch.full((1, 3), 1 / 3, dtype=torch.float64).log(), Pairs(shares))


def compute(seeds: Sequence[int]) -> dict[str, Any]:
    """Return all numbers, as ``theory.json`` holds them."""
    return {
        "three_responses": three_response_rows(),
        "figure_2": figure_2_rows(seeds),
        "figure_2_right": figure_2_right_rows(seeds),
        "readings": readings_rows(seeds),
        "random_worlds": random_worlds(2000),
        "lemma_4_1": tightest_lemma_4_1(),
        "remark_4_1": remark_4_1(),
        "example_6_1": example_6_1(),
    }


def report(found: dict[str, Any]) -> Iterator[str]:
    """Yield the lines of ``theory.md``."""
    rows, seeds = found["three_responses"], len(found["figure_2"]["DPO"])
    methods = ("dpo", "rlhf", "hypo")
    yield f"`python -m benchmarks.paper.theory --seeds {seeds}`; exact, in float64."
    yield from _section(
        f"**Proposition 4.1**, its own statement: J(π*) - J(π) in the world of three responses, β {BETA:g}, and the "
        "mean squared error of the reward's differences under π_ref. DPO's policy is the counterexample, with "
        f"{OUTSIDE:g} on the third response. RLHF's reward there is as wrong as its bound R' = 1 permits. HyPO's "
        "policy is the minimum of its loss",
        ["ε", "DPO: J gap", "error", "RLHF: J gap", "error", "HyPO: J gap", "error"],
        [
            [f"{r['epsilon']:.0e}"]
            + [cell for m in methods for cell in (_short(r[f"{m}_gap"]), f"{r[f'{m}_error']:.1e}")]
            for r in rows
        ],
    )
    yield from _section(
        "**Theorems 4.1, 4.2 and D.1** in the same world: the bound C √error, with C = C_glo for DPO, and C_KL of the "
        f"ball of 2R'/β = {2 * REWARD_BOUND / BETA:g} nats for RLHF and HyPO. *Realised*: C is the largest π / π_ref "
        "of π* and π",
        ["ε", "C_glo", "C_KL", "DPO: bound", "realised", "RLHF: bound", "realised", "HyPO: bound", "realised"],
        [
            [f"{r[c]:.0e}" for c in ("epsilon", "global", "local")]
            + [f"{r[f'{m}_{b}']:.1e}" for m in methods for b in ("bound", "realised_bound")]
            for r in rows
        ],
    )
    yield from _section(
        f"**The same in the worlds of Figure 2, left** (β {FIGURE_2_BETA:g}, C_glo = 100, mean ± standard error of "
        f"{seeds} seeds). C_KL is that of the larger KL of π* and π. The linear bound is that of section 6, from the "
        "error on the data's pairs",
        ["method", "J gap", "reverse KL", "C_glo √error", "C_KL √error", "linear bound"],
        [
            [name, *(_mean([s[c] for s in of]) for c in ("gap", "kl", "bound", "local_bound", "linear_bound"))]
            for name, of in found["figure_2"].items()
        ],
    )
    yield from _section(
        f"**And in those of Figure 2, right** (β {BANDIT_BETA:g}, C_glo = 100, no features, so the linear bound is "
        "infinite), with the root of the mean squared error on the data's pairs and on pairs from π_ref",
        ["method", "J gap", "reverse KL", "√error, data", "√error, π_ref", "C_glo √error", "C_KL √error"],
        [
            [
                name,
                *(_mean([s[c] for s in of]) for c in ("gap", "kl")),
                *(_mean([math.sqrt(s[c]) for s in of]) for c in ("error_on_pairs", "error")),
                *(_mean([s[c] for s in of]) for c in ("bound", "local_bound")),
            ]
            for name, of in found["figure_2_right"].items()
        ],
    )
    worlds = found["random_worlds"]
    yield from _section(
        f"**Lemmas A.1 and 4.1** in {worlds['worlds']:,} random worlds: the KL of the best policy for a reward within "
        f"± R' is at most {worlds['kl']:.2f} of the bound 2R'/β, and the J gap at most {worlds['gap']:.2f} of Lemma "
        "A.1's bound. With two responses, chosen for it, the KL comes nearer to its bound",
        ["2R'/β, nats", "largest KL", "share", "at the reference's mass"],
        [
            [f"{r['bound']:g}", f"{r['kl']:.3g}", f"{r['kl'] / r['bound']:.2f}", f"{r['mass']:.1e}"]
            for r in found["lemma_4_1"]
        ],
    )
    yield from _section(
        "**Remark 4.1**: the logarithm of the largest π / π_ref within a KL ball of 1 nat, for a response with mass ε "
        "under π_ref. Reading: it is as large as exp(KL / π) for the mass π of this response under that policy",
        ["ε", "π", "log C_KL", "KL / π"],
        [
            [f"{r['epsilon']:.0e}", f"{r['mass']:.4f}", f"{r['log_local']:.2f}", f"{r['log_reading']:.2f}"]
            for r in found["remark_4_1"]
        ],
    )
    yield from _section(
        "**Example 6.1**: probabilities of the two responses of the pairs and of the best response, which is in no "
        "pair. All are ⅓ under π_ref. DPO is trained; RLHF is the best policy for the true reward",
        ["β", "DPO: rejected", "chosen", "best", "RLHF: rejected", "chosen", "best"],
        [
            [f"{r['beta']:g}", *(f"{r[f'{m}_{i}']:.2g}" for m in ("dpo", "rlhf") for i in (1, 2, 3))]
            for r in found["example_6_1"]
        ],
    )
    yield from _section(
        "**Figure 2 under other readings** of its features: the seeds in which the last response is the best, and "
        "those in which the best response's probability rises and that of the preferred ones falls",
        ["reading", "last is best", "online RL", "DPO", "HyPO"],
        [[name, *(f"{sum(holds)} of {len(holds)}" for holds in of.values())] for name, of in found["readings"].items()],
    )


def _section(text: str, columns: list[str], rows: list[list[str]]) -> list[str]:
    """Return the lines of a paragraph and a Markdown table."""
    table = [f"| {' | '.join(cells)} |" for cells in (columns, *rows)]
    return ["", text, "", table[0], "|" + "---|" * len(columns), *table[1:]]


def _short(value: float) -> str:
    return f"{value:.1f}" if value >= 1 else f"{value:.2g}"


def _mean(values: Sequence[float]) -> str:
    error = f" ± {statistics.stdev(values) / math.sqrt(len(values)):.2g}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.3g}{error}"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.paper.theory", description=__doc__)
    parser.add_argument("--seeds", type=int, default=10, help="how many worlds of Figure 2 (default: %(default)s)")
    parser.add_argument("--output_dir", type=Path, default=RESULTS, help="for theory.md and theory.json")
    options = parser.parse_args(argv)
    if options.seeds < 1:
        parser.error(f"--seeds {options.seeds}: at least 1")
    torch.set_num_threads(1)
    found = compute(range(options.seeds))
    text = "\n".join(report(found)) + "\n"
    options.output_dir.mkdir(parents=True, exist_ok=True)
    (options.output_dir / "theory.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    (options.output_dir / "theory.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
