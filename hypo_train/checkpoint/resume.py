"""What a run continues from, and whether that is the same run: known before any weights are read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hypo_train.checkpoint.files import damaged_checkpoints, is_checkpoint, latest_checkpoint, read_extra
from hypo_train.config import Config, ConfigError
from hypo_train.data.plan import Plan
from hypo_train.metrics.log import METRICS_FILE

# What may change between a run and its continuation without changing what the steps compute.
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
    "eval_steps",
    "num_eval_prompts",
    "num_eval_samples",
    "per_device_eval_batch_size",
    "ref_logps_cache_dir",
    "fsdp",
    "zero_stage",
    "vocab_parallel",
}
# Of algorithms that do not learn from the reward.
FREE_WITHOUT_RLOO = {"reward", "reward_model_path", "missing_eos_penalty"}


def refuse_to_overwrite(config: Config) -> None:
    """A used output_dir is continued or left alone, never started over in silence."""
    wanted, folder = config.resume_from_checkpoint, Path(config.output_dir)
    if wanted == "auto" or not (folder / METRICS_FILE).exists():
        return
    if wanted is None:
        raise ConfigError(
            f"output_dir={config.output_dir!r} already holds a run: choose another folder, or continue that run "
            "with resume_from_checkpoint: auto"
        )
    if is_checkpoint(Path(wanted)) and Path(wanted).resolve().parent != folder.resolve():
        raise ConfigError(
            f"output_dir={config.output_dir!r} already holds another run than resume_from_checkpoint={wanted!r}: "
            "choose another folder, or continue the run that is there with resume_from_checkpoint: auto"
        )


def checkpoint_to_resume(config: Config, *, tensors: bool = True) -> Path | None:
    """The checkpoint that a run continues from, if there is one.

    ``tensors``: as ``latest_checkpoint`` takes it.

    Raises:
        ConfigError: the named one is not there, or there are some and none is whole.
    """
    wanted, output_dir = config.resume_from_checkpoint, Path(config.output_dir)
    if wanted is None:
        return None
    if wanted == "auto":
        found = latest_checkpoint(output_dir, tensors=tensors)
        if found is None and (damaged := damaged_checkpoints(output_dir, tensors=tensors)):
            raise ConfigError(
                f"output_dir={config.output_dir!r}: none of its checkpoints can be continued ({'; '.join(damaged)}): "
                "mend them, or remove them to start from the beginning"
            )
        return found
    if not Path(wanted).is_dir():
        raise ConfigError(
            f"resume_from_checkpoint={wanted!r}: there is no such folder{_nearest(Path(wanted), output_dir)}"
        )
    if not is_checkpoint(Path(wanted)):
        raise ConfigError(
            f"resume_from_checkpoint={wanted!r} is no checkpoint, which are called checkpoint-<step>"
            f"{_nearest(Path(wanted), output_dir)}"
        )
    return Path(wanted)


def _nearest(wanted: Path, output_dir: Path) -> str:
    """The end of a message: a checkpoint that may be meant."""
    for folder in (wanted, output_dir):
        if (newest := latest_checkpoint(folder, tensors=False)) is not None:
            named = output_dir / wanted.name
            return f": did you mean {named if is_checkpoint(named) else newest}?"
    return f": give a checkpoint's folder, or auto for the newest one in {output_dir}"


def check_resume(plan: Plan, folder: Path | None, *, rows: bool = True) -> None:
    """Compare the checkpoint in ``folder``, where one is to be continued, with the run: all but its weights.

    ``rows``: the plan's are those that will be trained on.

    Raises:
        ValueError: it is of another run.
    """
    if folder is not None:
        check_same_run(plan, read_extra(folder), folder, rows=rows)


def check_same_run(plan: Plan, extra: dict[str, Any], folder: Path, *, rows: bool = True) -> None:
    """``extra`` is that of the checkpoint in ``folder``. Raises ConfigError: its run had other settings or rows."""
    config, saved = plan.config, extra["config"]
    defaults = {name: field.default for name, field in Config.model_fields.items()}
    saved, now = defaults | saved, config.model_dump()  # a setting that is newer than the checkpoint had its default
    free = FREE_TO_CHANGE if config.spec.learns_from_reward else FREE_TO_CHANGE | FREE_WITHOUT_RLOO
    if len(extra["processes"]) != plan.world_size:
        free |= {"per_device_train_batch_size", "gradient_accumulation_steps"}  # how other devices cut a step up
        if extra["rows_a_step"] != plan.batch_size:
            raise ConfigError(
                f"{folder} is of a run with {extra['rows_a_step']} rows a step on {len(extra['processes'])} processes, "
                f"and this one has {plan.batch_size} on {plan.world_size}: change gradient_accumulation_steps or "
                "per_device_train_batch_size, so that a step has as many"
            )
    changed = [
        f"{name} was {saved[name]!r} and is {value!r}"
        for name, value in now.items()
        if name not in free and saved[name] != value
    ]
    if changed:
        raise ConfigError(
            f"{folder} is of another run: {'; '.join(changed)}; set it back, or start a new run in another output_dir"
        )
    hashes = extra["origin"]["rows"] if rows and "origin" in extra else {}
    others = [split for split, found in hashes.items() if found != plan.rows_hashes[split]]
    if others:
        raise ConfigError(
            f"{folder} is of other data: the {' and '.join(others)} rows of dataset_name={config.dataset_name!r}, as "
            "the tokenizer reads them, have changed since the run began; bring them back, or start a new run in "
            "another output_dir"
        )
