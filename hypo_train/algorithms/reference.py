"""The frozen reference model's part of a preference loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hypo_train.algorithms.micro_batch import MicroBatch
from hypo_train.build import Run
from hypo_train.config import Config
from hypo_train.model.head_functions import sequence_logprobs_call
from hypo_train.model.policy import Policy
from hypo_train.model.tree_model import Trunk
from hypo_train.trees.tree import Tree


@dataclass(frozen=True)
class Reference:
    """The reference model's log-probs, or its hidden states and LM head."""

    logps: Tensor | None = None  # (S,)
    hidden: Tensor | None = None  # (T, D)
    weight: Tensor | None = None  # (V, D), where the head is trained and the policy's head differs
    bias: Tensor | None = None  # (V,), together with ``weight``


def compute_reference(policy: Policy, tree: Tree, config: Config, *, trunk: Trunk | None = None) -> Reference:
    """Run the reference model on ``tree`` and return what the configured loss needs of it.

    The exact KL estimator needs hidden states; every other loss needs log-probs alone.
    """
    if config.kl_estimator != "exact":
        return Reference(logps=policy.reference(tree, sequence_logprobs_call(tree, config), trunk=trunk))
    hidden = policy.reference(tree, lambda hidden, head: hidden, trunk=trunk)
    weight, bias = policy.reference_head()
    return Reference(hidden=hidden, weight=weight, bias=bias)


def reference_of_batch(run: Run, batch: MicroBatch, tree: Tree, trunk: Trunk | None) -> Reference:
    """Return the reference of a micro-batch's ``tree``; log-probs that were precomputed are not computed again."""
    precomputed, samples = _precomputed_logps(run, batch.indices), batch.samples
    if precomputed is None:
        remaining = tree
    elif samples is None:
        return Reference(logps=precomputed)
    elif trunk is not None:  # few layers are left above the trunk: the pairs cost less there than a second trunk
        remaining = tree.sequences_from(len(precomputed))
    else:
        remaining = run.batcher.samples(batch.prompt_ids, samples.completions).to(precomputed.device)
    run.throughput.reference(remaining, trunk_known=trunk is not None)
    if precomputed is None:
        return compute_reference(run.policy, remaining, run.config, trunk=trunk)
    sample_logps = run.policy.reference(remaining, sequence_logprobs_call(remaining, run.config), trunk=trunk)
    return Reference(logps=torch.cat([precomputed, sample_logps]))


def _precomputed_logps(run: Run, indices: Sequence[int]) -> Tensor | None:
    """Return the rows' log-probs, (2 P,) with all chosen first, or None where they were not precomputed."""
    logps = run.train_ref_logps
    if logps is None:
        return None
    # Not blocking: an index on the host would wait for the device.
    return logps[torch.tensor(indices).to(logps.device, non_blocking=True)].T.flatten()
