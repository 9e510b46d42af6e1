"""Compute the paper's counterexamples: three responses, of which the data covers two.

The data only compares the two covered responses. So a policy may put any mass on the third response and still minimize
DPO's or IPO's loss, while its reverse KL to the reference grows without bound as the reference's mass ε on the third
response goes to 0 (Propositions 4.1 and B.1). A reward that is wrong only on a vanishing share of the data may still
have a forward KL that grows without bound (Proposition B.2). Everything is exact, in float64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.paper.bandit import Pairs, World, all_pairs, reverse_kl
from hypo_kernels.losses import IPOSum, Sigmoid

BETA, KL_COEF = 0.1, 0.1
OUTSIDE = 0.9  # the mass of the counterexample on the response that the data does not cover
REWARD_GAP = 1.0  # of the two covered responses
EPSILONS = (1e-1, 1e-2, 1e-4, 1e-8, 1e-16, 1e-32, 1e-64)


@dataclass(frozen=True)
class Uncovered:
    """The minima of DPO's, IPO's and HyPO's loss, one entry per ε: tensors (E,), losses and KLs in nats."""

    epsilons: Tensor
    least_loss: dict[str, Tensor]  # of DPO and IPO, for a policy that does not change the third response
    loss: dict[str, Tensor]  # the losses of the counterexample
    kl: dict[str, Tensor]  # reverse KL of the counterexamples and of HyPO's minimum
    log_probs: dict[str, Tensor]  # each (E, 3), of the counterexamples
    hypo_log_probs: Tensor  # (E, 3) of HyPO's minimum
    kl_bound: Tensor  # of any minimum of HyPO's loss


def uncovered(epsilons: Sequence[float] = EPSILONS) -> Uncovered:
    """Compute Propositions 4.1 and B.1, and HyPO's minimum beside them."""
    world = three_responses(torch.tensor(epsilons, dtype=torch.float64))
    # In a minimum of DPO's loss the log-ratios differ by the rewards' gap / β; in one of IPO's by (2p − 1) / 2β.
    p = world.pairs.shares[0, 0, 1]
    gaps = {"dpo": REWARD_GAP / BETA, "ipo": float(2 * p - 1) / (2 * BETA)}
    kept = {name: _policy(world, gap, outside=None) for name, gap in gaps.items()}
    moved = {name: _policy(world, gap, outside=OUTSIDE) for name, gap in gaps.items()}
    log_pi = _hypo_minimum(world)
    return Uncovered(
        epsilons=world.log_ref[:, 2].exp(),
        least_loss={name: pair_loss(world, pi, name) for name, pi in kept.items()},
        loss={name: pair_loss(world, pi, name) for name, pi in moved.items()},
        kl={
            **{name: reverse_kl(pi, world.log_ref) for name, pi in moved.items()},
            "hypo": reverse_kl(log_pi, world.log_ref),
        },
        log_probs=moved,
        hypo_log_probs=log_pi,
        # A minimum of ℓ + λ KL has at most the KL of the least ℓ with the reference's mass on the third response.
        kl_bound=reverse_kl(kept["dpo"], world.log_ref),
    )


def three_responses(epsilons: Tensor) -> World:
    """Create a world per ε: π_ref = ((1 − ε)/2, (1 − ε)/2, ε), with infinitely many pairs of the first two."""
    count = len(epsilons)
    inside = torch.log1p(-epsilons) - math.log(2)
    rewards = torch.tensor([REWARD_GAP, 0.0, 0.0], dtype=torch.float64)
    p = torch.sigmoid(rewards[0] - rewards[1])
    shares = torch.stack([torch.zeros_like(p), p, 1 - p, torch.zeros_like(p)]).view(2, 2)
    return World(
        rewards.expand(count, -1),
        torch.eye(3, dtype=torch.float64).expand(count, -1, -1),
        torch.stack([inside, inside, epsilons.log()], dim=1),
        Pairs(shares.expand(count, -1, -1)),
    )


