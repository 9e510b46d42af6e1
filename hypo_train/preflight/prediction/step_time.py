"""How long a step takes, predicted: model FLOPs at a speed of computing, bytes at those of memory and of links.

A pass takes its model FLOPs (:mod:`hypo_train.metrics.flops`), and the backward pass a forward pass more where all is
computed again. A decoded token takes the time to read every matrix and all keys and values, or to compute with them,
whichever is more; the optimizer the time to read and write weights and states. What is exchanged for a layer goes on
while another one computes, as far as that takes as long; what lies in no layer, and weights for sampling, are waited
for.

Left out: latencies, the host's work, what a reward function takes, the differences between processes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from hypo_train.data.plan import Plan
from hypo_train.metrics.devices import OF_LINKS, OF_MEMORY, Assumed, Device, bandwidth
from hypo_train.metrics.flops import ModelFlops, Size
from hypo_train.model.policy import Policy
from hypo_train.model.reward_model import RewardModel
from hypo_train.optim import footprint
from hypo_train.preflight.memory_estimate import Conditions, kv_bytes_per_token
from hypo_train.preflight.prediction.communication import Exchange
from hypo_train.preflight.prediction.work import Work


@dataclass(frozen=True)
class Speeds:
    """What a process reaches."""

    compute: float  # FLOP/s
    memory: float  # bytes a second
    exchange: float  # bytes a second that it sends
    overlaps: bool = True  # exchanges go on beside computation


def assumed_speeds(device: Device, count: int, assumed: Assumed, *, peak: float | None = None) -> Speeds | None:
    """What each of ``count`` devices is assumed to reach; None where what connects them is not known.

    ``peak``: its FLOP/s, where not the data sheet's.
    """
    links = bandwidth(device, count, assumed)
    if links is None:
        return None
    return Speeds((peak or device.peak) * assumed.mfu, device.memory * OF_MEMORY, links * OF_LINKS)


class Part(NamedTuple):
    """Seconds of a step's phase."""

    phase: str
    computing: float
    waiting: float  # for what is exchanged
    hidden: float  # of exchanges, behind computation

    @property
    def seconds(self) -> float:
        return self.computing + self.waiting


def predict(
    plan: Plan,
    trained: Policy | RewardModel,
    conditions: Conditions,
    work: Work,
    exchanged: Sequence[Exchange],
    flops: ModelFlops,
    speeds: Speeds,
) -> list[Part]:
    """The phases of a mean step, of one process. ``trained``: from :func:`hypo_train.model.load.build_on_meta`."""
    config, count = plan.config, plan.world_size
    forward = flops.policy.of(work.policy)
    again = forward - flops.policy.row * work.policy.rows if config.gradient_checkpointing is True else 0
    shares_trunk = config.share_trunk and not config.fsdp and work.passes.of_reference > 0
    reference = flops.above_trunk if shares_trunk and trained.trunk_layers else flops.reference
    computing = {
        "sample": _sampling(trained, conditions, work, flops, speeds),
        "reference": reference.of(work.reference) / speeds.compute,
        "forward": forward / speeds.compute,
        "backward": (flops.backward.of(work.policy) + again) / speeds.compute,
        "optimizer": _optimizer_bytes(plan, trained, conditions) / speeds.memory,
    }
    parts = []
    for phase, seconds in computing.items():
        of_phase = [exchange for exchange in exchanged if exchange.phase == phase]
        total = sum(exchange.sent(count) for exchange in of_phase) / speeds.exchange
        # Weights for sampling are there before it starts; without fsdp gradients leave in the last micro-batch.
        beside = 0.0 if phase == "sample" or not speeds.overlaps else seconds
        hideable = sum(exchange.sent(count) * exchange.layers / exchange.whole for exchange in of_phase)
        if not config.fsdp:
            beside /= work.passes.micro_batches
        hidden = min(hideable / speeds.exchange, beside)
        if seconds or total:
            parts.append(Part(phase, seconds, total - hidden, hidden))
    return parts


def _sampling(
    trained: Policy | RewardModel, conditions: Conditions, work: Work, flops: ModelFlops, speeds: Speeds
) -> float:
    if work.draw is None:
        return 0.0
    draw, half = work.draw, work.draw.new_tokens / 2
    keeps_prompts_once = conditions.sampler is not None and conditions.sampler.prompt_kv
    prompt_tokens = draw.prompt_tokens * (1 if keeps_prompts_once else work.sequences_per_prompt)
    kv = kv_bytes_per_token(trained, conditions.autocast) * (prompt_tokens + draw.sequences * half)
    weights = (flops.policy.token + flops.policy.row) / 2 * (2 if conditions.autocast else 4)
    attended = draw.prompt_tokens * work.sequences_per_prompt + draw.sequences * half
    size = Size(draw.sequences, round(attended), draw.sequences)
    token = max((weights + kv) / speeds.memory, flops.policy.of(size) / speeds.compute)
    return flops.policy.of(work.prefill) / speeds.compute + work.passes.draws * draw.new_tokens * token


def _optimizer_bytes(plan: Plan, trained: Policy | RewardModel, conditions: Conditions) -> float:
    """Read and written: gradients once, weights and states twice."""
    own = trained.trained_parameters()
    state = footprint(
        plan.config.optim, own.items(), roles=trained.parameter_roles, device_type=conditions.device_type
    ).state
    return (3 * 4 * sum(p.numel() for p in own.values()) + 2 * state) / (plan.world_size if plan.config.fsdp else 1)
