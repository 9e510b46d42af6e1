"""The loss of a run's pairs, as ``hypo_kernels`` takes it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

from torch import Tensor

from hypo_kernels.losses import LOSSES, Weighted
from hypo_kernels.pairs import PairLoss, Pairs
from hypo_train.config import Config
from hypo_train.loss_names import LOSS_NAMES


def pair_loss(config: Config) -> PairLoss:
    """Return the loss of the configured algorithm, or of ``loss_type``: one loss, or a weighted sum of several."""
    preference = config.spec.preference
    if callable(preference):
        return _of_function(preference, config.beta)
    losses = [_loss(config, name) for name in config.loss_types]
    if len(losses) == 1 and config.loss_weights is None:
        return losses[0]
    return Weighted(losses, config.loss_weights or [1.0] * len(losses))


def _loss(config: Config, loss_type: str) -> PairLoss:
    name = LOSS_NAMES[loss_type]
    loss: PairLoss = LOSSES[name.loss](**{setting: getattr(config, setting) for setting in name.settings})
    return loss


@dataclass(frozen=True, repr=False)
class OfLogProbs:
    """A user's function of log-probs (P,) and ``beta``, as a loss of pairs."""

    function: Callable[[Tensor, Tensor, Tensor, Tensor, float], Tensor]
    beta: float

    def __repr__(self) -> str:
        return f"{self.function.__module__}:{self.function.__qualname__}"

    def __call__(self, pairs: Pairs) -> Tensor:
        """Return what the function returns for the log-probs of the pairs, (P,)."""
        return self.function(*pairs[:4], self.beta)  # the first four fields are the log-probs


@lru_cache
def _of_function(function: Callable[..., Tensor], beta: float) -> PairLoss:
    """Return the same object for the same function: a loss is checked once."""
    return OfLogProbs(function, beta)