def _policy(world: World, gap: float, outside: float | None) -> Tensor:
    """Return log π (E, 3) whose first two log-ratios differ by ``gap``; the third has mass ``outside`` (None: ε)."""
    covered = torch.tensor([gap, 0.0], dtype=torch.float64).log_softmax(0)
    third = world.log_ref[:, 2:] if outside is None else torch.full_like(world.log_ref[:, 2:], outside).log()
    return torch.cat([covered + torch.log1p(-third.exp()), third], dim=1)


def pair_loss(world: World, log_pi: Tensor, name: str) -> Tensor:
    """Return DPO's or IPO's loss (E,) over all possible pairs."""
    loss = IPOSum(BETA) if name == "ipo" else Sigmoid(BETA)
    ratio = (log_pi - world.log_ref)[:, :2]
    losses = loss(all_pairs(ratio))
    return (losses * world.pairs.shares).sum((1, 2))


def _hypo_minimum(world: World) -> Tensor:
    """Return log π (E, 3) at HyPO's minimum.

    Let the log-ratios of the two covered responses differ by δ, and let A(δ) be their KL to the reference. The KL is
    least for a mass ε / (ε + (1 − ε) exp(−A)) on the third response: then it is −log(ε + (1 − ε) exp(−A)). The only
    unknown is δ, between 0 and DPO's value.
    """
    low, high = torch.zeros_like(world.log_ref[:, 0]), torch.full_like(world.log_ref[:, 0], REWARD_GAP / BETA)
    for _ in range(12):  # each round narrows the bracket of the minimum by 50
        gaps = low[:, None] + (high - low)[:, None] * torch.linspace(0, 1, 101, dtype=low.dtype)  # (E, 101)
        best = _hypo_objective(world, gaps).argmin(1, keepdim=True)
        low, high = (gaps.gather(1, (best + step).clamp(0, 100)).squeeze(1) for step in (-1, 1))
    gap = (low + high) / 2
    covered = torch.stack([gap, torch.zeros_like(gap)], dim=1).log_softmax(1)
    weights = torch.cat([world.log_ref[:, :2] - _apart(gap)[:, None], world.log_ref[:, 2:]], dim=1).log_softmax(1)
    return torch.cat([weights[:, :2].logsumexp(1, keepdim=True) + covered, weights[:, 2:]], dim=1)


def _hypo_objective(world: World, gaps: Tensor) -> Tensor:
    """Return HyPO's loss (E, N) of the best policy for each δ."""
    p = world.pairs.shares[:, :1, 1]
    loss = -p * F.logsigmoid(BETA * gaps) - (1 - p) * F.logsigmoid(-BETA * gaps)
    log_inside, log_outside = torch.log1p(-world.log_ref[:, 2:].exp()), world.log_ref[:, 2:]
    return loss - KL_COEF * torch.logaddexp(log_outside, log_inside - _apart(gaps))


def _apart(gaps: Tensor) -> Tensor:
    """Return the KL of (σ(δ), 1 − σ(δ)) to (½, ½) in nats."""
    s = torch.sigmoid(gaps)
    return s * F.logsigmoid(gaps) + (1 - s) * F.logsigmoid(-gaps) + math.log(2)


@dataclass(frozen=True)
class Forward:
    """One row of Proposition B.2's table."""

    responses: float  # equally likely under the reference, all with true reward 0
    error: float  # error of the DPO policy's reward on one of them
    mean_squared_error: float  # over the reference's responses
    forward_kl: float  # KL(π_ref‖π) in nats


def forward_kl(responses: float, beta: float = 1.0) -> Forward:
    """Compute the forward KL of a DPO policy whose implicit reward is off by n^(1/4) on one of n responses."""
    error = responses**0.25
    # KL(π_ref‖π) = −E[r̂]/β + log E[exp(r̂/β)], both under the reference.
    wrong, right = error / beta - math.log(responses), math.log1p(-1 / responses)
    log_partition = max(wrong, right) + math.log1p(math.exp(-abs(wrong - right)))
    return Forward(responses, error, error**2 / responses, log_partition - error / (beta * responses))
