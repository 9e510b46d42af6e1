"""Compare every preference loss with "sigmoid": CPU seconds and peak memory of forward and backward.

``python -m benchmarks.each_loss [rows vocabulary width rounds]``. The time is that of this process on one thread, so
that other programs on the machine disturb it less than a clock. Each loss takes turns with "sigmoid", and the table
has the median of the ratios of neighbours. "sigmoid" against itself shows the noise. ``own us`` is the least time of
what the losses do differently: a loss of the pairs with its derivatives, once a chunk.
"""

from __future__ import annotations

import math
import statistics
import sys
import time

import torch
from torch import Tensor

from benchmarks.measure import Step, peak_extra_bytes
from hypo_kernels import Pairs, fused_preference_loss
from hypo_kernels.losses import LOSSES, BCOPair, Sigmoid, Weighted
from hypo_kernels.pairs import PairLoss, pair_terms

NUM_PAIRS = 8


def by_autograd(pairs: Pairs) -> Tensor:
    """DPO as a function of a user, without a closed form."""
    return torch.nn.functional.softplus(-0.1 * (pairs.chosen_ratios - pairs.rejected_ratios))


def losses() -> dict[str, PairLoss]:
    named: dict[str, PairLoss] = {name: loss() for name, loss in LOSSES.items()}
    lists = {"sigmoid + bco_pair + sft (MPO)": Weighted([Sigmoid(), BCOPair(), LOSSES["sft"]()], [0.8, 0.2, 1.0])}
    return {**named, **lists, "a user's function": by_autograd}


def make_step(loss: PairLoss, rows: int, vocabulary: int, width: int) -> Step:
    gen = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, width, generator=gen).requires_grad_()
    weight = (torch.randn(vocabulary, width, generator=gen) / width**0.5).requires_grad_()
    targets = torch.randint(vocabulary, (rows,), generator=gen)
    bounds = torch.linspace(0, rows, 2 * NUM_PAIRS + 1).long()
    ref_logps = torch.full((2 * NUM_PAIRS,), -9.0 * rows / (2 * NUM_PAIRS))
    scores = {f"{side}_scores": torch.randn(NUM_PAIRS, generator=gen) for side in ("chosen", "rejected")}

    def step() -> None:
        hidden.grad = weight.grad = None
        out = fused_preference_loss(
            hidden, weight, targets, bounds, loss=loss, num_pairs=NUM_PAIRS, ref_logps=ref_logps, pair_tensors=scores
        )
        out.loss.backward()

    return step


def own_seconds(loss: PairLoss) -> float:
    """Return the least seconds of the loss of ``NUM_PAIRS`` pairs with its derivatives."""
    chosen, rejected, ref_chosen, ref_rejected = (torch.rand(4, NUM_PAIRS) - 9).unbind()
    lengths = torch.full((NUM_PAIRS,), 64.0)
    points = {name: torch.rand(NUM_PAIRS) for name in ("chosen_scores", "rejected_scores", "kl")}
    tokens = 64 * NUM_PAIRS
    pairs = Pairs(chosen, rejected, ref_chosen, ref_rejected, lengths, lengths, NUM_PAIRS, tokens, points)
    return min(seconds(lambda: pair_terms(loss, pairs)) for _ in range(500))


def seconds(step: Step) -> float:
    start = time.process_time()
    step()
    return time.process_time() - start


def main(rows: int = 1024, vocabulary: int = 8192, width: int = 256, rounds: int = 10) -> None:
    torch.set_num_threads(1)
    steps = {name: make_step(loss, rows, vocabulary, width) for name, loss in losses().items()}
    sigmoid, ratios = steps["sigmoid"], {name: list[float]() for name in steps}
    fastest = math.inf
    for turn in range(-1, rounds):  # the first round warms up
        for name, step in steps.items():
            if turn % 2:
                own, base = seconds(step), seconds(sigmoid)
            else:
                base, own = seconds(sigmoid), seconds(step)
            fastest = min(fastest, base)
            if turn >= 0:
                ratios[name].append(own / base)
    print(f"{rows} rows x V={vocabulary} x D={width}, {NUM_PAIRS} pairs, float32, trained head, {rounds} rounds")
    print(f"sigmoid takes {fastest:.3f} s at best")
    print(f"{'loss':32}{'x sigmoid':>10}{'IQR':>8}{'own us':>9}{'peak MiB':>10}")
    for name, step in steps.items():
        low, middle, high = statistics.quantiles(ratios[name], n=4)
        peak = peak_extra_bytes(step, torch.device("cpu"))[1]
        print(f"{name:32}{middle:10.3f}{high - low:8.3f}{1e6 * own_seconds(losses()[name]):9.0f}{peak / 2**20:10.1f}")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
