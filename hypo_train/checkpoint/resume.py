"""Find the checkpoint to resume from, and check that it belongs to this run before weights are read."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from hypo_train.checkpoint.files import damaged_checkpoints, is_checkpoint, latest_checkpoint, read_extra
from hypo_train.config import Config
from hypo_train.data.plan import Plan
from hypo_train.metrics.log import METRICS_FILE
from hypo_train.utils.errors import CheckpointError, ConfigError

# Settings that may change when a run is resumed, because they do not change the results of the steps.
FREE_TO_CHANGE = {
    "output_dir",
    "resume_from_checkpoint",
    "logging_steps",
    "peak_tflops",
    "save_steps",
    "save_total_limit",
    "report_to",
    "run_name",
    "project",
    "push_to_hub",
    "hub_model_id",
    "hub_private_repo",
    "eval_steps",
    "load_best_model_at_end",
    "metric_for_best_model",
    "greater_is_better",
    "max_kl_for_best_model",
    "early_stopping_patience",
    "early_stopping_threshold",
    "num_eval_prompts",
    "num_eval_samples",
    "per_device_eval_batch_size",
    "ref_logps_cache_dir",
    "fsdp",
    "zero_stage",
    "vocab_parallel",
}
# These may change too if the algorithm does not learn from the reward.
FREE_WITHOUT_REWARD = {"reward", "reward_model_path", "missing_eos_penalty"}


def refuse_to_overwrite(config: Config) -> None:
    """Raise ConfigError if output_dir holds a run that ``config`` does not continue."""
    resume_from, folder = config.resume_from_checkpoint, Path(config.output_dir)
    if resume_from == "auto" or not (folder / METRICS_FILE).exists():
        return
    if resume_from is None:
        raise ConfigError(
            f"output_dir={config.output_dir!r} already holds a run: choose another folder, or continue that run "
            "with resume_from_checkpoint: auto"
        )
    if is_checkpoint(Path(resume_from)) and Path(resume_from).resolve().parent != folder.resolve():
        raise ConfigError(
            f"output_dir={config.output_dir!r} already holds another run than resume_from_checkpoint={resume_from!r}: "
            "choose another folder, or continue the run in output_dir with resume_from_checkpoint: auto"
        )


def checkpoint_to_resume(config: Config, *, tensors: bool = True) -> Path | None:
    """Return the checkpoint that a run continues from, or None.

    ``tensors``: see ``latest_checkpoint``.

    Raises:
        ConfigError: the named checkpoint does not exist, or all checkpoints are damaged.
    """
    resume_from, output_dir = config.resume_from_checkpoint, Path(config.output_dir)
    if resume_from is None:
        return None
    if resume_from == "auto":
        latest = latest_checkpoint(output_dir, tensors=tensors)
        if latest is None and (damaged := damaged_checkpoints(output_dir, tensors=tensors)):
            raise ConfigError(
                f"output_dir={config.output_dir!r}: all of its checkpoints are damaged ({'; '.join(damaged)}): "
                "repair one, or remove them to start from the beginning"
            )
        return latest
    if not Path(resume_from).is_dir():
        raise ConfigError(
            f"resume_from_checkpoint={resume_from!r}: there is no such folder"
            f"{_suggestion(Path(resume_from), output_dir)}"
        )
    if not is_checkpoint(Path(resume_from)):
        raise ConfigError(
            f"resume_from_checkpoint={resume_from!r} is not a checkpoint folder (checkpoint-<step>)"
            f"{_suggestion(Path(resume_from), output_dir)}"
        )
    if config.compares_evaluations and Path(resume_from).resolve().parent != output_dir.resolve():
        raise ConfigError(
            f"resume_from_checkpoint={resume_from!r} is not in output_dir={config.output_dir!r}: the best checkpoint "
            "is found among the evaluations in output_dir, continue there (or leave out load_best_model_at_end and "
            "early_stopping_patience)"
        )
    return Path(resume_from)


def date_of_run(config: Config) -> str | None:
    """Return the date that the run's chat template wrote, from the checkpoint to resume from; None if there is none."""
    try:
        folder = checkpoint_to_resume(config, tensors=False)
        date = None if folder is None else read_extra(folder)["config"].get("template_date")
    except (ConfigError, CheckpointError):  # the run is refused for it later, with its other problems
        return None
    return date if date is None else str(date)


