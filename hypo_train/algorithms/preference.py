"""The losses of preference pairs: DPO and its variants, and HyPO with its online samples."""

from __future__ import annotations

from torch import Tensor

from hypo_kernels import HypoLoss
from hypo_train.algorithms.losses import pair_loss
from hypo_train.algorithms.micro_batch import MicroBatch, run_model, run_trunk
from hypo_train.algorithms.reference import Reference, reference_of_batch
from hypo_train.build import Run
from hypo_train.config import Config
from hypo_train.metrics.meter import Meter, add_loss_statistics
from hypo_train.model.head_call import HeadCall
from hypo_train.model.head_functions import fused_loss_call
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
        loss=pair_loss(config),
        ref_lm_head_weight=reference.weight,
        ref_bias=reference.bias,
        kl_coef=config.kl_coef * online_weight,
        kl_estimator=config.kl_estimator,
    )
