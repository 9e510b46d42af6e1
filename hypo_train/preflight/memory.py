"""Compare the estimated memory of a run with the memory of its device, and give advice."""

from __future__ import annotations

import os
import resource
from pathlib import Path

import torch

from hypo_train.config import Config, ConfigError
from hypo_train.metrics import devices
from hypo_train.metrics.memory import GIB, readable
from hypo_train.preflight.findings import Findings
from hypo_train.preflight.memory_estimate import GATHERED, Conditions, DeviceType, Estimate

COMMON_SIZES = (24, 48, 80, 141)  # GiB, of common devices
FREE = 0.9  # part of a device's memory; the rest is for CUDA's context, the allocator and what is not estimated


def check_memory(
    config: Config,
    numbers: Estimate,
    conditions: Conditions,
    findings: Findings,
    *,
    shows_table: bool,
    device_name: str | None = None,
) -> None:
    """Compare the memory that a step needs with the memory of the device.

    Args:
        shows_table: put the table of all components on the page.
        device_name: a key of ``DEVICES``; None means the device of this machine.

    Raises:
        ConfigError: the memory that every step needs, whatever its rows are, exceeds the device's.
    """
    findings.unchecked.append(
        "memory of evaluations, of CUDA's context and of libraries, and memory that the allocator does not use"
    )
    if config.draws_samples and conditions.sampler is not None and conditions.sampler.memory is None:
        findings.unchecked.append(f"memory of the sampler {config.sampler}: its weights, keys and values")
    if shows_table:
        findings.memory += _table(numbers, conditions)
    device = devices.DEVICES.get(device_name or "")
    needed, available = numbers.least, device.gib * GIB if device else available_memory(conditions.device_type)
    if available is None:
        fitting = next((size for size in COMMON_SIZES if needed <= FREE * size * GIB), None)
        fits = f"fits a device of {fitting} GiB" if fitting else f"fits no device of {COMMON_SIZES[-1]} GiB"
        findings.memory.append(f"at least {readable(needed)}: {fits}, with 10% left free")
        if not fitting:
            findings.warnings.append(_too_much(config, numbers, needed, int(COMMON_SIZES[-1] * GIB)))
        return
    where = f"{device_name} has" if device else "are there"
    findings.memory.append(f"at least {readable(needed)} of the {readable(available)} that {where}")
    if (always := _states(numbers) + _gathered_for_samples(numbers)) > available:
        advice = _advice_on_samples(numbers) + _advice_on_states(config, numbers)
        raise ConfigError(
            f"memory: weights, their copies and the optimizer's state alone take {readable(always)}, and the device "
            f"has {readable(available)}: try {', '.join(advice) or 'a larger device'}"
        )
    if needed > FREE * available:
        findings.warnings.append(_too_much(config, numbers, needed, available))


def _table(numbers: Estimate, conditions: Conditions) -> list[str]:
    """Return a table with the GiB of each component in each phase of a step."""
    phases, dtype = numbers.phases, "bfloat16" if conditions.autocast else "float32"
    lines = [f"GiB on {conditions.device_type}, computing in {dtype}, at the peak of each phase of a step"]
    lines.append(f"{'':46}" + "".join(f"{name:>11}" for name in phases))
    for part in numbers.components:
        lines.append(f"{part.name:46}" + "".join(f"{_gib(getattr(part, name)):>11}" for name in phases))
    lines.append(f"{'total':46}" + "".join(f"{_gib(number):>11}" for number in phases.values()))
    return lines


def _too_much(config: Config, numbers: Estimate, needed: int, available: int) -> str:
    return f"memory: {readable(needed)} are more than 90% of {readable(available)}: {_advice(config, numbers)}"


def _states(numbers: Estimate) -> int:
    """Return the bytes that are held in all phases of a step, whatever its rows are."""
    return sum(min(part[1:]) for part in numbers.components)


def _gathered_for_samples(numbers: Estimate) -> int:
    """Return the bytes of sharded weights that are gathered to draw samples."""
    return sum(part.sampling for part in numbers.components if part.name == GATHERED) * numbers.draws_samples


def _gib(number: int) -> str:
    return f"{number / GIB:.2f}" if number else "-"


def available_memory(device: DeviceType) -> int | None:
    """Return the bytes of memory that are free for the run; None if this machine lacks the device."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else None
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 2**10
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min(machine, _container_limit() or machine) - resident


def _container_limit(path: Path = Path("/sys/fs/cgroup/memory.max")) -> int | None:
    """Return the memory limit of this process's control group in bytes; None if there is none."""
    try:
        limit = path.read_text(encoding="ascii").strip()
    except OSError:
        return None
    return int(limit) if limit.isdigit() else None


def _advice(config: Config, numbers: Estimate) -> str:
    """Return advice that depends on which components take most memory."""
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
    if _gathered_for_samples(numbers) <= numbers.peak / 2:
        return []
    return ["algorithm: dpo, because sampling gathers all weights on each device, so more devices do not help"]


def _advice_on_states(config: Config, numbers: Estimate) -> list[str]:
    advice = []
    if numbers.processes > 1 and not config.fsdp:
        advice.append("fsdp: true")
    if not config.use_peft:
        advice.append("use_peft: true" + ("" if config.trains_part else " or num_layers_unfrozen"))
    if config.dtype == "float32" and config.trains_part:
        advice.append("dtype: bfloat16 with bf16: true for the frozen weights")
    return advice
