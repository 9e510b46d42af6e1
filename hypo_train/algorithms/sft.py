"""Supervised fine-tuning: the mean negative log-prob of the completions' tokens."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from hypo_kernels import token_logprobs
from hypo_train.algorithms.micro_batch import MicroBatch, run_model
from hypo_train.build import Run
from hypo_train.config import Config
from hypo_train.metrics.meter import Meter
from hypo_train.model.head_call import HeadCall
from hypo_train.model.head_functions import head_options
from hypo_train.model.policy import Head
from hypo_train.trees.tree import Tree


class TokenLosses(NamedTuple):
    """The mean loss, and the loss of each token."""

    loss: Tensor  # ()
    per_token: Tensor  # (T,), detached


def micro_batch_loss(run: Run, batch: MicroBatch, meter: Meter) -> Tensor:
    """Return the mean loss () of a micro-batch of examples; add its statistics to ``meter``."""
    with run.timer.phase("data"):
        tree = run.batcher.examples(batch.rows).to(run.accelerator.device)
    losses = run_model(run, batch, tree, token_losses_call(tree, run.config, loss_weight=batch.loss_weight))
    meter.add("loss", losses.per_token)
    return losses.loss


def token_losses_call(tree: Tree, config: Config, *, loss_weight: float = 1.0) -> HeadCall[TokenLosses]:
    """Return a call that computes the negative log-prob of each counted token."""

    def losses(hidden: Tensor, head: Head, targets: Tensor) -> TokenLosses:
        per_token = -token_logprobs(hidden, head.weight, targets, **head_options(head, config))
        return TokenLosses(per_token.mean(), per_token.detach())

    return HeadCall(losses, {"targets": tree.targets}, loss_weight)
