"""Predict how much a step sends to other processes, and how long it takes. Not yet compared with a GPU.

**Communication.** With DDP, gradients are all-reduced once a step. With FSDP, each layer, and the parameters outside of
the layers, are gathered for each pass: once for a draw of samples, and in each micro-batch for the reference, the
forward and the backward pass, after which gradients are reduce-scattered. The backward pass gathers no layer below the
trained ones, except one that is prefetched.

**Time.** A pass takes its model FLOPs over the assumed FLOP/s, and full checkpointing one more forward pass. A decoded
token takes the time to read all matrices, keys and values, or to compute with them if that is longer. The optimizer
takes the time to read and write weights and states. A layer's exchange overlaps with the computation of other layers;
parameters outside of the layers, and weights for sampling, do not overlap. Samples have the maximal length.

Left out: latencies, the host's work, reward functions, buffers, gradient norms, evaluations, checkpoints.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from statistics import fmean
from typing import Literal, NamedTuple

import torch

from hypo_train.data.plan import Plan
from hypo_train.dry_run import DryRun
from hypo_train.metrics.devices import DEVICES, OF_LINKS, OF_MEMORY, Assumed, Device, bandwidth
from hypo_train.metrics.flops import ModelFlops, Size, UncountedError
from hypo_train.metrics.memory import readable
from hypo_train.model.policy import Policy
from hypo_train.model.reference_cache import splits_to_precompute
from hypo_train.model.reward_model import RewardModel
from hypo_train.optim import footprint
from hypo_train.preflight.findings import Findings
from hypo_train.preflight.memory_estimate import Conditions, branch_lengths, kv_bytes_per_token
from hypo_train.preflight.sharded_sizes import groups
from hypo_train.trees.layout import Layout, causal_pairs

_MAX_STEPS = 64  # steps that are averaged, from all over the run


class Passes(NamedTuple):
    """The number of times that a step gathers weights, as means over the steps of a run."""

    draws: float  # draws of samples
    micro_batches: float
    of_reference: float


class Drawn(NamedTuple):
    """The size of one draw of samples."""

    sequences: int
    prompt_tokens: int  # each prompt counted once
    new_tokens: int  # of each sequence


class Work(NamedTuple):
    """The computation of one process in a step."""

    passes: Passes
    policy: Size  # forward and backward
    reference: Size
    prefill: Size
    draw: Drawn | None  # None: no samples are drawn
    sequences_per_prompt: int  # of a draw


class Exchange(NamedTuple):
    """The communication of one phase of a step, in bytes of the gathered or summed tensors."""

    phase: str
    kind: Literal["gather", "scatter", "reduce"]  # all-gather, reduce-scatter, all-reduce
    outside: float  # parameters outside of the layers
    layers: float  # these exchanges overlap with computation

    @property
    def whole(self) -> float:
        return self.outside + self.layers

    def sent(self, count: int) -> float:
        """Return the bytes that each of ``count`` processes sends in a ring; an all-reduce sends twice as much."""
        return self.whole * (count - 1) / count * (2 if self.kind == "reduce" else 1)


class Speeds(NamedTuple):
    """The speeds that a process is assumed to reach."""

    compute: float  # FLOP/s
    memory: float  # bytes a second
    exchange: float  # bytes a second that it sends
    overlaps: bool = True  # exchanges overlap with computation


class Part(NamedTuple):
    """The seconds of one phase of a step."""

    phase: str
    computing: float
    waiting: float  # for exchanges
    hidden: float  # exchanges that overlap with computation

    @property
    def seconds(self) -> float:
        return self.computing + self.waiting


def describe_time(
    plan: Plan, trained: Policy | RewardModel, conditions: Conditions, dry_run: DryRun, findings: Findings
) -> None:
    """Put the predicted step time on the page, for the device that the dry run names or that of this machine."""
    config, count, assumed = plan.config, plan.world_size, dry_run.assumed
    work = work_of(plan, conditions, set(trained.windows or [None]))
    exchanged = exchanges(trained, work.passes, count=count, sharded=config.fsdp, autocast=conditions.autocast)
    if exchanged:
        findings.time += _exchange_lines(exchanged, count, config.fsdp)
    if count > 1 and config.vocab_parallel:
        findings.unchecked.append(
            "hidden states that vocab_parallel sends: counted as gathers of embedding and head, which it replaces"
        )
    if count > 1 and config.zero_stage:
        findings.unchecked.append(f"communication of ZeRO-{config.zero_stage}: counted as DDP's gradients")
    name = dry_run.device if dry_run.device in DEVICES else _name_of_gpu(conditions)
    if name is None:
        findings.unchecked.append(f"how long a step takes: --dry_run_device {', '.join(DEVICES)} predicts it")
        return
    device, peak = DEVICES[name], (config.peak_tflops or 0) * 1e12 or None
    speeds = assumed_speeds(device, count, assumed, peak=peak)
    if speeds is None:
        findings.unchecked.append(
            "how long a step takes: --network_gb_s says how much a device sends to other machines"
        )
        return
    try:
        flops = ModelFlops.of_outline(trained, autocast=conditions.autocast)
    except UncountedError as error:
        findings.unchecked.append(f"how long a step takes: {error}")
        return
    parts = predict(plan, trained, conditions, work, exchanged, flops, speeds)
    findings.time += _step_lines(parts, plan.total_steps) + _assumption_lines(name, device, peak, count, assumed)
    findings.unchecked.append(
        "times of evaluations, of saving, of a reward function, of computing the reference's log-probs in advance"
    )
    slow = config.draws_samples and config.fsdp
    without_graphs = ": with fsdp each sampled token may wait longer for them, as there are no CUDA graphs"
    findings.unchecked.append(f"the host's work and latencies of communication{without_graphs if slow else ''}")


def work_of(plan: Plan, conditions: Conditions, windows: Collection[int | None] = (None,)) -> Work:
    """Return the mean work of a process in a step of the run, for layers with these sliding windows."""
    config, steps = plan.config, range(0, plan.total_steps, -(-plan.total_steps // _MAX_STEPS))
    policy, reference, prefill, micro_batches = [], [], [], []
    nothing = Size(0, dict.fromkeys(windows, 0), 0)
    sampled = [plan.max_new_tokens] * config.num_generations if config.draws_samples else []
    reference_reads_pairs = config.has_reference and "train" not in splits_to_precompute(plan)
    uses_reference = reference_reads_pairs or (config.has_reference and bool(sampled))
    prefills = bool(sampled) and not conditions.prompts_run_first(plan)
    for step in steps:
        rows = [plan.train_rows[i] for i in plan.rank_share.select(plan.rows_of_step(step))]
        online = plan.num_online_here(step)
        samples = [sampled if i < online else [] for i in range(len(rows))]
        prompts = [len(row.prompt) for row in rows]
        branches = [branch_lengths(plan, row, online=i < online) for i, row in enumerate(rows)]
        lengths = [row.num_tokens + sum(added) for row, added in zip(rows, samples, strict=True)]
        micro_batches.append(sum(1 for _ in plan.micro_batches(lengths)))
        policy.append(_size(prompts, branches, conditions, windows))
        if reference_reads_pairs:
            reference.append(_size(prompts, branches, conditions, windows))
        elif uses_reference and online:
            reference.append(_size(prompts[:online], samples[:online], conditions, windows))
        else:
            reference.append(nothing)
        prefill.append(_size(prompts[:online], [[]] * online, conditions, windows) if prefills and online else nothing)
    n, window = fmean(micro_batches), config.rollout_steps
    prompt_tokens = fmean(sum(len(row.prompt) for row in plan.online_rows(step)) for step in steps)
    sequences = round(config.online_fraction * plan.batch_size / plan.world_size * len(sampled) * window)
    draw = Drawn(max(1, sequences), round(prompt_tokens / plan.world_size * window), plan.max_new_tokens)
    passes = Passes(draws=1 / window if sampled else 0, micro_batches=n, of_reference=n if uses_reference else 0)
    return Work(passes, _mean(policy), _mean(reference), _mean(prefill), draw if sampled else None, len(sampled))


def _size(
    prompts: Sequence[int],
    branches: Sequence[Sequence[int]],
    conditions: Conditions,
    windows: Collection[int | None],
) -> Size:
    """Return the size of a pass over prompts and completions of these lengths."""
    counted = sum(map(sum, branches))
    inputs = tuple(tuple(length - 1 for length in lengths) for lengths in branches)
    if conditions.shares_prompts or not counted:
        layout = Layout(tuple(prompts), inputs)
        return Size(layout.num_tokens, {w: layout.num_attended(w) for w in windows}, counted)
    rows = [prompt + length for prompt, lengths in zip(prompts, inputs, strict=True) for length in lengths]
    return Size(sum(rows), {w: sum(causal_pairs(row, w) for row in rows) for w in windows}, counted)


def _mean(sizes: Sequence[Size]) -> Size:
    attended = {w: round(fmean(size.attended[w] for size in sizes)) for w in sizes[0].attended}
    return Size(round(fmean(size.tokens for size in sizes)), attended, round(fmean(size.rows for size in sizes)))


def exchanges(
    trained: Policy | RewardModel, passes: Passes, *, count: int, sharded: bool, autocast: bool
) -> list[Exchange]:
    """Return the communication of a step among ``count`` processes.

    Args:
        trained: the unsharded model, for example on the meta device.
        sharded: weights are sharded, as with ``fsdp: true``.
        autocast: compute under bfloat16. Weights are then gathered in bfloat16; gradients are always summed in fp32.
    """
    if count == 1:
        return []
    outside, layers = groups(trained)
    if not sharded:
        gradients = 4 * sum(p.numel() for p in trained.parameters() if p.requires_grad)
        return [Exchange("backward", "reduce", 0, gradients)]

    def gathered(parameters: Iterable[torch.nn.Parameter]) -> int:
        return sum(_padded_numel(p, count) * (2 if autocast else p.element_size()) for p in parameters)

    def summed(parameters: Iterable[torch.nn.Parameter]) -> int:
        return sum(_padded_numel(p, count) * 4 for p in parameters if p.requires_grad)

    layer_bytes, trains = list(map(gathered, layers)), [any(p.requires_grad for p in layer) for layer in layers]
    lowest = max(0, trains.index(True) - 1) if True in trains else len(layers)  # FSDP prefetches one below
    gathers = [
        Exchange(phase, "gather", n * gathered(outside), n * sum(layer_bytes[first:]))
        for phase, n, first in (
            ("sample", passes.draws, 0),
            ("reference", passes.of_reference, 0),
            ("forward", passes.micro_batches, 0),
            ("backward", passes.micro_batches, lowest),
        )
    ]
    n = passes.micro_batches
    scatter = Exchange("backward", "scatter", n * summed(outside), n * sum(map(summed, layers)))
    return [exchange for exchange in [*gathers, scatter] if exchange.whole]


def _padded_numel(parameter: torch.nn.Parameter, count: int) -> int:
    """Return the number of elements once the first dimension is padded to a multiple of ``count``."""
    rows, *rest = parameter.shape
    return -(-rows // count) * count * math.prod(rest)


def assumed_speeds(device: Device, count: int, assumed: Assumed, *, peak: float | None = None) -> Speeds | None:
    """Return the assumed speeds of each of ``count`` devices, or None if the network's bandwidth is unknown.

    ``peak`` is the device's FLOP/s, by default those of its data sheet.
    """
    links = bandwidth(device, count, assumed)
    if links is None:
        return None
    return Speeds((peak or device.peak) * assumed.mfu, device.memory * OF_MEMORY, links * OF_LINKS)


def predict(
    plan: Plan,
    trained: Policy | RewardModel,
    conditions: Conditions,
    work: Work,
    exchanged: Sequence[Exchange],
    flops: ModelFlops,
    speeds: Speeds,
) -> list[Part]:
    """Return the phases of a mean step of one process. ``trained`` is on the meta device."""
    config, count = plan.config, plan.world_size
    forward = flops.policy.of(work.policy)
    again = forward - flops.policy.row * work.policy.rows if config.gradient_checkpointing is True else 0
    shares_trunk = config.share_trunk and not config.fsdp and work.passes.of_reference > 0
    reference = flops.above_trunk if shares_trunk and trained.trunk_layers else flops.reference
    computing = {
        "sample": _sampling_seconds(trained, conditions, work, flops, speeds),
        "reference": reference.of(work.reference) / speeds.compute,
        "forward": forward / speeds.compute,
        "backward": (flops.backward.of(work.policy) + again) / speeds.compute,
        "optimizer": _optimizer_bytes(plan, trained, conditions) / speeds.memory,
    }
    parts = []
    for phase, seconds in computing.items():
        of_phase = [exchange for exchange in exchanged if exchange.phase == phase]
        total = sum(exchange.sent(count) for exchange in of_phase) / speeds.exchange
        # Weights for sampling are gathered before it starts; without FSDP only the last micro-batch overlaps.
        overlapping = 0.0 if phase == "sample" or not speeds.overlaps else seconds
        if not config.fsdp:
            overlapping /= work.passes.micro_batches
        hideable = sum(exchange.sent(count) * exchange.layers / exchange.whole for exchange in of_phase)
        hidden = min(hideable / speeds.exchange, overlapping)
        if seconds or total:
            parts.append(Part(phase, seconds, total - hidden, hidden))
    return parts


def _sampling_seconds(
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
    of_window = {w: round(min(attended, attended if w is None else w * draw.sequences)) for w in flops.windows}
    size = Size(draw.sequences, of_window, draw.sequences)
    token = max((weights + kv) / speeds.memory, flops.policy.of(size) / speeds.compute)
    return flops.policy.of(work.prefill) / speeds.compute + work.passes.draws * draw.new_tokens * token


def _optimizer_bytes(plan: Plan, trained: Policy | RewardModel, conditions: Conditions) -> float:
    """Return the bytes that the optimizer reads and writes: gradients once, weights and states twice."""
    parameters, device_type = trained.trained_parameters(), conditions.device_type
    roles = trained.parameter_roles
    state = footprint(plan.config.optim, parameters.items(), roles=roles, device_type=device_type).state
    num_shards = plan.world_size if plan.config.fsdp else 1
    return (3 * 4 * sum(p.numel() for p in parameters.values()) + 2 * state) / num_shards


def _name_of_gpu(conditions: Conditions) -> str | None:
    if conditions.device_type != "cuda" or not torch.cuda.is_available():
        return None
    words = torch.cuda.get_device_name().split()
    return next((name for name in DEVICES if name in words), None)


def _exchange_lines(exchanged: Sequence[Exchange], count: int, sharded: bool) -> list[str]:
    parts: dict[str, list[str]] = {"gather": [], "scatter": [], "reduce": []}
    for exchange in exchanged:
        parts[exchange.kind].append(f"{exchange.phase} {readable(round(exchange.sent(count)))}")
    sent = readable(round(sum(exchange.sent(count) for exchange in exchanged)))
    lines = [f"each of {count} devices sends {sent} a step ({'fsdp' if sharded else 'DDP'})"]
    if parts["gather"]:
        lines.append(f"  weights gathered for {', '.join(parts['gather'])}")
    return [*lines, f"  gradients, float32: {', '.join(parts['scatter'] + parts['reduce'])}"]


def _step_lines(parts: Sequence[Part], total_steps: int) -> list[str]:
    seconds, hidden = sum(part.seconds for part in parts), sum(part.hidden for part in parts)
    waiting = sum(part.waiting for part in parts)
    phases = ", ".join(f"{part.phase} {_readable(part.seconds)}" for part in parts)
    lines = [f"a step takes about {_readable(seconds)}: {phases}"]
    if waiting + hidden:
        exchanged = f"{_readable(waiting)} of it waits for communication; {_readable(hidden)}"
        lines.append(f"  {exchanged} of communication overlaps with computation")
    return [*lines, f"  {total_steps:,} step{'s' * (total_steps > 1)} about {_readable(seconds * total_steps)}"]


def _assumption_lines(name: str, device: Device, peak: float | None, count: int, assumed: Assumed) -> list[str]:
    lines = [
        f"predicted for {name}, not yet compared with a GPU: passes at {assumed.mfu:.0%} of "
        f"{(peak or device.peak) / 1e12:g} TFLOP/s (--mfu), decoding",
        f"  and optimizer at {OF_MEMORY:.0%} of {device.memory / 1e9:,g} GB/s, samples of the maximal length",
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
