"""The Bradley–Terry loss of a reward model."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from hypo_train.algorithms.micro_batch import MicroBatch, run_model
from hypo_train.build import Run
from hypo_train.metrics.meter import Meter, add_rewards
from hypo_train.model.head_call import HeadCall
from hypo_train.model.reward_model import rewards_of


def micro_batch_loss(run: Run, batch: MicroBatch, meter: Meter) -> Tensor:
    """Return the mean loss () of a micro-batch of pairs; add its statistics to ``meter``."""
    with run.timer.phase("data"):
        tree = run.batcher.scored_pairs(batch.rows).to(run.accelerator.device)
    rewards = run_model(run, batch, tree, HeadCall(rewards_of(tree), {})).view(-1, 2)
    with run.accelerator.autocast():
        losses = bradley_terry_loss(rewards)
    add_rewards(meter, rewards, losses)
    return losses.mean()


def bradley_terry_loss(rewards: Tensor) -> Tensor:
    """Return the loss −log σ(r(x, y⁺) − r(x, y⁻)) (P,) of P pairs, from rewards (P, 2) of chosen and rejected."""
    return -F.logsigmoid(rewards[:, 0] - rewards[:, 1])