def _suggestion(resume_from: Path, output_dir: Path) -> str:
    """Return the end of an error message: a checkpoint that the user may mean."""
    for folder in (resume_from, output_dir):
        if (newest := latest_checkpoint(folder, tensors=False)) is not None:
            namesake = output_dir / resume_from.name
            return f": did you mean {namesake if is_checkpoint(namesake) else newest}?"
    return f": give a checkpoint's folder, or auto for the newest one in {output_dir}"


def check_resume(plan: Plan, folder: Path | None, *, rows: bool = True) -> None:
    """Raise ConfigError if the checkpoint in ``folder`` belongs to another run. Weights are not compared.

    Args:
        folder: None if there is no checkpoint; then nothing is checked.
        rows: compare the rows too; False if the plan does not hold the rows of the run.
    """
    if folder is not None:
        check_same_run(plan, read_extra(folder), folder, rows=rows)


def check_same_run(plan: Plan, extra: dict[str, Any], folder: Path, *, rows: bool = True) -> None:
    """Raise ConfigError if ``extra``, from the checkpoint in ``folder``, has other settings or rows than ``plan``."""
    config, num_processes = plan.config, len(extra["processes"])
    free = FREE_TO_CHANGE if config.spec.learns_from_reward else FREE_TO_CHANGE | FREE_WITHOUT_REWARD
    if num_processes != plan.world_size:
        free |= {"per_device_train_batch_size", "gradient_accumulation_steps"}  # their product stays equal
        if extra["rows_a_step"] != plan.batch_size:
            raise ConfigError(
                f"{folder} belongs to a run with {extra['rows_a_step']} rows per step on {num_processes} processes, "
                f"and this one has {plan.batch_size} on {plan.world_size}: change gradient_accumulation_steps or "
                "per_device_train_batch_size so that the rows per step are equal"
            )
        # With rows that fill no step, and are fewer than the processes, an epoch has one step less.
        if (steps := extra.get("steps_per_epoch", plan.steps_per_epoch)) != plan.steps_per_epoch:
            raise ConfigError(
                f"{folder} belongs to a run with {steps} steps per epoch on {num_processes} processes, and this one "
                f"has {plan.steps_per_epoch} on {plan.world_size}: start {num_processes} processes"
            )
    # An older checkpoint lacks newer settings: they had their default values.
    saved = {name: field.default for name, field in Config.model_fields.items()} | extra["config"]
    if config.template_date is None or saved["template_date"] is None:  # set only where the chat template writes it
        free = free | {"template_date"}
    if "dataloader_drop_last" not in extra["config"] and len(plan.train_rows) % plan.batch_size:
        saved["dataloader_drop_last"] = True  # such a checkpoint's run left these rows out
    saved = {name: os.path.expanduser(value) if isinstance(value, str) else value for name, value in saved.items()}
    changed = [
        f"{name} was {saved[name]!r} and is {value!r}"
        for name, value in config.model_dump().items()
        if name not in free and saved[name] != value
    ]
    if changed:
        raise ConfigError(
            f"{folder} belongs to another run: {'; '.join(changed)}; set it back, or start a new run in another "
            "output_dir"
        )
    hashes = extra["origin"]["rows"] if rows and "origin" in extra else {}
    changed_splits = [split for split, saved_hash in hashes.items() if saved_hash != plan.rows_hashes[split]]
    if changed_splits:
        raise ConfigError(
            f"{folder} belongs to other data: the tokenized {' and '.join(changed_splits)} rows of dataset_name="
            f"{config.dataset_name!r} have changed since the run began; restore them{_date_advice(config, saved)}, or "
            "start a new run in another output_dir"
        )


def _date_advice(config: Config, saved: dict[str, Any]) -> str:
    if config.template_date is None or saved["template_date"] is not None:
        return ""
    return " (the chat template writes the date: set template_date to the day the run began)"
