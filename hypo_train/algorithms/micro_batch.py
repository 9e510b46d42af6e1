"""The loss of a micro-batch, one function an algorithm: ``tree → reference or reward → loss of the model``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from hypo_kernels import HypoLoss
from hypo_train.algorithms.losses import (
    Reference,
    bradley_terry_loss,
    preference_loss,
    reference_of,
    rloo_loss,
    sequence_logprobs_of,
    token_losses,
)
from hypo_train.algorithms.rollouts import StepSamples, add_importance
from hypo_train.build import Run
from hypo_train.metrics.meter import Meter, add_loss, add_online_rewards, add_rewards
from hypo_train.metrics.timing import PhaseTimer
from hypo_train.model.policy import HeadFunction
from hypo_train.model.reward_model import rewards_of
from hypo_train.model.tree_model import PromptPass, Trunk
from hypo_train.trees.tree import Tree


@dataclass(frozen=True)
class MicroBatch:
    """A part of a step's rows, and what the step has made of them before."""

    rows: Sequence[Any]  # Pair, Example or Prompt
    indices: Sequence[int]  # of the rows among all training rows
    samples: StepSamples | None  # of the rows' prompts
    prompts: PromptPass | None  # the rows' prompts, run already
    share: float  # what its mean loss is multiplied by before ``backward``

    @property
    def prompt_ids(self) -> list[Sequence[int]]:
        return [row.prompt for row in self.rows]


def loss_of(run: Run, batch: MicroBatch, meter: Meter) -> Tensor:
    """The mean loss () of a micro-batch's rows, for ``backward``; its statistics go to ``meter``."""
    algorithms = {"sft": _sft, "reward": _reward, "rloo": _rloo}
    return algorithms.get(run.config.algorithm, _preference)(run, batch, meter)


def _preference(run: Run, batch: MicroBatch, meter: Meter) -> Tensor:
    """DPO, IPO or HyPO, of pairs and their samples."""
    samples, device = batch.samples, run.accelerator.device
    with run.timer.phase("data"):
        tree = run.batcher.pairs(batch.rows, samples.completions if samples else []).to(device)
        behavior_logps = samples.behavior_logps(tree) if samples else None
    trunk = _run_trunk(run, batch, tree)
    with run.timer.phase("reference"), run.accelerator.autocast():
        reference = _reference(run, batch, tree, trunk)
    loss = preference_loss(tree, reference, len(batch.rows), run.config, behavior_logps, share=batch.share)
    return _through_policy(run, batch, tree, trunk, loss, meter)


def _rloo(run: Run, batch: MicroBatch, meter: Meter) -> Tensor:
    """RLHF, of samples alone."""
    samples, device = batch.samples, run.accelerator.device
    assert samples is not None
    assert run.reward is not None
    with run.timer.phase("data"):
        tree = run.batcher.samples(batch.prompt_ids, samples.completions).to(device)
        behavior_logps = samples.behavior_logps(tree)
    with run.timer.phase("reward"):
        rewards = run.reward(batch.prompt_ids, samples.completions).to(device, torch.float32, non_blocking=True)
    add_online_rewards(meter, rewards, samples.num_generations)
    trunk = _run_trunk(run, batch, tree)
    with run.timer.phase("reference"), run.accelerator.autocast():
        run.throughput.reference(tree, trunk_known=trunk is not None)
        ref_logps = run.policy.reference(tree, sequence_logprobs_of(tree, run.config), trunk=trunk)
    loss = rloo_loss(tree, ref_logps, rewards, run.config, behavior_logps, share=batch.share)
    return _through_policy(run, batch, tree, trunk, loss, meter)


def _run_trunk(run: Run, batch: MicroBatch, tree: Tree) -> Trunk | None:
    """The frozen layers below the trained ones, for the policy and its reference."""
    if not run.shares_trunk:
        return None
    with run.timer.phase("forward"), run.accelerator.autocast():
        return run.policy.run_trunk(tree, batch.prompts)


def _through_policy(
    run: Run, batch: MicroBatch, tree: Tree, trunk: Trunk | None, loss: HeadFunction[HypoLoss], meter: Meter
) -> Tensor:
    with run.timer.phase("forward"), run.accelerator.autocast():
        out = run.model(tree, _timed(run.timer, loss), prompts=batch.prompts, trunk=trunk)
    run.throughput.policy(tree, len(batch.rows))
    add_loss(meter, out, run.config.num_generations)
    add_importance(meter, out)
    return out.loss


def _reward(run: Run, batch: MicroBatch, meter: Meter) -> Tensor:
    """A reward model's Bradley–Terry loss, of pairs."""
    with run.timer.phase("data"):
        tree = run.batcher.scored_pairs(batch.rows).to(run.accelerator.device)
    with run.timer.phase("forward"), run.accelerator.autocast():
        rewards = run.model(tree, _timed(run.timer, rewards_of(tree))).view(-1, 2)
        losses = bradley_terry_loss(rewards)
    run.throughput.policy(tree, len(batch.rows))
    add_rewards(meter, rewards, losses)
    return losses.mean()


def _sft(run: Run, batch: MicroBatch, meter: Meter) -> Tensor:
    """Mean negative log-prob of the completions' tokens."""
    with run.timer.phase("data"):
        tree = run.batcher.examples(batch.rows).to(run.accelerator.device)
    with run.timer.phase("forward"), run.accelerator.autocast():
        out = run.model(tree, _timed(run.timer, token_losses(tree, run.config, share=batch.share)))
    run.throughput.policy(tree, len(batch.rows))
    meter.add("loss", out.of_tokens)
    return cast(Tensor, out.loss)


def _reference(run: Run, batch: MicroBatch, tree: Tree, trunk: Trunk | None) -> Reference:
    """What the loss has to know of the reference, asked for no more than is not known."""
    known, samples = _known_logps(run, batch.indices), batch.samples
    if known is None:
        asked = tree
    elif samples is None:
        return Reference(logps=known)
    elif trunk is not None:  # the layers above it are few: what the pairs cost there is not worth another trunk
        asked = tree.sequences_from(len(known))
    else:
        asked = run.batcher.samples(batch.prompt_ids, samples.completions).to(known.device)
    run.throughput.reference(asked, trunk_known=trunk is not None)
    if known is None:
        return reference_of(run.policy, asked, run.config, trunk=trunk)
    of_samples = run.policy.reference(asked, sequence_logprobs_of(asked, run.config), trunk=trunk)
    return Reference(logps=torch.cat([known, of_samples]))


def _known_logps(run: Run, indices: Sequence[int]) -> Tensor | None:
    """The reference's log-probs of these rows' chosen, then their rejected, (2 P,), where they were precomputed."""
    known = run.train_ref_logps
    if known is None:
        return None
    # Not blocking: an index on the host would wait for the device.
    return known[torch.tensor(indices).to(known.device, non_blocking=True)].T.flatten()


def _timed(timer: PhaseTimer, function: Any) -> Any:
    """The function of hidden states and head as the phase "loss", which is no part of the forward pass around it."""

    def timed(hidden: Tensor, head: Any) -> Any:
        with timer.phase("loss"):
            return function(hidden, head)

    return timed
