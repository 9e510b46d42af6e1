"""Run the paper's synthetic experiments and counterexamples: ``python -m benchmarks.paper.coverage``.

Figure 2 (section 6.1): with linear features, online RL and DPO raise the probability of the best response, which is in
no pair, and lower that of the preferred responses. Without features, DPO's probabilities outside the data depend on the
parametrisation of the policy. Then Propositions 4.1, B.1 and B.2. HyPO is added to each. Everything is exact and
seeded; ``make paper`` writes the tables and pictures to ``benchmarks/paper/results``.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.paper import pictures
from benchmarks.paper.bandit import (
    Gradient,
    Linear,
    Policy,
    Weights,
    hypo,
    independent_world,
    learned_rewards,
    linear_world,
    online_rl,
    preference,
    reverse_kl,
    train,
)
from benchmarks.paper.counterexamples import OUTSIDE, Uncovered, forward_kl, uncovered

RESULTS = Path(__file__).parent / "results"
# The paper gives neither; β is as small as rewards of this size allow, because log-ratios are rewards / β.
BETA, KL_COEF = 0.5, 0.02
BANDIT_BETA, BANDIT_KL_COEF = 5.0, 0.1
Curves = dict[str, Tensor]  # each (points + 1, S)


def extrapolation(seeds: Sequence[int]) -> dict[str, Curves]:
    """Train online RL, DPO and HyPO with linear features; return log-probs of the preferred and the best responses."""
    world = linear_world(seeds)
    rewards = learned_rewards(world, steps=2000, learning_rate=20.0)
    methods = {
        "online RL": (online_rl(rewards, world.log_ref, beta=BETA), 0.1),
        "DPO": (preference(world, beta=BETA), 1.0),
        "HyPO": (hypo(world, beta=BETA, kl_coef=KL_COEF), 1.0),
    }

    def watched(log_pi: Tensor) -> dict[str, Tensor]:
        return {
            "preferred": world.pairs.of_preferred(log_pi),
            "best": log_pi.gather(1, world.best).squeeze(1),
            "kl": reverse_kl(log_pi, world.log_ref),
        }

    return {
        name: train(Linear(world.features), gradient, watched, steps=5000, learning_rate=learning_rate)
        for name, (gradient, learning_rate) in methods.items()
    }


def outside_the_data(seeds: Sequence[int]) -> dict[str, Curves]:
    """Train DPO and HyPO without features; return the mean probability ratio of the responses that are in no pair."""
    world = independent_world(seeds)
    n = world.num_paired

    def watched(log_pi: Tensor) -> dict[str, Tensor]:
        return {"outside": (log_pi - world.log_ref)[:, n:].exp().mean(1), "kl": reverse_kl(log_pi, world.log_ref)}

    dpo, with_kl = preference(world, beta=BANDIT_BETA), hypo(world, beta=BANDIT_BETA, kl_coef=BANDIT_KL_COEF)
    runs: dict[str, tuple[Policy, Gradient, float]] = {
        "DPO, softmax": (Linear(world.features), dpo, 1.0),
        "HyPO, softmax": (Linear(world.features), with_kl, 1.0),
        "DPO, weights": (Weights(world.rewards), dpo, 0.08),
        "HyPO, weights": (Weights(world.rewards), with_kl, 0.08),
    }
    return {
        name: train(policy, gradient, watched, steps=20_000, learning_rate=learning_rate)
        for name, (policy, gradient, learning_rate) in runs.items()
    }


def figure_2_table(linear: dict[str, Curves], bandit: dict[str, Curves]) -> Iterator[str]:
    """Return a Markdown table of each method's start and end, mean ± standard error over the seeds."""
    yield "**With linear features** (left and middle of the picture): log-probabilities, nats"
    yield ""
    yield "| method | preferred: start | end | best: start | end | reverse KL | both claims hold |"
    yield "|---|---|---|---|---|---|---|"
    for name, found in linear.items():
        falls, rises = found["preferred"][-1] < found["preferred"][0], found["best"][-1] > found["best"][0]
        cells = [
            _start(found["preferred"]), _end(found["preferred"]), _start(found["best"]), _end(found["best"]),
            _end(found["kl"]), _how_often(falls & rises),
        ]  # fmt: skip
        yield f"| {name} | {' | '.join(cells)} |"
    yield ""
    yield "**Without features** (right): mean probability of a response outside the data, over the reference's"
    yield ""
    yield "| method, parametrisation | start | end | reverse KL | it rises |"
    yield "|---|---|---|---|---|"
    for name, found in bandit.items():
        outside = found["outside"]
        cells = [_start(outside), _end(outside), _end(found["kl"]), _how_often(outside[-1] > outside[0])]
        yield f"| {name} | {' | '.join(cells)} |"


