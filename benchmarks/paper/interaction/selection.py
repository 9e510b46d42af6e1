"""Select a setting and a checkpoint of a method under a budget of held-out KL.

A method's candidates are all its settings at all checkpoints, and the reference. The main rule never sees the true
reward: among the candidates within the budget it takes the one with the highest accuracy on held-out pairs, which are
drawn like the training pairs. Two other rules show what depends on the rule: most KL within the budget, and most true
reward within the budget, which nobody can do outside a simulation.
"""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.paper.interaction.world import COVERED, HELD_OUT, Worlds

BUDGETS = (0.5, 1.0, 2.0, 3.0, 4.0)  # nats
HEADLINE = 2.0  # the KL budget of the headline, in nats
RULES = ("accuracy", "kl", "reward")  # the first is the main one


def select(points: dict[str, Tensor], reference: dict[str, Tensor], *, budget: float, rule: str) -> dict[str, Tensor]:
    """Return each metric (S,) of the candidate that ``rule`` selects for each seed, and its index as ``choice``.

    Args:
        points: Each metric as (checkpoints, settings, S).
        reference: Each metric of the reference, (S,).
        budget: The largest held-out KL of a candidate, in nats.
        rule: The metric that the selected candidate has most of.

    Candidates are numbered checkpoint by checkpoint; the last one is the reference.
    """
    candidates = {name: torch.cat([values.flatten(0, 1), reference[name][None]]) for name, values in points.items()}
    choice = candidates[rule].masked_fill(candidates["kl"] > budget, -torch.inf).argmax(0, keepdim=True)
    return {name: values.gather(0, choice)[0] for name, values in candidates.items()} | {"choice": choice[0]}


def of_reference(worlds: Worlds) -> dict[str, Tensor]:
    """Return the metrics (S,) of the reference itself, which tells no responses of a pair apart."""
    pi = worlds.log_ref.exp()
    reward = (pi * worlds.rewards[:, HELD_OUT]).sum(2).mean(1)
    constant = {"kl": 0.0, "uncovered": float(pi[COVERED:].sum()), "ratio": 1.0, "accuracy": 0.0}
    return {"reward": reward, **{name: torch.full_like(reward, value) for name, value in constant.items()}}
