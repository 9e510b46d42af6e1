"""RLOO (Ahmadian et al. 2024): policy gradient on samples, with the reward minus beta times the KL."""

from __future__ import annotations

import torch
from torch import Tensor

from hypo_kernels import HypoLoss
from hypo_kernels.losses import Sigmoid
from hypo_train.algorithms.micro_batch import MicroBatch, run_model, run_trunk
from hypo_train.build import Run
from hypo_train.config import Config
from hypo_train.metrics.meter import Meter, add_loss_statistics, add_online_rewards
from hypo_train.model.head_call import HeadCall
from hypo_train.model.head_functions import fused_loss_call, sequence_logprobs_call
from hypo_train.trees.tree import Tree


def micro_batch_loss(run: Run, batch: MicroBatch, meter: Meter) -> Tensor:
    """Return the mean loss () of a micro-batch of prompts and their samples; add its statistics to ``meter``."""
    samples, device = batch.samples, run.accelerator.device
    assert samples is not None
    assert run.reward is not None
    with run.timer.phase("data"):
        tree = run.batcher.samples(batch.prompt_ids, samples.completions).to(device)
        behavior_logps = samples.behavior_logps(tree)
    with run.timer.phase("reward"):
        rewards = run.reward(batch.prompt_ids, samples.completions).to(device, torch.float32, non_blocking=True)
    add_online_rewards(meter, rewards, samples.num_generations)
    trunk = run_trunk(run, batch, tree)
    with run.timer.phase("reference"), run.accelerator.autocast():
        run.throughput.reference(tree, trunk_known=trunk is not None)
        ref_logps = run.policy.reference(tree, sequence_logprobs_call(tree, run.config), trunk=trunk)
    call = rloo_loss_call(tree, ref_logps, rewards, run.config, behavior_logps, loss_weight=batch.loss_weight)
    tilted = run_model(run, batch, tree, call, prompts=batch.prompts, trunk=trunk)
    out = untilted(tilted, ref_logps, rewards, run.config)
    add_loss_statistics(meter, out, run.config.num_generations)
    return out.loss


def rloo_loss_call(
    tree: Tree,
    ref_logps: Tensor,
    rewards: Tensor,
    config: Config,
    behavior_logps: Tensor | None = None,
    *,
    loss_weight: float = 1.0,
) -> HeadCall[HypoLoss]:
    """Return a call that computes the RLOO loss −(reward − beta · KL) of a tree of N samples.

    ``ref_logps`` and ``rewards`` are (N,), in the order of the samples. The reference is
    replaced by the tilted reference ``π_ref(y|x) · exp(r(x, y) / beta)``, whose normaliser cancels. Then a sample's
    log-ratio times beta is ``beta · ρ − r``, and the loss is the online term of HyPO with λ = beta. :func:`untilted`
    converts the statistics back to the reference model.
    """
    rows = {"num_pairs": 0, "ref_logps": ref_logps + rewards / config.beta, "behavior_logps": behavior_logps}
    return fused_loss_call(tree, config, rows, loss_weight, loss=Sigmoid(config.beta), kl_coef=config.beta)


def untilted(out: HypoLoss, ref_logps: Tensor, rewards: Tensor, config: Config) -> HypoLoss:
    """Return ``out`` with the log-probs and KL of the reference model instead of the tilted reference."""
    return out._replace(ref_logps=ref_logps, kl=out.kl + rewards / config.beta)
