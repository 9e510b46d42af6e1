"""Promptless worlds of K responses: labelled pairs, policies, and gradient descent on the exact objectives.

With no prompt and few responses every expectation is a sum, so nothing here is estimated: the gradient of the pairs'
loss is taken over all pairs at once (stochastic gradients have it as their mean), that of the reverse KL over all
responses. S worlds, one a seed, are trained side by side in float64: tensors are (S, K) where nothing else is said.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from hypo_kernels.objective import Objective


class Pairs(NamedTuple):
    """Bradley–Terry pairs of the first n responses: ``shares[s, i, j]`` of world s's pairs prefer i to j."""

    shares: Tensor  # (S, n, n), each world's summing to 1

    def of_preferred(self, values: Tensor) -> Tensor:
        """The mean (S,) of ``values`` over the pairs' preferred responses."""
        return (self.shares.sum(2) * values[:, : self.shares.shape[1]]).sum(1)


@dataclass(frozen=True)
class World:
    """True rewards, the features of the responses, the reference, and the pairs, which are of the first responses."""

    rewards: Tensor  # (S, K)
    features: Tensor  # (S, K, F)
    log_ref: Tensor  # (S, K)
    pairs: Pairs

    @property
    def best(self) -> Tensor:
        """(S, 1) the response with the highest reward."""
        return self.rewards.argmax(1, keepdim=True)

    @property
    def num_paired(self) -> int:
        return self.pairs.shares.shape[1]


def linear_world(seeds: Sequence[int], *, responses: int = 100, features: int = 16, pairs: int = 10_000) -> World:
    """Rewards linear in the features, the best response among those that no pair is about (section 6.1.1).

    All but the last feature vectors are random, of unit length. The parameters θ* of the reward are Unif(−2, 2) but
    the first, which is 2. The paper's text has lost the last vector: here it is θ*/‖θ*‖, so that the last response
    is the best there can be.
    """
    made = []
    for generator in _generators(seeds):
        of_reward = torch.empty(features, dtype=torch.float64).uniform_(-2, 2, generator=generator)
        of_reward[0] = 2.0
        phi = torch.randn(responses, features, generator=generator, dtype=torch.float64)
        phi[-1] = of_reward
        phi /= phi.norm(dim=1, keepdim=True)
        rewards = phi @ of_reward
        made.append(World(rewards, phi, _uniform(rewards), _label(rewards, pairs, generator)))
    return _side_by_side(made)


def independent_world(seeds: Sequence[int], *, responses: int = 100, pairs: int = 10_000) -> World:
    """Rewards Unif(−10, 10), and nothing that one response tells about another (section 6.1.2)."""
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
    """``count`` pairs of different responses of the first half, each as likely as another."""
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
    """π over K responses, by ``parameters``; uniform to begin with."""

    parameters: Tensor

    @abstractmethod
    def log_probs(self) -> Tensor:
        """(S, K) log π."""

    @abstractmethod
    def gradient(self, by_logits: Tensor) -> Tensor:
        """The derivative by the parameters of a loss with the derivative ``by_logits`` (S, K) by log π + const."""

    def descend(self, by_logits: Tensor, learning_rate: float) -> None:
        self.parameters -= learning_rate * self.gradient(by_logits)


class Linear(Policy):
    """log π(y) = ⟨θ, φ(y)⟩ + const. With one feature a response: a softmax over a table of logits."""

    def __init__(self, features: Tensor) -> None:
        self.features = features  # (S, K, F)
        self.parameters = features.new_zeros(features.shape[0], features.shape[2])  # (S, F)

    def log_probs(self) -> Tensor:
        return (self.features @ self.parameters[..., None]).squeeze(2).log_softmax(1)

    def gradient(self, by_logits: Tensor) -> Tensor:
        return (by_logits[:, None] @ self.features).squeeze(1)


