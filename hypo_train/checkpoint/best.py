"""Choose the best checkpoint of a run by a metric of its evaluations, and say when training ends early.

Everything follows from the evaluations in `metrics.jsonl`, so a resumed run needs no other state. Names and rules are
those of transformers' Trainer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hypo_train.config import Config, ConfigError

Metrics = Mapping[str, Any]  # of one evaluation, with its "step"


@dataclass(frozen=True)
class BestModel:
    """How evaluations are compared."""

    metric: str  # with the prefix "eval_"
    greater_is_better: bool
    max_kl: float | None  # evaluations with a larger eval_kl do not count
    patience: int | None  # evaluations without improvement that end the training; None: it does not end early
    threshold: float

    @classmethod
    def of(cls, config: Config) -> BestModel:
        """Return the rule of a run's configuration."""
        return cls(
            config.best_metric,
            config.best_is_greatest,
            config.max_kl_for_best_model,
            config.early_stopping_patience,
            config.early_stopping_threshold,
        )

    def best(self, evaluations: Sequence[Metrics], is_kept: Callable[[int], bool]) -> Metrics | None:
        """Return the best evaluation of weights whose step ``is_kept``, the earliest of equal ones, or None."""
        values = [(self._score(line), line) for line in evaluations if line["step"] > 0 and is_kept(line["step"])]
        counted = [(score, line) for score, line in values if score is not None]
        return max(counted, key=lambda pair: pair[0])[1] if counted else None

    def ends_training(self, evaluations: Sequence[Metrics]) -> bool:
        """Return whether the last ``patience`` evaluations are no improvement by more than ``threshold``."""
        best, waited = -math.inf, 0
        for score in [self._score(line) for line in evaluations if line["step"] > 0]:
            improves = score is not None and (best == -math.inf or score - best > self.threshold)
            waited = 0 if improves else waited + 1
            best = max(best, -math.inf if score is None else score)
        return self.patience is not None and waited >= self.patience

    def require_metric(self, evaluation: Metrics) -> None:
        """Raise ConfigError if an evaluation lacks the metric."""
        if self.metric not in evaluation:
            names = ", ".join(name for name in evaluation if name.startswith("eval_"))
            raise ConfigError(f"metric_for_best_model={self.metric!r}: the evaluations of this run have {names}")

    def _score(self, line: Metrics) -> float | None:
        """Return a number that is larger for better weights; None if the evaluation does not count."""
        value = float(line.get(self.metric, math.nan))
        within_budget = self.max_kl is None or float(line.get("eval_kl", math.nan)) <= self.max_kl
        if math.isnan(value) or not within_budget:
            return None
        return value if self.greater_is_better else -value
