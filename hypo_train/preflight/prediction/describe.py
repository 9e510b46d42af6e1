"""What a step exchanges with other processes, and how long it may take: predictions, with what they assume."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from hypo_train.data.plan import Plan
from hypo_train.dry_run import DryRun
from hypo_train.metrics.devices import DEVICES, OF_LINKS, OF_MEMORY, Assumed, Device, bandwidth
from hypo_train.metrics.flops import ModelFlops, UncountedError
from hypo_train.metrics.memory import readable
from hypo_train.model.policy import Policy
from hypo_train.model.reward_model import RewardModel
from hypo_train.preflight.findings import Findings
from hypo_train.preflight.memory_estimate import Conditions
from hypo_train.preflight.prediction.communication import Exchange, exchanges
from hypo_train.preflight.prediction.step_time import Part, assumed_speeds, predict
from hypo_train.preflight.prediction.work import work_of


def describe_time(
    plan: Plan, trained: Policy | RewardModel, conditions: Conditions, dry_run: DryRun, found: Findings
) -> None:
    """Lines for ``found``; of the device that the dry run names, or that is here."""
    config, count, assumed = plan.config, plan.world_size, dry_run.assumed
    work = work_of(plan, conditions)
    exchanged = exchanges(trained, work.passes, count=count, sharded=config.fsdp, autocast=conditions.autocast)
    if exchanged:
        found.time += _exchanges(exchanged, count, config.fsdp)
    if count > 1 and config.vocab_parallel:
        found.unchecked.append(
            "hidden states that vocab_parallel sends: counted as the embedding and head that it spares"
        )
    if count > 1 and config.zero_stage:
        found.unchecked.append(f"what ZeRO-{config.zero_stage} exchanges: counted as DDP's gradients")
    name = dry_run.device if dry_run.device in DEVICES else _device_here(conditions)
    if name is None:
        found.unchecked.append(f"how long a step takes: --dry_run_device {', '.join(DEVICES)} predicts it")
        return
    device, peak = DEVICES[name], (config.peak_tflops or 0) * 1e12 or None
    speeds = assumed_speeds(device, count, assumed, peak=peak)
    if speeds is None:
        found.unchecked.append("how long a step takes: --network_gb_s says how much a device sends to other machines")
        return
    try:
        flops = ModelFlops.of_outline(trained, autocast=conditions.autocast)
    except UncountedError as error:
        found.unchecked.append(f"how long a step takes: {error}")
        return
    parts = predict(plan, trained, conditions, work, exchanged, flops, speeds)
    found.time += _step(parts, plan.total_steps)
    found.time += _assumptions(name, device, peak, count, assumed)
    found.unchecked.append("times of evaluations, of saving, of a reward function, of the reference's pass beforehand")
    slow = config.draws_samples and config.fsdp
    without_graphs = ": with fsdp each sampled token may wait longer for them, as there are no CUDA graphs"
    found.unchecked.append(f"the host's work and latencies of exchanges{without_graphs if slow else ''}")


def _device_here(conditions: Conditions) -> str | None:
    if conditions.device_type != "cuda" or not torch.cuda.is_available():
        return None
    here = torch.cuda.get_device_name()
    return next((name for name in DEVICES if name in here.split()), None)


def _exchanges(exchanged: Sequence[Exchange], count: int, sharded: bool) -> list[str]:
    """Of one device, by what for."""
    parts: dict[str, list[str]] = {"gather": [], "scatter": [], "reduce": []}
    for exchange in exchanged:
        parts[exchange.kind].append(f"{exchange.phase} {readable(round(exchange.sent(count)))}")
    sent = readable(round(sum(exchange.sent(count) for exchange in exchanged)))
    lines = [f"each of {count} devices sends {sent} a step ({'fsdp' if sharded else 'DDP'})"]
    if parts["gather"]:
        lines.append(f"  weights put together for {', '.join(parts['gather'])}")
    lines.append(f"  gradients, float32: {', '.join(parts['scatter'] + parts['reduce'])}")
    return lines


def _step(parts: Sequence[Part], total_steps: int) -> list[str]:
    together, hidden = sum(part.seconds for part in parts), sum(part.hidden for part in parts)
    waiting = sum(part.waiting for part in parts)
    lines = [
        f"a step takes about {_readable(together)}: "
        + ", ".join(f"{part.phase} {_readable(part.seconds)}" for part in parts)
    ]
    if waiting + hidden:
        exchanged = f"{_readable(waiting)} of it waits for exchanges; {_readable(hidden)}"
        lines.append(f"  {exchanged} of them hide behind computation")
    lines.append(f"  {total_steps:,} step{'s' * (total_steps > 1)} about {_readable(together * total_steps)}")
    return lines


def _assumptions(name: str, device: Device, peak: float | None, count: int, assumed: Assumed) -> list[str]:
    lines = [
        f"predicted for {name}, and on no GPU compared yet: passes at {assumed.mfu:.0%} of "
        f"{(peak or device.peak) / 1e12:g} TFLOP/s (--mfu), decoding",
        f"  and optimizer at {OF_MEMORY:.0%} of {device.memory / 1e9:,g} GB/s, samples as long as they may be",
    ]
    if count > 1:
        links = bandwidth(device, count, assumed)
        assert links is not None
        nodes = -(-count // assumed.devices_per_node)
        where = f"{nodes} nodes of {assumed.devices_per_node}" if nodes > 1 else "one node"
        lines.append(f"  devices in {where}, each sends at {OF_LINKS:.0%} of {links / 1e9:g} GB/s")
    return lines


def _readable(seconds: float) -> str:
    if seconds >= 7200:
        return f"{seconds / 3600:,.1f} h"
    if seconds >= 120:
        return f"{seconds / 60:.0f} min"
    return f"{seconds:.3g} s" if seconds >= 0.1 else f"{1e3 * seconds:.2g} ms"
