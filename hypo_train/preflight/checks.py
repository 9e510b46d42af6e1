"""Checks a run before its weights are read: settings, model, data, memory and disk.

A dry run collects all problems. A run that is to start is refused at the end of the first stage with a problem; the
cheapest stage comes first. What only the weights can show is checked when they are loaded.
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
from hypo_train.inputs import Inputs, Source
from hypo_train.metrics.devices import DEVICES
from hypo_train.metrics.trackers import require_trackers
from hypo_train.model.load import StructureError, build_on_meta
from hypo_train.model.policy import Policy
from hypo_train.model.quantization import require_quantization
from hypo_train.model.reference_cache import cache_folder, require_writable, splits_to_precompute
from hypo_train.model.reward_model import RewardModel
from hypo_train.model.tree_model import first_line
from hypo_train.optim import require_optimizer
from hypo_train.preflight.data import check_vocabulary, describe_steps
from hypo_train.preflight.device import check_kernels, require_sampler
from hypo_train.preflight.disk import check_disk, check_output_dir
from hypo_train.preflight.findings import Findings
from hypo_train.preflight.hub import offline_if_unreachable
from hypo_train.preflight.memory import check_memory
from hypo_train.preflight.memory_estimate import Conditions, DeviceType, estimate
from hypo_train.preflight.model import check_reward_model, describe_model, expected_sampler
from hypo_train.preflight.step_time import describe_time
from hypo_train.preflight.substitutes import LONGEST, DryRunInputs, assumed_plan
from hypo_train.preflight.tiny_model import UNKNOWN, Structure, look_at_structure


@dataclass(frozen=True)
class _Device:
    kind: DeviceType
    autocast: bool
    name: str | None = None  # a key of DEVICES, if a dry run names a device that need not be here


@dataclass(frozen=True)
class _Outline:
    """The models on the meta device, and what a tiny model of the architecture shows."""

    trained: Policy | RewardModel
    structure: Structure
    reward_model: Any


def check(config: Config, dry_run: DryRun) -> Findings:
    """Return all problems and the page of a dry run."""
    default = "cuda" if torch.cuda.is_available() else "cpu"
    kind = cast(DeviceType, "cuda" if dry_run.device in DEVICES else dry_run.device or default)
    device = _Device(kind, kind == "cuda" if config.bf16 is None else config.bf16, dry_run.device)
    found = Findings(config)
    with offline_if_unreachable(config):
        with found.collected():
            refuse_to_overwrite(config)
        config.require_no_conflicts()
        _check(DryRunInputs(config, dry_run, found), device, found, dry_run)
    return found


def check_run(inputs: Inputs, *, device_type: str, autocast: bool) -> Findings:
    """Return the first page of a run that is to start now.

    Raises:
        ValueError: the run cannot start: the problem itself, or a PreflightError with all problems of a stage.
    """
    found = Findings(inputs.config)
    _check(inputs, _Device(cast(DeviceType, device_type), autocast), found, None)
    found.unchecked.clear()  # the run itself will show it
    return found


def _check(inputs: Inputs, device: _Device, found: Findings, dry_run: DryRun | None) -> None:
    """Fill ``found``. Without ``dry_run``, raise at the end of the first stage that has a problem."""
    config, starts = inputs.config, dry_run is None

    def end_stage() -> None:
        if starts:
            found.refuse()

    checkpoint = _check_settings(inputs, device, found)
    end_stage()
    if starts and inputs.rank_share.rank == 0:
        require_unlocked(Path(config.output_dir))
    source = None
    with found.collected():
        source = inputs.source
    end_stage()
    outlined = None if source is None else _check_model(config, source, device, found, must_exist=starts)
    end_stage()
    plan = None
    with found.collected():
        plan = _check_data(inputs, found)
    end_stage()
    if plan is not None:
        if inputs.rank_share.rank == 0:
            has_its_rows = source is not None and source.tokenizer is not None and source.is_of_run
            with found.collected():
                check_resume(plan, checkpoint, rows=has_its_rows)
        end_stage()
        describe_steps(config, plan, found)
    elif outlined is not None:
        found.warnings.append(f"without the data, memory is estimated for rows {LONGEST}")
    if outlined is not None:
        plan = plan or assumed_plan(config, inputs.rank_share)
        shares_prompts = outlined.structure.shares_prompts is not False
        sampler = expected_sampler(config, outlined.structure)
        conditions = Conditions(device.kind, device.autocast, shares_prompts, sampler)
        with found.collected():
            check_disk(config, plan, outlined.trained, found)
        _check_memory(plan, outlined, conditions, device.name, found, shows_table=not starts)
        if dry_run is not None:
            describe_time(plan, outlined.trained, conditions, dry_run, found)
    end_stage()
    if starts and splits_to_precompute(inputs.plan):
        require_writable(cache_folder(config))


def _check_settings(inputs: Inputs, device: _Device, found: Findings) -> Path | None:
    """Check what needs neither model nor data; return the checkpoint to resume from, if there is one."""
    config, checkpoint = inputs.config, None
    with found.collected():
        check_output_dir(config)
    with found.collected():
        check_kernels(config, device.kind)
    for require in (require_optimizer, require_quantization, require_deepspeed, require_sampler, require_trackers):
        with found.collected():
            require(config)
    with found.collected():
        checkpoint = checkpoint_to_resume(config, tensors=False)
    with found.collected():
        _ = inputs.reward_function
    return checkpoint


def _check_model(
    config: Config, source: Source, device: _Device, found: Findings, *, must_exist: bool
) -> _Outline | None:
    """Return the models' outlines; None if the model has a problem, or cannot be built without its checkpoint."""
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


def _check_data(inputs: Inputs, found: Findings) -> Plan:
    """Load the rows and describe them. Raises DataError, or ModelError for tokens without an embedding."""
    plan, reports = inputs.rows
    if inputs.source is not None and inputs.source.tokenizer is not None:
        check_vocabulary(inputs.source, plan)
    for split, report in reports.items():
        found.data[split] = report.lines()
        found.warnings += [f"{split}: {line}" for line in report.warnings()]
    return plan


def _check_memory(
    plan: Plan,
    outlined: _Outline,
    conditions: Conditions,
    device_name: str | None,
    found: Findings,
    *,
    shows_table: bool,
) -> None:
    try:
        numbers = estimate(plan, outlined.trained, conditions, reward_model=outlined.reward_model)
    except Exception as error:  # a structure that cannot be simulated may still be trained
        found.warnings.append(f"memory is not estimated: {first_line(error)}")
        return
    with found.collected():
        check_memory(plan.config, numbers, conditions, found, shows_table=shows_table, device_name=device_name)
