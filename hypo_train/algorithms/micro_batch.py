"""A micro-batch, and the forward passes of the policy that all algorithms use."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

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
    samples: StepSamples | None  # completions of the rows' prompts
    prompts: PromptPass | None  # the policy's pass over the rows' prompts
    loss_weight: float  # the mean loss is multiplied by it before ``backward``

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
    """Return the result of ``call`` on the trained model's hidden states. The call is timed as phase "loss"."""
    timed = replace(call, around=lambda: run.timer.phase("loss"))
    with run.timer.phase("forward"), run.accelerator.autocast():
        result: T = run.model(tree, timed, **passes)
    run.throughput.policy(tree, len(batch.rows))
    return result