class Weights(Policy):
    """π(y) = w(y) / Σ w, the weights themselves being what is learned."""

    lowest = 1e-3  # of the mean weight: they have to stay above 0

    def __init__(self, like: Tensor) -> None:
        self.parameters = torch.ones_like(like)  # (S, K)

    def log_probs(self) -> Tensor:
        return (self.parameters / self.parameters.sum(1, keepdim=True)).log()

    def gradient(self, by_logits: Tensor) -> Tensor:
        return by_logits / self.parameters

    def descend(self, by_logits: Tensor, learning_rate: float) -> None:
        super().descend(by_logits, learning_rate)
        self.parameters.clamp_(min=self.lowest)


Gradient = Callable[[Tensor], Tensor]  # log π (S, K) -> the derivative of a loss by log π + const (S, K)


def preference(world: World, *, beta: float, loss: str = "sigmoid") -> Gradient:
    """Of DPO's loss (Eq. 4) or, with ``loss="ipo"``, of IPO's: the library's own, weighted by the pairs' shares."""
    objective = Objective(
        beta=beta, kl_coef=0.0, length_penalty=0.0, preference=loss, label_smoothing=0.0, num_pairs=1,
        num_generations=2, num_prompts=1,
    )  # fmt: skip
    n, shares, log_ref = world.num_paired, world.pairs.shares, world.log_ref

    def gradient(log_pi: Tensor) -> Tensor:
        ratio = (log_pi - log_ref)[:, :n]
        _, slope = objective.pairs(ratio[:, :, None], ratio[:, None, :])  # (S, n, n)
        slope = slope * shares
        # A pair moves its two responses by as much against each other: the sum is 0, log π's constant drops out.
        by_paired = slope.sum(2) - slope.sum(1)
        return torch.cat([by_paired, log_pi.new_zeros(len(log_pi), log_pi.shape[1] - n)], dim=1)

    return gradient


def expected(cost: Callable[[Tensor], Tensor]) -> Gradient:
    """Of E_π[cost], the cost (S, K) held fixed, as ``cost`` gives it for log π."""

    def gradient(log_pi: Tensor) -> Tensor:
        pi, of_response = log_pi.exp(), cost(log_pi)
        return pi * (of_response - (pi * of_response).sum(1, keepdim=True))

    return gradient


def hypo(world: World, *, beta: float, kl_coef: float) -> Gradient:
    """Of HyPO's loss (Eq. 7): DPO's, and λ KL(π‖π_ref), whose derivative is that of E_π[sg(log π − log π_ref)]."""
    dpo, log_ref = preference(world, beta=beta), world.log_ref
    kl = expected(lambda log_pi: log_pi - log_ref)
    return lambda log_pi: dpo(log_pi) + kl_coef * kl(log_pi)


def online_rl(rewards: Tensor, log_ref: Tensor, *, beta: float) -> Gradient:
    """Of −E_π[r] + β KL(π‖π_ref): what RLHF does with a (learned) reward (S, K)."""
    return expected(lambda log_pi: beta * (log_pi - log_ref) - rewards)


def learned_rewards(world: World, *, steps: int, learning_rate: float) -> Tensor:
    """(S, K) rewards linear in the features, by maximum likelihood of the pairs.

    A Bradley–Terry reward model is a DPO policy with β = 1 whose log-ratio is read as the reward, up to a constant.
    """
    model, gradient = Linear(world.features), preference(world, beta=1.0)
    for _ in range(steps):
        model.descend(gradient(model.log_probs()), learning_rate)
    return (world.features @ model.parameters[..., None]).squeeze(2)


def reverse_kl(log_pi: Tensor, log_ref: Tensor) -> Tensor:
    """(S,) KL(π‖π_ref) in nats."""
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
    """Descend, and return each of ``watched(log π)``'s figures as a curve (points + 1, S), the start being its first.

    ``points`` divides ``steps``.
    """
    every, curves = steps // points, []
    for step in range(steps + 1):
        log_pi = policy.log_probs()
        if step % every == 0:
            curves.append(watched(log_pi))
        policy.descend(gradient(log_pi), learning_rate)
    return {name: torch.stack([point[name] for point in curves]) for name in curves[0]}
