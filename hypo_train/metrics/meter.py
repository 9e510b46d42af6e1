"""What a step reports: sums kept on the device and read by the host once a log interval."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from hypo_kernels import HypoLoss
from hypo_train.distributed.processes import Processes

_NONE = -1


class Meter:
    """Means of named values over a log interval, without a host read in between."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}
        self._spreads: dict[str, Tensor] = {}  # (2,) of a name's groups: the sum of their means, and of its squares
        self._groups: dict[str, int] = {}

    def add(self, name: str, values: Tensor) -> None:
        """Count each of ``values`` (any shape, maybe empty) in the mean called ``name``."""
        if values.numel() == 0:
            return
        total = values.detach().double().sum()
        self._sums[name] = self._sums[name].to(total.device) + total if name in self._sums else total
        self._counts[name] = self._counts.get(name, 0) + values.numel()

    def add_groups(self, name: str, groups: Tensor) -> None:
        """As :meth:`add`, of (G, n) values in G independent groups: ``<name>_se`` is the mean's standard error then.

        Samples of one prompt resemble each other, so that the error is that of a mean over prompts: what n samples
        tell of a prompt counts once. NaN of a single group, which says nothing of any other.
        """
        if groups.numel() == 0:
            return
        self.add(name, groups)
        means = groups.detach().double().mean(dim=1)
        spread = torch.stack([means.sum(), means.square().sum()])
        self._spreads[name] = self._spreads[name].to(spread.device) + spread if name in self._spreads else spread
        self._groups[name] = self._groups.get(name, 0) + len(means)

    def read(self, processes: Processes | None = None) -> dict[str, float]:
        """The means so far and their standard errors, of all ``processes``, in one transfer from the device; the meter
        starts anew."""
        states = [self.state()] if processes is None else processes.gather(self.state())
        self._sums, self._counts, self._spreads, self._groups = {}, {}, {}, {}
        return {
            name: saved[0] / saved[1] if len(saved) == 2 else _standard_error(saved[0], saved[1], int(saved[2]))
            for name, saved in added_up(states).items()
        }

    def state(self) -> dict[str, tuple[float, ...]]:
        """Sum and count of each name, and of its groups where it has any, to go on from in a resumed run."""
        if not self._sums:
            return {}
        everything = torch.cat([torch.stack(list(self._sums.values())), *self._spreads.values()]).tolist()
        sums = {name: (total, self._counts[name]) for name, total in zip(self._sums, everything, strict=False)}
        spreads = everything[len(self._sums) :]
        groups = {
            f"{name}_se": (spreads[2 * i], spreads[2 * i + 1], count)
            for i, (name, count) in enumerate(self._groups.items())
        }
        return {**sums, **groups}

    def load(self, state: dict[str, tuple[float, ...]]) -> None:
        """Take up a saved :meth:`state`."""
        sums = {name: saved for name, saved in state.items() if len(saved) == 2}
        spreads = {name.removesuffix("_se"): saved for name, saved in state.items() if len(saved) == 3}
        self._sums = {name: torch.tensor(total, dtype=torch.float64) for name, (total, _) in sums.items()}
        self._counts = {name: int(count) for name, (_, count) in sums.items()}
        self._spreads = {name: torch.tensor(saved[:2], dtype=torch.float64) for name, saved in spreads.items()}
        self._groups = {name: int(saved[2]) for name, saved in spreads.items()}


def added_up(states: Sequence[dict[str, tuple[float, ...]]]) -> dict[str, tuple[float, ...]]:
    """The state of one meter that has counted what several have."""
    together: dict[str, tuple[float, ...]] = {}
    for name, saved in (item for state in states for item in state.items()):
        before = together.get(name, (0,) * len(saved))
        together[name] = tuple(a + b for a, b in zip(before, saved, strict=True))
    return together


def _standard_error(total: float, squares: float, count: int) -> float:
    """Of the mean of ``count`` values with this sum and sum of squares."""
    if count < 2:
        return math.nan
    variance = (squares - total**2 / count) / (count - 1)
    return math.sqrt(max(variance, 0.0) / count) if math.isfinite(variance) else math.nan


class FiniteWatch:
    """The first step that had a number which is not finite, kept on the device."""

    def __init__(self, device: torch.device) -> None:
        self._first_bad = torch.full((), _NONE, dtype=torch.int64, device=device)

    def see(self, step: int, value: Tensor) -> None:
        """A number () of a step, counted from 0; the host does not wait for it."""
        self._first_bad = torch.where(torch.isfinite(value) | (self._first_bad != _NONE), self._first_bad, step)

    def first_bad(self) -> int | None:
        """None: there was none. The host waits for the device."""
        step = int(self._first_bad)
        return None if step == _NONE else step


def add_loss(meter: Meter, out: HypoLoss, num_generations: int) -> None:
    """A loss's statistics under TRL's names; ``kl`` is the trajectory's, in nats, a sum over its tokens, of
    ``num_generations`` consecutive samples a prompt."""
    pairs = len(out.margins)
    chosen, rejected, _ = out.logps.split([pairs, pairs, len(out.kl)])
    meter.add("loss", out.loss.expand(pairs or len(out.kl)))  # weighs a smaller batch by its rows
    meter.add("rewards/chosen", out.chosen_rewards)
    meter.add("rewards/rejected", out.rejected_rewards)
    meter.add("rewards/accuracies", (out.margins > 0).double())
    meter.add("rewards/margins", out.margins)
    meter.add("logps/chosen", chosen)
    meter.add("logps/rejected", rejected)
    meter.add_groups("kl", out.kl.view(-1, num_generations))
    meter.add("completions/mean_length", out.lengths[2 * pairs :].double())


def add_online_rewards(meter: Meter, rewards: Tensor, num_generations: int) -> None:
    """Rewards (N,) of samples, ``num_generations`` consecutive ones a prompt: their mean, a prompt's spread, and the
    share of prompts that have none, from which RLOO learns nothing."""
    spreads = rewards.view(-1, num_generations).std(dim=1)
    meter.add("reward", rewards)
    meter.add("reward_std", spreads)
    meter.add("frac_reward_zero_std", (spreads == 0).double())


def add_rewards(meter: Meter, rewards: Tensor, losses: Tensor) -> None:
    """A reward model's (P, 2) rewards of chosen and rejected, and losses (P,)."""
    margins = rewards[:, 0] - rewards[:, 1]
    meter.add("loss", losses)
    meter.add("accuracy", (margins > 0).double())
    meter.add("margin", margins)
    meter.add("mean_reward", rewards)
