"""Worlds without prompts and with K responses: labelled pairs, policies, and gradient descent on exact objectives.

Without prompts and with few responses every expectation is a sum, so nothing is estimated: the gradient of the
preference loss is over all pairs (the mean of stochastic gradients), and that of the reverse KL over all responses. S
worlds, one per seed, are trained together in float64; tensors are (S, K) unless stated otherwise.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from hypo_kernels.losses import IPOSum, Sigmoid
from hypo_kernels.pairs import Pairs as LossPairs


class Pairs(NamedTuple):
    """Bradley–Terry pairs of the first n responses: ``shares[s, i, j]`` of world s's pairs prefer i to j."""

    shares: Tensor  # (S, n, n), each world's summing to 1

    def of_preferred(self, values: Tensor) -> Tensor:
        """Return the mean (S,) of ``values`` over the pairs' preferred responses."""
        return (self.shares.sum(2) * values[:, : self.shares.shape[1]]).sum(1)


@dataclass(frozen=True)
class World:
    """True rewards, features of the responses, the reference, and the pairs, which consist of the first responses."""

    rewards: Tensor  # (S, K)
    features: Tensor  # (S, K, F)
    log_ref: Tensor  # (S, K)
    pairs: Pairs

    @property
    def best(self) -> Tensor:
        """The index (S, 1) of the response with the highest reward."""
        return self.rewards.argmax(1, keepdim=True)

    @property
    def num_paired(self) -> int:
        return self.pairs.shares.shape[1]


def linear_world(
    seeds: Sequence[int],
    *,
    responses: int = 100,
    features: int = 16,
    pairs: int = 10_000,
    norm: int = 2,
    last: str = "θ*",
) -> World:
    """Create a world with rewards linear in the features (section 6.1.1).

    All feature vectors but the last are random, of length 1 in the L1 or L2 ``norm``. The parameters θ* of the reward
    are Unif(−2, 2), except the first, which is 2. The paper's text omits the last vector and does not say which norm.
    Two readings make the last response, which is in no pair, the best: θ*/‖θ*‖ with the L2 norm (the default), and
    e₁ = (1, 0, …) with the L1 norm, because no entry of θ* is above 2.

    Raises
    ------
    ValueError
        If ``last`` is neither ``"θ*"`` nor ``"e₁"``.
    """
    if last not in ("θ*", "e₁"):
        raise ValueError(f'last={last!r}: choose "θ*" or "e₁"')
    made = []
    for generator in _generators(seeds):
        of_reward = torch.empty(features, dtype=torch.float64).uniform_(-2, 2, generator=generator)
        of_reward[0] = 2.0
        phi = torch.randn(responses, features, generator=generator, dtype=torch.float64)
        phi[-1] = of_reward if last == "θ*" else torch.eye(features, dtype=torch.float64)[0]
        phi /= phi.norm(p=norm, dim=1, keepdim=True)
        rewards = phi @ of_reward
        made.append(World(rewards, phi, _uniform(rewards), _label(rewards, pairs, generator)))
    return _side_by_side(made)


def independent_world(seeds: Sequence[int], *, responses: int = 100, pairs: int = 10_000) -> World:
    """Create a world with independent rewards Unif(−10, 10) and no features (section 6.1.2)."""
    made = []
    for generator in _generators(seeds):
        rewards = torch.empty(responses, dtype=torch.float64).uniform_(-10, 10, generator=generator)
        features = torch.eye(responses, dtype=torch.float64)
        made.append(World(rewards, features, _uniform(rewards), _label(rewards, pairs, generator)))
    return _side_by_side(made)


def _uniform(like: Tensor) -> Tensor:
    return torch.full_like(like, 1 / len(like)).log()


def _generators(seeds: Sequence[int]) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def _label(rewards: Tensor, count: int, generator: torch.Generator) -> Pairs:
    """Draw and label ``count`` pairs of different responses of the first half, uniformly."""
    n = len(rewards) // 2
    first = torch.randint(n, (count,), generator=generator)
    second = (first + torch.randint(1, n, (count,), generator=generator)) % n
    prefers_first = torch.rand(count, generator=generator) < torch.sigmoid(rewards[first] - rewards[second])
    chosen, rejected = torch.where(prefers_first, first, second), torch.where(prefers_first, second, first)
    counts = torch.zeros(n * n, dtype=rewards.dtype)
    counts.index_add_(0, chosen * n + rejected, torch.ones(count, dtype=rewards.dtype))
    return Pairs(counts.view(n, n) / count)


def _side_by_side(worlds: Sequence[World]) -> World:
    return World(
        torch.stack([w.rewards for w in worlds]),
        torch.stack([w.features for w in worlds]),
        torch.stack([w.log_ref for w in worlds]),
        Pairs(torch.stack([w.pairs.shares for w in worlds])),
    )


class Policy(ABC):
    """A policy π over K responses with ``parameters``; it starts uniform."""

    parameters: Tensor

    @abstractmethod
    def log_probs(self) -> Tensor:
        """Return log π, (S, K)."""

    @abstractmethod
    def gradient(self, by_logits: Tensor) -> Tensor:
        """Return the gradient for the parameters of a loss whose gradient for log π + const is ``by_logits`` (S, K)."""

    def descend(self, by_logits: Tensor, learning_rate: float) -> None:
        self.parameters -= learning_rate * self.gradient(by_logits)


