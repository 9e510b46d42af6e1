"""The memory that a run takes, beside what its device has."""

from __future__ import annotations

import os
import resource
from pathlib import Path

import torch

from hypo_train.config import Config, ConfigError
from hypo_train.metrics import devices
from hypo_train.metrics.memory import GIB, readable
from hypo_train.preflight.findings import Findings
from hypo_train.preflight.memory_estimate import PUT_TOGETHER, DeviceType, Estimate

DEVICES = (24, 48, 80, 141)  # GiB, of common ones
FREE = 0.9  # of a device: the rest is for CUDA's context, an allocator's slack and what is not estimated


def check_memory(
    config: Config,
    numbers: Estimate,
    device: DeviceType,
    autocast: bool,
    found: Findings,
    *,
    whole: bool,
    name: str | None = None,
) -> None:
    """What a step holds beside what the device has; ``whole``: with the table of its parts; ``name``: of a device that
    is known by its data sheet.

    Raises:
        ConfigError: weights, their copies, those whole for samples too, and the optimizer's state alone are more than
            the device has.
    """
    found.unchecked.append("memory of evaluations, of an allocator's slack, of CUDA's context and of libraries")
    if config.sampler == "vllm" and config.draws_samples:
        found.unchecked.append("memory of vLLM, which holds its own weights, keys and values")
    if whole:
        found.memory += _table(numbers, device, autocast)
    known = devices.DEVICES.get(name or "")
    needed, room = numbers.least, known.gib * GIB if known else device_room(device)
    if room is None:
        fitting = next((size for size in DEVICES if needed <= FREE * size * GIB), None)
        fits = f"fits a device of {fitting} GiB" if fitting else f"fits no device of {DEVICES[-1]} GiB"
        found.memory.append(f"at least {readable(needed)}: {fits}, a tenth of it left free")
        if not fitting:
            found.warnings.append(_too_much(config, numbers, needed, int(DEVICES[-1] * GIB)))
        return
    where = f"{name} has" if known else "are there"
    found.memory.append(f"at least {readable(needed)} of the {readable(room)} that {where}")
    if (always := _states(numbers) + _whole_for_samples(numbers)) > room:
        advice = _advice_on_samples(numbers) + _advice_on_states(config, numbers)
        raise ConfigError(
            f"memory: weights, their copies and the optimizer's state alone take {readable(always)}, and the device "
            f"has {readable(room)}: try {', '.join(advice) or 'a larger device'}"
        )
    if needed > FREE * room:
        found.warnings.append(_too_much(config, numbers, needed, room))


def _table(numbers: Estimate, device: DeviceType, autocast: bool) -> list[str]:
    """GiB of each part in each phase of a step."""
    phases = numbers.phases
    lines = [f"GiB on {device}, computing in {'bfloat16' if autocast else 'float32'}, when a step's parts hold most"]
    lines.append(f"{'':46}" + "".join(f"{name:>11}" for name in phases))
    for part in numbers.components:
        lines.append(f"{part.name:46}" + "".join(f"{_gib(getattr(part, name)):>11}" for name in phases))
    lines.append(f"{'together':46}" + "".join(f"{_gib(number):>11}" for number in phases.values()))
    return lines


def _too_much(config: Config, numbers: Estimate, needed: int, room: int) -> str:
    return f"memory: {readable(needed)} are more than nine tenths of {readable(room)}: {_advice(config, numbers)}"


def _states(numbers: Estimate) -> int:
    """Bytes that a run holds in every part of a step, whatever its rows are."""
    return sum(min(part[1:]) for part in numbers.components)


def _whole_for_samples(numbers: Estimate) -> int:
    """Bytes of weights that lie in parts and are put together whenever samples are drawn."""
    return sum(part.sampling for part in numbers.components if part.name == PUT_TOGETHER) * numbers.draws_samples


def _gib(number: int) -> str:
    return f"{number / GIB:.2f}" if number else "-"


def device_room(device: DeviceType) -> int | None:
    """Bytes of memory, free for the run; None: the device is not here. A CPU's holds this process as well."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else None
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 2**10
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min(machine, _container_limit() or machine) - resident


def _container_limit(path: Path = Path("/sys/fs/cgroup/memory.max")) -> int | None:
    """Bytes that this process's control group may take; None where nobody has set a limit."""
    try:
        limit = path.read_text(encoding="ascii").strip()
    except OSError:
        return None
    return int(limit) if limit.isdigit() else None


def _advice(config: Config, numbers: Estimate) -> str:
    """What to change, by what takes most."""
    advice = _advice_on_samples(numbers)
    if numbers.of("activations").training > numbers.peak / 4:
        if config.per_device_train_batch_size > 1:
            advice.append("a smaller per_device_train_batch_size with more gradient_accumulation_steps")
        if config.gradient_checkpointing in (None, False, "selective"):
            advice.append("gradient_checkpointing: true")
        lower = "a lower " if config.max_tokens_per_micro_batch is not None else ""
        advice.append(f"{lower}max_tokens_per_micro_batch")
    if _states(numbers) > numbers.peak / 2:
        advice += _advice_on_states(config, numbers)
    if config.keep_sampling_memory:
        advice.append("keep_sampling_memory: false")
    return "try " + ", ".join(advice or ["shorter sequences"])


def _advice_on_samples(numbers: Estimate) -> list[str]:
    if _whole_for_samples(numbers) <= numbers.peak / 2:
        return []
    return ["algorithm: dpo, as samples need all weights whole on each device and more devices do not help"]


def _advice_on_states(config: Config, numbers: Estimate) -> list[str]:
    advice = []
    if numbers.processes > 1 and not config.fsdp:
        advice.append("fsdp: true")
    if not config.use_peft:
        advice.append("use_peft: true" + ("" if config.num_layers_unfrozen else " or num_layers_unfrozen"))
    if config.dtype == "float32" and (config.use_peft or config.num_layers_unfrozen):
        advice.append("dtype: bfloat16 with bf16: true for the frozen weights")
    return advice
