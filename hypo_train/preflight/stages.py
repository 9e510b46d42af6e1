"""A whole run checked before it starts: settings, model, data, memory and disk, without any weights.

A dry run collects all that it finds; a run is refused at the first stage that has found a problem, cheapest first. Both
go through the same stages and the code that training uses. What only weights can show is checked once they are read,
and named as not checked by a dry run.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch

from hypo_train.checkpoint.lock import require_unlocked
from hypo_train.checkpoint.resume import check_resume, checkpoint_to_resume, refuse_to_overwrite
from hypo_train.config import Config
from hypo_train.data.plan import Plan
from hypo_train.distributed.zero import require_deepspeed
from hypo_train.dry_run import DryRun
from hypo_train.metrics.devices import DEVICES
from hypo_train.metrics.trackers import require_trackers
from hypo_train.model.load import StructureError, build_on_meta
from hypo_train.model.policy import Policy
from hypo_train.model.quantization import require_quantization
from hypo_train.model.reward_model import RewardModel
from hypo_train.model.tree_model import first_line
from hypo_train.optim import require_optimizer
from hypo_train.preflight.data import assumed_plan, check_data, describe_steps
from hypo_train.preflight.device import check_kernels, require_engine
from hypo_train.preflight.disk import check_disk, check_output_dir
from hypo_train.preflight.findings import Findings
from hypo_train.preflight.hub import offline_where_unreachable
from hypo_train.preflight.memory import check_memory
from hypo_train.preflight.memory_estimate import Conditions, DeviceType, estimate
from hypo_train.preflight.model import check_reward_model, describe_model, sampler_kind
from hypo_train.preflight.prediction.describe import describe_time
from hypo_train.preflight.source import LONGEST, Source
from hypo_train.preflight.tiny_model import UNKNOWN, Structure, look_at_structure
from hypo_train.rewards import RewardFunction, load_function
from hypo_train.utils.rank_share import RankShare


@dataclass(frozen=True)
class Passed:
    """What the checks have read, for the run to go on with."""

    findings: Findings
    tokenizer: Any
    eos_token_ids: tuple[int, ...]
    plan: Plan
    reward_function: RewardFunction | None


@dataclass(frozen=True)
class _Device:
    """What the run computes on, and how."""

    kind: DeviceType
    autocast: bool
    name: str | None = None  # in costs.devices.DEVICES, where a dry run names one that need not be here


@dataclass(frozen=True)
class _Named:
    """What the settings name, and is there."""

    reward_function: RewardFunction | None
    checkpoint: Path | None  # to go on from


@dataclass(frozen=True)
class _Outline:
    """The models on the meta device, and what a miniature shows of the trained one."""

    trained: Policy | RewardModel
    structure: Structure
    reward_model: Any


def check(config: Config, dry_run: DryRun) -> Findings:
    """Everything that can be known of the run beforehand."""
    here = "cuda" if torch.cuda.is_available() else "cpu"
    kind = cast(DeviceType, "cuda" if dry_run.device in DEVICES else dry_run.device or here)
    device = _Device(kind, kind == "cuda" if config.bf16 is None else config.bf16, dry_run.device)
    rank_share = RankShare(0, dry_run.num_devices)
    found = Findings(config)
    with offline_where_unreachable(config):
        with found.collected():
            refuse_to_overwrite(config)
        named = _check_settings(config, device, found)
        source = None
        with found.collected():
            source = Source.of_dry_run(config, dry_run, found)
        outlined = None if source is None else _check_model(config, source, device, found, must_exist=False)
        plan = None
        with found.collected():
            plan = check_data(config, source, found, rank_share)
    if plan is not None:
        with found.collected():
            are_its_rows = source is not None and source.tokenizer is not None and dry_run.model is None
            check_resume(plan, named.checkpoint, rows=are_its_rows)
        describe_steps(config, plan, found)
    elif outlined is not None:
        found.warnings.append(f"without the data, memory is estimated for rows {LONGEST}")
    if outlined is not None:
        plan = plan or assumed_plan(config, rank_share)
        _check_room(config, plan, outlined, device, found, whole=True)
        describe_time(plan, outlined.trained, _conditions(config, outlined, device), dry_run, found)
    return found


def passed(config: Config, *, device_type: str, autocast: bool, rank_share: RankShare) -> Passed:
    """The same for a run that is to start now.

    Raises:
        ValueError: it cannot be run: the problem itself, or PreflightError with all of a stage.
    """
    device, found = _Device(cast(DeviceType, device_type), autocast), Findings(config)
    named = _check_settings(config, device, found)
    found.refuse()
    if rank_share.rank == 0:
        require_unlocked(Path(config.output_dir))
    source = Source.of_run(config)
    outlined = _check_model(config, source, device, found, must_exist=True)
    found.refuse()
    plan = check_data(config, source, found, rank_share)
    if rank_share.rank == 0:
        check_resume(plan, named.checkpoint)
    describe_steps(config, plan, found)
    if outlined is not None:
        _check_room(config, plan, outlined, device, found, whole=False)
    found.refuse()
    found.unchecked.clear()  # the run will show it
    return Passed(found, source.tokenizer, source.eos_token_ids, plan, named.reward_function)


def _check_settings(config: Config, device: _Device, found: Findings) -> _Named:
    with found.collected():
        check_output_dir(config)
    with found.collected():
        check_kernels(config, device.kind)
    for require in (require_optimizer, require_quantization, require_deepspeed, require_engine, require_trackers):
        with found.collected():
            require(config)
    function, checkpoint = None, None
    with found.collected():
        checkpoint = checkpoint_to_resume(config, tensors=False)
    with found.collected():
        if config.reward is not None:
            function = load_function(config.reward)
    return _Named(function, checkpoint)


def _check_model(
    config: Config, source: Source, device: _Device, found: Findings, *, must_exist: bool
) -> _Outline | None:
    """None: there is a problem with it, or its checkpoint alone shows its structure."""
    trained, structure, reward_model = None, UNKNOWN, None
    with found.collected():
        try:
            trained = build_on_meta(config, source.architecture, device_type=device.kind, autocast=device.autocast)
        except StructureError as error:
            if not must_exist:
                raise
            found.warnings.append(f"{error}: memory and disk are not estimated, and the model not looked at before")
    if trained is not None:
        with found.collected():
            structure = look_at_structure(config, source.architecture)
        describe_model(config, source, trained, structure, found)
    with found.collected():
        reward_model = check_reward_model(config, source, found, must_exist=must_exist)
    return None if trained is None else _Outline(trained, structure, reward_model)


def _conditions(config: Config, outlined: _Outline, device: _Device) -> Conditions:
    shares_prompts = outlined.structure.shares_prompts is not False
    return Conditions(device.kind, device.autocast, shares_prompts, sampler_kind(config, outlined.structure))


def _check_room(
    config: Config, plan: Plan, outlined: _Outline, device: _Device, found: Findings, *, whole: bool
) -> None:
    """Memory and disk; ``whole``: with every part of memory."""
    with found.collected():
        check_disk(config, plan, outlined.trained, found)
    _check_memory(config, plan, outlined, device, found, whole=whole)


def _check_memory(
    config: Config, plan: Plan, outlined: _Outline, device: _Device, found: Findings, *, whole: bool
) -> None:
    conditions = _conditions(config, outlined, device)
    try:
        numbers = estimate(plan, outlined.trained, conditions, reward_model=outlined.reward_model)
    except Exception as error:  # a structure that the rehearsal does not know is no reason not to train
        found.warnings.append(f"memory is not estimated: {first_line(error)}")
        return
    with found.collected():
        check_memory(config, numbers, device.kind, device.autocast, found, whole=whole, name=device.name)
