"""A micro-batch, and the forward passes of the policy that all algorithms use."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from torch import Tensor

from hypo_train.build import Run
from hypo_train.model.head_call import HeadCall
from hypo_train.model.tree_model import PromptPass, Trunk
from hypo_train.sampling.rollouts import StepSamples
from hypo_train.trees.tree import Tree

T = TypeVar("T")


@dataclass(frozen=True)
class MicroBatch:
    """The rows of one micro-batch, their samples, and the pass over their prompts."""

    rows: Sequence[Any]  # Pair, Example or Prompt
    indices: Sequence[int]  # the rows' indices in the training rows
    samples: StepSamples | None  # completions of the prompts of the first rows; None if no row has samples
    prompts: PromptPass | None  # the policy's pass over the rows' prompts
    loss_weight: float  # the mean loss is multiplied by it before ``backward``; 0 for a repeated micro-batch
    aux_losses: list[Tensor] = field(default_factory=list)  # () of each pass of :func:`run_model`, for MoE models

    @property
    def online_prompts(self) -> list[Sequence[int]]:
        """The prompts that have samples."""
        return self.prompt_ids[: self.samples.num_prompts] if self.samples else []

    @property
    def completions(self) -> list[list[int]]:
        """The completions of these prompts."""
        return self.samples.completions if self.samples else []

    def online_weight(self, online_fraction: float) -> float:
        """Return the factor of the mean online loss of this micro-batch that makes the step's loss unbiased.

        The online loss of a step estimates the mean over all of its prompts. Each has samples with the probability
        ``online_fraction``, so the sum over those that have samples is divided by this probability.
        """
        return len(self.online_prompts) / (online_fraction * len(self.rows))

    @property
    def prompt_ids(self) -> list[Sequence[int]]:
        return [row.prompt for row in self.rows]


def run_trunk(run: Run, batch: MicroBatch, tree: Tree) -> Trunk | None:
    """Run the frozen layers that policy and reference share. Return None if they share no layers."""
    if not run.shares_trunk:
        return None
    with run.timer.phase("forward"), run.accelerator.autocast():
        return run.policy.run_trunk(tree, batch.prompts)


def run_model(run: Run, batch: MicroBatch, tree: Tree, call: HeadCall[T], **passes: Any) -> T:
    """Return the result of ``call`` on the trained model's hidden states. The call is timed as phase "loss".

    The routers' load-balancing loss of the pass, if the model adds one, is put into ``batch.aux_losses``.
    """
    timed = replace(call, around=lambda: run.timer.phase("loss"))
    result: T
    with run.timer.phase("forward"), run.accelerator.autocast():
        if run.trained.router_aux_loss_coef:
            result, aux_loss = run.model(tree, timed, with_aux_loss=True, **passes)
            batch.aux_losses.append(aux_loss)
        else:
            result = run.model(tree, timed, **passes)
    if batch.loss_weight:  # a micro-batch that is repeated with weight 0 has no tokens of its own
        run.throughput.policy(tree, len(batch.rows))
    return result
