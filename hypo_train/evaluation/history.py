"""The evaluations of a run so far, and what follows from them: the best checkpoint, and an early end."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hypo_train.build import Run
from hypo_train.checkpoint.best import BestModel
from hypo_train.checkpoint.files import checkpoint_folder, is_complete
from hypo_train.metrics.log import logged_evaluations


class Evaluations:
    """The evaluations in the log of a run. All processes hold the same."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._rule = BestModel.of(run.config) if run.config.compares_evaluations else None
        self._lines: list[dict[str, Any]] = run.processes.run_on_main(lambda: logged_evaluations(run.output_dir))
        self._best: Mapping[str, Any] | None = None
        self.end_training = False
        self._compare()

    def has(self, step: int) -> bool:
        """Return whether the weights after ``step`` steps were evaluated, or there is nothing to evaluate them on."""
        return not self._run.plan.eval_rows or any(line["step"] == step for line in self._lines)

    @property
    def best_step(self) -> int | None:
        """The step of the best checkpoint; None if the run does not look for it, or no evaluation counts."""
        return None if self._best is None else int(self._best["step"])

    def add(self, step: int, metrics: Mapping[str, float]) -> dict[str, float]:
        """Add an evaluation; return the best checkpoint and its metric under transformers' names, to log them."""
        self._lines.append({"step": step, **metrics})
        if self._rule is not None:
            self._rule.require_metric(metrics)
            self._compare()
        return {} if self._best is None else {"best_global_step": self._best["step"], "best_metric": self._value()}

    def why_training_ends(self, last_step: int) -> str:
        """Return the message about an early end."""
        config, total_steps = self._run.config, self._run.plan.total_steps
        return (
            f"training ends early at step {last_step} of {total_steps}: {config.early_stopping_patience} evaluations "
            f"without a better {config.best_metric} (early_stopping_patience)"
        )

    def what_is_final(self, last_step: int) -> str:
        """Return the message about the weights of the final model."""
        config = self._run.config
        if self._best is None:
            budget = config.max_kl_for_best_model
            why = "no evaluation counts" if budget is None else f"no checkpoint has an eval_kl of {budget:g} or less"
            return f"warning: {why}, so the final model has the weights of the last step, {last_step}"
        return f"the final model is that of step {self.best_step}: {config.best_metric} {self._value():.4g}"

    def _value(self) -> float:
        assert self._best is not None
        return float(self._best[self._run.config.best_metric])

    def _compare(self) -> None:
        """Find the best checkpoint and whether training ends, on the main process, which has the checkpoints."""
        if (rule := self._rule) is None:
            return
        folder = self._run.output_dir
        self._best, self.end_training = self._run.processes.run_on_main(
            lambda: (
                rule.best(self._lines, lambda step: is_complete(checkpoint_folder(folder, step))),
                rule.ends_training(self._lines),
            )
        )
