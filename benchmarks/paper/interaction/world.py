"""Contextual bandits with a knob for the reference's mass on uncovered responses, for pairs and for extrapolation.

A response has features φ, the first of which, ``a``, is what raters like: −1 to 1 on the covered responses, 1.5 on the
uncovered ones. So a model of the covered responses expects the uncovered ones to be the best. Where extrapolation is
right they are; where it misleads, their true reward is the lowest there is. The reference puts mass ε on all of them
together. Silent pairs compare covered responses only; covering pairs are drawn from all responses every second time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

PROMPTS, COVERED, UNCOVERED, FEATURES = 64, 64, 16, 8
RESPONSES = COVERED + UNCOVERED
PAIRS, HELD_OUT_PAIRS = 800, 2000
LOWEST, HIGHEST = -2.0, 2.0  # bounds of the true reward
LIKED = 1.5  # the first feature of the uncovered responses
EPSILONS = (0.1, 0.01, 0.001)


@dataclass(frozen=True)
class Kind:
    """One cell of the experiment."""

    epsilon: float  # the reference's mass on the uncovered responses
    covering: bool  # half of the pairs are drawn from all responses, instead of none
    misleading: bool  # the uncovered responses are the worst, not the best

    @property
    def name(self) -> str:
        pairs, extrapolation = "covering" if self.covering else "silent", "misleading" if self.misleading else "right"
        return f"{pairs}, {extrapolation}, {self.epsilon:g}"

    @property
    def c_glo(self) -> float:
        """The largest π(y) / π_ref(y) of any policy: C_glo of Assumption 4.1."""
        return max(UNCOVERED / self.epsilon, COVERED / (1 - self.epsilon))


KINDS = [Kind(e, covering, misleading) for misleading in (True, False) for covering in (False, True) for e in EPSILONS]


class Pairs(NamedTuple):
    """Labelled pairs, each (S, N): indices of prompts, of the chosen and of the rejected responses."""

    prompts: Tensor
    chosen: Tensor
    rejected: Tensor


@dataclass(frozen=True)
class Worlds:
    """S worlds of one kind, one a seed, with three sets of prompts: to train, to stop reward models, held out."""

    x: Tensor  # (S, 3 · PROMPTS, FEATURES)
    phi: Tensor  # (S, RESPONSES, FEATURES)
    rewards: Tensor  # (S, 3 · PROMPTS, RESPONSES), true ones
    log_ref: Tensor  # (RESPONSES,)
    train: Pairs
    validation: Pairs
    held_out: Pairs


TRAINED, VALIDATED, HELD_OUT = (slice(i * PROMPTS, (i + 1) * PROMPTS) for i in range(3))


def make_worlds(kind: Kind, seeds: Sequence[int]) -> Worlds:
    """Create a world a seed; it depends on no other seed. Kinds share all that does not define them."""
    made = [_world(kind, torch.Generator().manual_seed(seed)) for seed in seeds]
    x, phi, rewards, *pairs = zip(*made, strict=True)
    inside = torch.full((COVERED,), (1 - kind.epsilon) / COVERED)
    log_ref = torch.cat([inside, torch.full((UNCOVERED,), kind.epsilon / UNCOVERED)]).log()
    together = [Pairs(*(torch.stack(part) for part in zip(*of_seeds, strict=True))) for of_seeds in pairs]
    return Worlds(torch.stack(x), torch.stack(phi), torch.stack(rewards), log_ref, *together)


def _world(kind: Kind, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Pairs, Pairs, Pairs]:
    x = torch.randn(3 * PROMPTS, FEATURES, generator=generator)
    phi = torch.randn(RESPONSES, FEATURES, generator=generator)
    taste = torch.randn(FEATURES, FEATURES, generator=generator) / FEATURES
    phi[:COVERED, 0] = torch.rand(COVERED, generator=generator) * 2 - 1
    phi[COVERED:, 0] = LIKED
    rewards = HIGHEST * torch.tanh(x @ taste @ phi.T / 2 + 0.7 * phi[:, 0])
    if kind.misleading:
        rewards[:, COVERED:] = LOWEST
    sets = ((TRAINED, PAIRS), (VALIDATED, PAIRS), (HELD_OUT, HELD_OUT_PAIRS))
    pairs = [_label(kind, rewards, prompts, count, generator) for prompts, count in sets]
    return x, phi, rewards, pairs[0], pairs[1], pairs[2]


def _label(kind: Kind, rewards: Tensor, prompts: slice, count: int, generator: torch.Generator) -> Pairs:
    """Draw pairs of different responses uniformly, and label them by Bradley–Terry."""
    i = torch.randint(prompts.start, prompts.stop, (count,), generator=generator)
    draws = torch.rand(4, count, generator=generator, dtype=torch.float64)
    size = torch.where((draws[0] < 0.5) & torch.tensor(kind.covering), RESPONSES, COVERED)
    first = (draws[1] * size).long()
    second = (first + 1 + (draws[2] * (size - 1)).long()) % size
    prefers_first = draws[3] < torch.sigmoid(rewards[i, first] - rewards[i, second])
    return Pairs(i, torch.where(prefers_first, first, second), torch.where(prefers_first, second, first))