def counterexamples_table(found: Uncovered) -> Iterator[str]:
    """Yield Markdown tables of Propositions 4.1 and B.1 (over the reference's mass ε on the third response) and B.2."""
    yield (
        f"**Propositions 4.1 and B.1**: a policy with {OUTSIDE:g} of its mass on the third response. Its loss is the "
        "least there is, whatever that mass"
    )
    yield ""
    columns = ["ε"]
    for name in ("DPO", "IPO"):
        columns += [f"{name}: loss above the least", "reverse KL"]
    yield f"| {' | '.join([*columns, 'HyPO: reverse KL', 'bound', 'mass outside'])} |"
    yield "|---|---|---|---|---|---|---|---|"
    above = {name: found.loss[name] - found.least_loss[name] for name in found.loss}
    for i, epsilon in enumerate(found.epsilons.tolist()):
        cells = [
            f"{epsilon:.0e}",
            f"{above['dpo'][i]:.0e}", f"{found.kl['dpo'][i]:.2f}",
            f"{above['ipo'][i]:.0e}", f"{found.kl['ipo'][i]:.2f}",
            f"{found.kl['hypo'][i]:.3f}", f"{found.kl_bound[i]:.3f}", f"{found.hypo_log_probs[i, 2].exp():.1e}",
        ]  # fmt: skip
        yield f"| {' | '.join(cells)} |"
    yield ""
    yield "**Proposition B.2**: a reward that is wrong about one response of n"
    yield ""
    yield "| n | error of its reward | mean squared error | forward KL, nats |"
    yield "|---|---|---|---|"
    for responses in (1e2, 1e4, 1e6, 1e8, 1e12, 1e16):
        line = forward_kl(responses)
        yield f"| {line.responses:.0e} | {line.error:.3g} | {line.mean_squared_error:.1e} | {line.forward_kl:.3g} |"


def _start(curve: Tensor) -> str:
    return _mean(curve[0])


def _end(curve: Tensor) -> str:
    return _mean(curve[-1])


def _mean(values: Tensor) -> str:
    return f"{values.mean():.3g} ± {standard_error(values):.2g}"


def standard_error(values: Tensor) -> float:
    """Return the standard error of the mean over the seeds in the last dimension."""
    return float(values.std()) / math.sqrt(len(values)) if len(values) > 1 else float("nan")


def _how_often(holds: Tensor) -> str:
    return f"{int(holds.sum())} of {len(holds)} seeds"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.paper.coverage", description=__doc__)
    parser.add_argument("--seeds", type=int, default=10, help="how many worlds of each kind (default: %(default)s)")
    parser.add_argument("--output_dir", type=Path, default=RESULTS, help="for coverage.md and its pictures")
    options = parser.parse_args(argv)
    if options.seeds < 1:
        parser.error(f"--seeds {options.seeds}: at least 1")
    torch.set_num_threads(1)
    started, seeds = time.perf_counter(), range(options.seeds)
    linear, bandit, counterexamples = extrapolation(seeds), outside_the_data(seeds), uncovered()
    options.output_dir.mkdir(parents=True, exist_ok=True)
    drawn = [
        pictures.figure_2(linear, bandit, options.output_dir / "figure2.png"),
        pictures.counterexamples(counterexamples, options.output_dir / "counterexamples.png"),
    ]
    lines = [
        f"`python -m benchmarks.paper.coverage --seeds {options.seeds}`; ± is the standard error over the seeds.",
        "",
        *figure_2_table(linear, bandit),
        "",
        f"![Figure 2, and HyPO]({drawn[0].name})",
        "",
        *counterexamples_table(counterexamples),
        "",
        f"![Reverse KL]({drawn[1].name})",
    ]
    (options.output_dir / "coverage.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))
    print(f"\n{options.output_dir / 'coverage.md'}, in {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
