"""Compute the inputs of a preference loss that come from the frozen reference model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hypo_train.algorithms.micro_batch import MicroBatch
from hypo_train.build import Run
from hypo_train.config import Config
from hypo_train.distributed.fsdp import is_sharded
from hypo_train.model.head_functions import sequence_logprobs_call
from hypo_train.model.policy import Policy
from hypo_train.model.tree_model import Trunk
from hypo_train.trees.tree import Tree


@dataclass(frozen=True)
class Reference:
    """The reference model's log-probs, or its hidden states and LM head."""

    logps: Tensor | None = None  # (S,)
    hidden: Tensor | None = None  # (T, D)
    weight: Tensor | None = None  # (V, D), only if the policy's head is trained
    bias: Tensor | None = None  # (V,), together with ``weight``


def compute_reference(policy: Policy, tree: Tree, config: Config, *, trunk: Trunk | None = None) -> Reference:
    """Run the reference model on ``tree``; return hidden states for the exact KL estimator, else log-probs."""
    if config.kl_estimator != "exact":
        return Reference(logps=policy.reference(tree, sequence_logprobs_call(tree, config), trunk=trunk))
    hidden = policy.reference(tree, lambda hidden, head: hidden, trunk=trunk)
    weight, bias = policy.reference_head()
    return Reference(hidden=hidden, weight=weight, bias=bias)


def reference_of_batch(run: Run, batch: MicroBatch, tree: Tree, trunk: Trunk | None) -> Reference:
    """Return the reference of a micro-batch's ``tree``, using precomputed log-probs of the pairs if there are any."""
    precomputed, samples = _precomputed_logps(run, batch.indices), batch.samples
    if precomputed is None:
        remaining = tree
    elif samples is None:
        if is_sharded(run.policy) and run.config.spec.draws_samples:
            # A layer's weights are gathered by all ranks together, and others run the reference on their samples.
            run.policy.reference(tree, sequence_logprobs_call(tree, run.config), trunk=trunk)
        return Reference(logps=precomputed)
    elif trunk is not None:  # running the pairs through the layers above the trunk costs less than a second trunk
        remaining = tree.sequences_from(len(precomputed))
    else:
        remaining = run.batcher.samples(batch.online_prompts, samples.completions).to(precomputed.device)
    run.throughput.reference(remaining, trunk_known=trunk is not None)
    if precomputed is None:
        return compute_reference(run.policy, remaining, run.config, trunk=trunk)
    sample_logps = run.policy.reference(remaining, sequence_logprobs_call(remaining, run.config), trunk=trunk)
    return Reference(logps=torch.cat([precomputed, sample_logps]))


def _precomputed_logps(run: Run, indices: Sequence[int]) -> Tensor | None:
    """Return the rows' precomputed log-probs (2 P,), all chosen first, or None if there are none.

    They are 0 if the loss of the pairs reads none.
    """
    logps = run.train_ref_logps
    if logps is None:
        if run.config.asks_reference_about_pairs or run.config.kl_estimator == "exact":
            return None
        return torch.zeros(2 * len(indices), device=run.accelerator.device)
    # The index is copied without blocking; indexing by a list would wait for the device.
    return logps[torch.tensor(indices).to(logps.device, non_blocking=True)].T.flatten()