class Linear(Policy):
    """A log-linear policy: log π(y) = ⟨θ, φ(y)⟩ + const. With one feature per response it is a softmax over logits."""

    def __init__(self, features: Tensor) -> None:
        self.features = features  # (S, K, F)
        self.parameters = features.new_zeros(features.shape[0], features.shape[2])  # (S, F)

    def log_probs(self) -> Tensor:
        return (self.features @ self.parameters[..., None]).squeeze(2).log_softmax(1)

    def gradient(self, by_logits: Tensor) -> Tensor:
        return (by_logits[:, None] @ self.features).squeeze(1)


class Weights(Policy):
    """A policy π(y) = w(y) / Σ w whose weights w are the parameters."""

    lowest = 1e-3  # relative to the mean weight; weights must stay above 0

    def __init__(self, like: Tensor) -> None:
        self.parameters = torch.ones_like(like)  # (S, K)

    def log_probs(self) -> Tensor:
        return (self.parameters / self.parameters.sum(1, keepdim=True)).log()

    def gradient(self, by_logits: Tensor) -> Tensor:
        return by_logits / self.parameters

    def descend(self, by_logits: Tensor, learning_rate: float) -> None:
        super().descend(by_logits, learning_rate)
        self.parameters.clamp_(min=self.lowest)


def all_pairs(ratios: Tensor) -> LossPairs:
    """Return all ordered pairs (S, n, n) of n responses with log-ratios (S, n): the first is the chosen one."""
    zero = ratios.new_zeros(())
    return LossPairs(ratios[:, :, None], ratios[:, None, :], zero, zero, zero, zero, num_pairs=1, num_chosen_tokens=1)


Gradient = Callable[[Tensor], Tensor]  # log π (S, K) -> the gradient of a loss for log π + const (S, K)


def preference(world: World, *, beta: float, loss: str = "sigmoid") -> Gradient:
    """Return the gradient of DPO's loss (Eq. 4) or of IPO's (``loss="ipo"``), weighted by the pairs' shares."""
    of_pairs = IPOSum(beta) if loss == "ipo" else Sigmoid(beta)
    n, shares, log_ref = world.num_paired, world.pairs.shares, world.log_ref

    def gradient(log_pi: Tensor) -> Tensor:
        ratio = (log_pi - log_ref)[:, :n]
        _, slope, _ = of_pairs.closed_form(all_pairs(ratio))  # (S, n, n)
        slope = slope * shares
        # A pair moves its two responses by opposite amounts: the sum is 0, and log π's constant drops out.
        by_paired = slope.sum(2) - slope.sum(1)
        return torch.cat([by_paired, log_pi.new_zeros(len(log_pi), log_pi.shape[1] - n)], dim=1)

    return gradient


def expected(cost: Callable[[Tensor], Tensor]) -> Gradient:
    """Return the gradient of E_π[cost] with the cost (S, K), which ``cost`` computes from log π, held fixed."""

    def gradient(log_pi: Tensor) -> Tensor:
        pi, of_response = log_pi.exp(), cost(log_pi)
        return pi * (of_response - (pi * of_response).sum(1, keepdim=True))

    return gradient


def hypo(world: World, *, beta: float, kl_coef: float) -> Gradient:
    """Return the gradient of HyPO's loss (Eq. 7): DPO's plus that of λ KL(π‖π_ref)."""
    dpo, log_ref = preference(world, beta=beta), world.log_ref
    kl = expected(lambda log_pi: log_pi - log_ref)
    return lambda log_pi: dpo(log_pi) + kl_coef * kl(log_pi)


def online_rl(rewards: Tensor, log_ref: Tensor, *, beta: float) -> Gradient:
    """Return the gradient of −E_π[r] + β KL(π‖π_ref), the RLHF objective with a (learned) reward (S, K)."""
    return expected(lambda log_pi: beta * (log_pi - log_ref) - rewards)


def learned_rewards(world: World, *, steps: int, learning_rate: float) -> Tensor:
    """Return (S, K) rewards linear in the features, fitted to the pairs by maximum likelihood.

    A Bradley–Terry reward model is a DPO policy with β = 1 whose log-ratio is read as the reward, up to a constant.
    """
    model, gradient = Linear(world.features), preference(world, beta=1.0)
    for _ in range(steps):
        model.descend(gradient(model.log_probs()), learning_rate)
    return (world.features @ model.parameters[..., None]).squeeze(2)


def reverse_kl(log_pi: Tensor, log_ref: Tensor) -> Tensor:
    """Return the reverse KL(π‖π_ref), (S,), in nats."""
    return (log_pi.exp() * (log_pi - log_ref)).sum(1)


def train(
    policy: Policy,
    gradient: Gradient,
    watched: Callable[[Tensor], dict[str, Tensor]],
    *,
    steps: int,
    learning_rate: float,
    points: int = 100,
) -> dict[str, Tensor]:
    """Run gradient descent and return each value of ``watched(log π)`` as a curve (points + 1, S), the start included.

    ``points`` divides ``steps``.
    """
    every, curves = steps // points, []
    for step in range(steps + 1):
        log_pi = policy.log_probs()
        if step % every == 0:
            curves.append(watched(log_pi))
        policy.descend(gradient(log_pi), learning_rate)
    return {name: torch.stack([point[name] for point in curves]) for name in curves[0]}
