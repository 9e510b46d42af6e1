"""Preference losses of pairs: DPO, IPO, and HyPO with its online samples."""

from __future__ import annotations

from torch import Tensor

from hypo_kernels import HypoLoss, sequence_logprobs
from hypo_train.algorithms.micro_batch import MicroBatch, run_model, run_trunk
from hypo_train.algorithms.reference import Reference, reference_of_batch
from hypo_train.algorithms.registry import PairLoss
from hypo_train.build import Run
from hypo_train.config import Config
from hypo_train.metrics.meter import Meter, add_loss_statistics
from hypo_train.model.head_call import HeadCall
from hypo_train.model.head_functions import fused_loss_call, head_options
from hypo_train.model.policy import Head
from hypo_train.trees.tree import Tree


def micro_batch_loss(run: Run, batch: MicroBatch, meter: Meter) -> Tensor:
    """Return the mean loss () of a micro-batch of pairs and their samples; add its statistics to ``meter``."""
    samples, device = batch.samples, run.accelerator.device
    with run.timer.phase("data"):
        tree = run.batcher.pairs(batch.rows, batch.completions, run.config.num_generations).to(device)
        behavior_logps = samples.behavior_logps(tree) if samples else None
    trunk = run_trunk(run, batch, tree)
    with run.timer.phase("reference"), run.accelerator.autocast():
        reference = reference_of_batch(run, batch, tree, trunk)
    call = preference_loss_call(
        tree,
        reference,
        len(batch.rows),
        run.config,
        behavior_logps,
        loss_weight=batch.loss_weight,
        online_weight=batch.online_weight(run.config.online_fraction),
    )
    out = run_model(run, batch, tree, call, prompts=batch.prompts, trunk=trunk)
    add_loss_statistics(meter, out, run.config.num_generations)
    return out.loss


def preference_loss_call(
    tree: Tree,
    reference: Reference,
    num_pairs: int,
    config: Config,
    behavior_logps: Tensor | None = None,
    *,
    loss_weight: float = 1.0,
    online_weight: float = 1.0,
) -> HeadCall[HypoLoss]:
    """Return a call that computes the configured preference loss of a tree of pairs and samples.

    Args:
        tree: P chosen, P rejected, then the samples.
        reference: the reference model's results for the tree's sequences.
        num_pairs: P.
        config: the configuration of the run.
        behavior_logps: (T,) log-probs under the earlier policy that drew the samples.
        loss_weight: the factor by which the caller multiplies the loss before ``backward``.
        online_weight: the factor of the mean online loss, beside ``kl_coef``.
    """
    preference = config.spec.preference
    if callable(preference):
        return _pair_loss_call(tree, reference, config, preference, loss_weight)
    rows = {
        "num_pairs": num_pairs,
        "ref_logps": reference.logps,
        "ref_hidden": reference.hidden,
        "behavior_logps": behavior_logps,
    }
    return fused_loss_call(
        tree,
        config,
        rows,
        loss_weight,
        ref_lm_head_weight=reference.weight,
        ref_bias=reference.bias,
        kl_coef=config.kl_coef * online_weight,
        preference=preference or "sigmoid",
        label_smoothing=config.label_smoothing,
        kl_estimator=config.kl_estimator,
    )


def _pair_loss_call(
    tree: Tree, reference: Reference, config: Config, pair_loss: PairLoss, loss_weight: float
) -> HeadCall[HypoLoss]:
    """Return a call that computes a user-defined loss, a function of the pairs' log-probs."""

    def loss(hidden: Tensor, head: Head, targets: Tensor, cu_seqlens: Tensor, ref_logps: Tensor) -> HypoLoss:
        logps = sequence_logprobs(hidden, head.weight, targets, cu_seqlens, **head_options(head, config))
        chosen, rejected = logps.chunk(2)
        ref_chosen, ref_rejected = ref_logps.chunk(2)
        losses = pair_loss(chosen, rejected, ref_chosen, ref_rejected, config.beta)
        if losses.shape != chosen.shape:
            raise ValueError(
                f"algorithm={config.algorithm!r}: its preference function returned a tensor of shape "
                f"{tuple(losses.shape)}, should return one loss for each of {len(chosen)} pairs"
            )
        rewards = config.beta * (logps - ref_logps).detach()
        return HypoLoss(
            loss=losses.mean(),
            logps=logps.detach(),
            ref_logps=ref_logps,
            chosen_rewards=rewards[: len(chosen)],
            rejected_rewards=rewards[len(chosen) :],
            margins=rewards[: len(chosen)] - rewards[len(chosen) :],
            kl=logps.new_empty(0),
            lengths=cu_seqlens.diff(),
        )

    rows = {"targets": tree.targets, "cu_seqlens": tree.cu_seqlens, "ref_logps": reference.logps}
    return HeadCall(loss, rows, loss_weight)
