"""What a step reports: sums kept on the device and read by the host once a log interval."""

from __future__ import annotations

import torch
from torch import Tensor

from hypo_kernels import HypoLoss
from hypo_train.processes import Processes

_NONE = -1


class Meter:
    """Means of named values over a log interval, without a host read in between."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}

    def add(self, name: str, values: Tensor) -> None:
        """Count each of ``values`` (any shape, maybe empty) in the mean called ``name``."""
        if values.numel() == 0:
            return
        total = values.detach().double().sum()
        self._sums[name] = self._sums[name].to(total.device) + total if name in self._sums else total
        self._counts[name] = self._counts.get(name, 0) + values.numel()

    def read(self, processes: Processes | None = None) -> dict[str, float]:
        """The means so far, of all ``processes``, in one transfer from the device; the meter starts anew."""
        states = [self.state()] if processes is None else processes.gather(self.state())
        self._sums, self._counts = {}, {}
        names = dict.fromkeys(name for state in states for name in state)
        found = {name: [state[name] for state in states if name in state] for name in names}
        return {name: sum(total for total, _ in parts) / sum(n for _, n in parts) for name, parts in found.items()}

    def state(self) -> dict[str, tuple[float, int]]:
        """Sum and count of each name, to go on from in a resumed run."""
        if not self._sums:
            return {}
        sums = torch.stack(list(self._sums.values())).tolist()
        return {name: (total, self._counts[name]) for name, total in zip(self._sums, sums, strict=True)}

    def load(self, state: dict[str, tuple[float, int]]) -> None:
        """Take up a saved :meth:`state`."""
        self._sums = {name: torch.tensor(total, dtype=torch.float64) for name, (total, _) in state.items()}
        self._counts = {name: count for name, (_, count) in state.items()}


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


def add_loss(meter: Meter, out: HypoLoss) -> None:
    """A loss's statistics under TRL's names; ``kl`` is the trajectory's, in nats, a sum over its tokens."""
    pairs = len(out.margins)
    chosen, rejected, _ = out.logps.split([pairs, pairs, len(out.kl)])
    meter.add("loss", out.loss.expand(pairs or len(out.kl)))  # weighs a smaller batch by its rows
    meter.add("rewards/chosen", out.chosen_rewards)
    meter.add("rewards/rejected", out.rejected_rewards)
    meter.add("rewards/accuracies", (out.margins > 0).double())
    meter.add("rewards/margins", out.margins)
    meter.add("logps/chosen", chosen)
    meter.add("logps/rejected", rejected)
    meter.add("kl", out.kl)
    meter.add("completions/mean_length", out.lengths[2 * pairs :].double())


def add_online_rewards(meter: Meter, rewards: Tensor, num_generations: int) -> None:
    """Rewards (N,) of samples, ``num_generations`` consecutive ones a prompt: their mean, and a prompt's spread."""
    meter.add("reward", rewards)
    meter.add("reward_std", rewards.view(-1, num_generations).std(dim=1))


def add_rewards(meter: Meter, rewards: Tensor, losses: Tensor) -> None:
    """A reward model's (P, 2) rewards of chosen and rejected, and losses (P,)."""
    margins = rewards[:, 0] - rewards[:, 1]
    meter.add("loss", losses)
    meter.add("accuracy", (margins > 0).double())
    meter.add("margin", margins)
    meter.add("mean_reward", rewards)
