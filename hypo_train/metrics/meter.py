"""Collect means of metrics. Sums stay on the device and are read once a log interval."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from hypo_kernels import HypoLoss
from hypo_train.distributed.processes import Processes

_NONE = -1


class Meter:
    """Collect means of named values over a log interval; the host waits for the device only in :meth:`read`."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}
        self._spreads: dict[str, Tensor] = {}  # (2,) sum of the groups' means, and sum of the means' squares
        self._groups: dict[str, int] = {}

    def add(self, name: str, values: Tensor) -> None:
        """Add ``values`` (any shape, may be empty) to the mean called ``name``."""
        if values.numel() == 0:
            return
        total = values.detach().double().sum()
        self._sums[name] = self._sums[name].to(total.device) + total if name in self._sums else total
        self._counts[name] = self._counts.get(name, 0) + values.numel()

    def add_groups(self, name: str, groups: Tensor) -> None:
        """Add (G, n) values of G independent groups to the mean ``name``, and log its standard error, ``<name>_se``.

        Samples of one prompt are correlated, so the error is that of a mean over the groups' means. It is NaN for a
        single group.
        """
        if groups.numel() == 0:
            return
        self.add(name, groups)
        means = groups.detach().double().mean(dim=1)
        spread = torch.stack([means.sum(), means.square().sum()])
        self._spreads[name] = self._spreads[name].to(spread.device) + spread if name in self._spreads else spread
        self._groups[name] = self._groups.get(name, 0) + len(means)

    def read(self, processes: Processes | None = None) -> dict[str, float]:
        """Return means and standard errors over all ``processes``, in one transfer from the device; reset the meter."""
        states = [self.state()] if processes is None else processes.gather(self.state())
        self._sums, self._counts, self._spreads, self._groups = {}, {}, {}, {}
        return {
            name: saved[0] / saved[1] if len(saved) == 2 else _standard_error(saved[0], saved[1], int(saved[2]))
            for name, saved in sum_states(states).items()
        }

    def state(self) -> dict[str, tuple[float, ...]]:
        """Return the sum and count of each name and of its groups, as saved in a checkpoint."""
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
        """Restore a saved :meth:`state`."""
        sums = {name: saved for name, saved in state.items() if len(saved) == 2}
        spreads = {name.removesuffix("_se"): saved for name, saved in state.items() if len(saved) == 3}
        self._sums = {name: torch.tensor(total, dtype=torch.float64) for name, (total, _) in sums.items()}
        self._counts = {name: int(count) for name, (_, count) in sums.items()}
        self._spreads = {name: torch.tensor(saved[:2], dtype=torch.float64) for name, saved in spreads.items()}
        self._groups = {name: int(saved[2]) for name, saved in spreads.items()}


def sum_states(states: Sequence[dict[str, tuple[float, ...]]]) -> dict[str, tuple[float, ...]]:
    """Return the state of a meter that holds the values of several meters."""
    sums: dict[str, tuple[float, ...]] = {}
    for name, saved in (item for state in states for item in state.items()):
        before = sums.get(name, (0,) * len(saved))
        sums[name] = tuple(a + b for a, b in zip(before, saved, strict=True))
    return sums


def _standard_error(total: float, squares: float, count: int) -> float:
    if count < 2:
        return math.nan
    variance = (squares - total**2 / count) / (count - 1)
    return math.sqrt(max(variance, 0.0) / count) if math.isfinite(variance) else math.nan


class FiniteWatch:
    """Record, on the device, the first step with a number that is not finite."""

    def __init__(self, device: torch.device) -> None:
        self._first_bad = torch.full((), _NONE, dtype=torch.int64, device=device)

    def see(self, step: int, value: Tensor) -> None:
        """Check a number () of ``step``, which counts from 0, without waiting for the device."""
        self._first_bad = torch.where(torch.isfinite(value) | (self._first_bad != _NONE), self._first_bad, step)

    def first_bad(self) -> int | None:
        """Return the first step with a number that is not finite, or None. The host waits for the device."""
        step = int(self._first_bad)
        return None if step == _NONE else step


def add_loss(meter: Meter, out: HypoLoss, num_generations: int) -> None:
    """Add a loss's statistics under TRL's names.

    ``kl`` is in nats, summed over a sample's tokens; ``num_generations`` consecutive samples share a prompt.
    """
    pairs = len(out.margins)
    chosen, rejected, _ = out.logps.split([pairs, pairs, len(out.kl)])
    meter.add("loss", out.loss.expand(pairs or len(out.kl)))  # a mean over rows: a smaller micro-batch has less weight
    meter.add("rewards/chosen", out.chosen_rewards)
    meter.add("rewards/rejected", out.rejected_rewards)
    meter.add("rewards/accuracies", (out.margins > 0).double())
    meter.add("rewards/margins", out.margins)
    meter.add("logps/chosen", chosen)
    meter.add("logps/rejected", rejected)
    meter.add_groups("kl", out.kl.view(-1, num_generations))
    meter.add("completions/mean_length", out.lengths[2 * pairs :].double())


def add_loss_statistics(meter: Meter, out: HypoLoss, num_generations: int) -> None:
    """Add the statistics of a training loss: those of :func:`add_loss` and of :func:`add_importance`."""
    add_loss(meter, out, num_generations)
    add_importance(meter, out)


def add_importance(meter: Meter, out: HypoLoss) -> None:
    """Add statistics of the importance weights of a loss. Does nothing if the loss has no importance weights.

    Over the micro-batch's tokens: the mean ratio π/μ (under TRL's name), the fraction of truncated tokens, and the
    effective sample size as a fraction of the tokens, which is 1 if the current policy drew the samples.
    """
    importance = out.importance
    if importance is None or len(importance.ratio) == 0:
        return
    num_tokens = out.lengths[-len(importance.ratio) :].sum()
    weight = importance.weight.sum()
    meter.add("sampling/importance_sampling_ratio/mean", importance.ratio.sum() / num_tokens)
    meter.add("sampling/truncated", importance.truncated.sum() / num_tokens)
    meter.add("sampling/effective_sample_size", weight.square() / (num_tokens * importance.squared_weight.sum()))


def add_online_rewards(meter: Meter, rewards: Tensor, num_generations: int) -> None:
    """Add rewards (N,) of samples, ``num_generations`` consecutive ones a prompt.

    Logs their mean, the standard deviation within a prompt, and the fraction of prompts where it is zero: their RLOO
    gradient is zero.
    """
    spreads = rewards.view(-1, num_generations).std(dim=1)
    meter.add("reward", rewards)
    meter.add("reward_std", spreads)
    meter.add("frac_reward_zero_std", (spreads == 0).double())


def add_rewards(meter: Meter, rewards: Tensor, losses: Tensor) -> None:
    """Add a reward model's rewards (P, 2) of chosen and rejected completions, and its losses (P,)."""
    margins = rewards[:, 0] - rewards[:, 1]
    meter.add("loss", losses)
    meter.add("accuracy", (margins > 0).double())
    meter.add("margin", margins)
    meter.add("mean_reward", rewards)
