"""Check the settings, model, data, memory and disk of a run before its weights are read.

A dry run collects all problems. A real run is refused at the end of the first stage that has a problem. The cheapest
stage comes first. Checks that need the weights are made when they are loaded.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch

from hypo_train.checkpoint.hub import check_login, create_repository
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
from hypo_train.optim import require_optimizer, require_schedule
from hypo_train.precision import computes_in_bf16, describe_precision
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
    name: str | None = None  # a key of DEVICES, if a dry run names a device that this machine may lack


@dataclass(frozen=True)
class _Outline:
    """The models on the meta device, and what a tiny model of the architecture has shown."""

    trained: Policy | RewardModel
    structure: Structure
    reward_model: Any


def check(config: Config, dry_run: DryRun) -> Findings:
    """Check a run for a dry run, and return all problems and the page."""
    default = "cuda" if torch.cuda.is_available() else "cpu"
    kind = cast(DeviceType, "cuda" if dry_run.device in DEVICES else dry_run.device or default)
    device = _Device(kind, computes_in_bf16(config, kind), dry_run.device)
    findings = Findings(config)
    with offline_if_unreachable(config):
        with findings.collected():
            refuse_to_overwrite(config)
        config.require_no_conflicts()
        _check(DryRunInputs(config, dry_run, findings), device, findings, dry_run)
    return findings


def check_run(inputs: Inputs, *, device_type: str, autocast: bool) -> Findings:
    """Check a run that starts now, and return its first page.

    Raises:
        ValueError: the run cannot start. It is the only problem, or a PreflightError with all problems of a stage.
    """
    findings = Findings(inputs.config)
    _check(inputs, _Device(cast(DeviceType, device_type), autocast), findings, None)
    findings.unchecked.clear()  # a real run checks these itself
    return findings


def _check(inputs: Inputs, device: _Device, findings: Findings, dry_run: DryRun | None) -> None:
    """Run all checks and fill ``findings``. Without ``dry_run``, raise after the first stage that has a problem."""
    config, starts = inputs.config, dry_run is None

    def end_stage() -> None:
        if starts:
            findings.refuse()

    checkpoint = _check_settings(inputs, device, findings)
    end_stage()
    if starts and inputs.rank_share.rank == 0:
        require_unlocked(Path(config.output_dir))
    source = None
    with findings.collected():
        source = inputs.source
    end_stage()
    outline = None if source is None else _check_model(config, source, device, findings, must_exist=starts)
    end_stage()
    plan = None
    with findings.collected():
        plan = _check_data(inputs, findings)
    end_stage()
    if plan is not None:
        if inputs.rank_share.rank == 0:
            rows_are_those_of_run = source is not None and source.tokenizer is not None and source.is_of_run
            with findings.collected():
                check_resume(plan, checkpoint, rows=rows_are_those_of_run)
        end_stage()
        describe_steps(config, plan, findings)
    elif outline is not None:
        findings.warnings.append(f"without the data, memory is estimated for rows {LONGEST}")
    if outline is not None:
        plan = plan or assumed_plan(config, inputs.rank_share)
        shares_prompts = outline.structure.shares_prompts is not False
        sampler = expected_sampler(config, outline.structure)
        conditions = Conditions(device.kind, device.autocast, shares_prompts, sampler)
        with findings.collected():
            check_disk(config, plan, outline.trained, findings)
        _check_memory(plan, outline, conditions, device.name, findings, shows_table=not starts)
        if dry_run is not None:
            describe_time(plan, outline.trained, conditions, dry_run, findings)
    end_stage()
    if starts and config.push_to_hub and inputs.rank_share.rank == 0:
        create_repository(str(config.hub_model_id), private=config.hub_private_repo)
    if starts and splits_to_precompute(inputs.plan):
        require_writable(cache_folder(config))


def _check_settings(inputs: Inputs, device: _Device, findings: Findings) -> Path | None:
    """Check settings that need neither model nor data; return the checkpoint to resume from, or None."""
    config, checkpoint = inputs.config, None
    with findings.collected():
        check_output_dir(config)
    with findings.collected():
        check_kernels(config, device.kind)
    for require in (
        require_optimizer,
        require_schedule,
        require_quantization,
        require_deepspeed,
        require_sampler,
        require_trackers,
    ):
        with findings.collected():
            require(config)
    if config.push_to_hub and inputs.rank_share.rank == 0:
        with findings.collected():
            check_login(str(config.hub_model_id))
        if (
            config.use_peft
            and not config.spec.trains_reward_model
            and Path(config.model_name_or_path).expanduser().exists()
        ):
            findings.warnings.append(
                f"model_name_or_path={config.model_name_or_path!r} is a local folder, so the adapter that is uploaded "
                "names no base model: for a whole model upload with python -m hypo_train export --merge"
            )
    with findings.collected():
        checkpoint = checkpoint_to_resume(config, tensors=False)
    with findings.collected():
        _ = inputs.reward_function
    return checkpoint


def _check_model(
    config: Config, source: Source, device: _Device, findings: Findings, *, must_exist: bool
) -> _Outline | None:
    """Return the models on the meta device; None if the model has a problem or needs its checkpoint to be built."""
    trained, structure, reward_model = None, UNKNOWN, None
    with findings.collected():
        try:
            trained = build_on_meta(config, source.architecture, device_type=device.kind, autocast=device.autocast)
        except StructureError as error:
            if not must_exist:
                raise
            findings.warnings.append(
                f"{error}: memory and disk are not estimated, and the model is not checked before it is loaded"
            )
    if trained is not None:
        with findings.collected():
            structure = look_at_structure(config, source.architecture)
        describe_model(config, source, trained, structure, findings)
    findings.model.append(describe_precision(config, device.kind))
    with findings.collected():
        reward_model = check_reward_model(config, source, findings, must_exist=must_exist)
    return None if trained is None else _Outline(trained, structure, reward_model)


def _check_data(inputs: Inputs, findings: Findings) -> Plan:
    """Load the rows, put reports on them on the page, and return the plan.

    Raises:
        DataError: the data cannot be used.
        ModelError: the model has no embedding for a token.
    """
    plan, reports = inputs.rows
    if inputs.source is not None and inputs.source.tokenizer is not None:
        check_vocabulary(inputs.source, plan)
    for split, report in reports.items():
        findings.data[split] = inputs.data_report[split] if inputs.source is not None else report.lines()
        findings.warnings += [f"{split}: {line}" for line in report.warnings()]
    return plan


def _check_memory(
    plan: Plan,
    outline: _Outline,
    conditions: Conditions,
    device_name: str | None,
    findings: Findings,
    *,
    shows_table: bool,
) -> None:
    try:
        numbers = estimate(plan, outline.trained, conditions, reward_model=outline.reward_model)
    except Exception as error:  # a structure that cannot be simulated may still be trained
        findings.warnings.append(f"memory is not estimated: {first_line(error)}")
        return
    with findings.collected():
        check_memory(plan.config, numbers, conditions, findings, shows_table=shows_table, device_name=device_name)
