"""A run's state on disk: its checkpoints, what it continues from, and the model it ends with."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from hypo_train.checkpoint import checkpoint_folder, latest_checkpoint, load_checkpoint, prune, save_checkpoint
from hypo_train.config import Config, ConfigError
from hypo_train.metrics import Meter

if TYPE_CHECKING:
    from hypo_train.run import Run

# What may change between a run and its continuation without changing what the steps compute.
FREE_TO_CHANGE = {
    "output_dir",
    "resume_from_checkpoint",
    "logging_steps",
    "peak_tflops",
    "save_steps",
    "save_total_limit",
    "tensorboard",
    "eval_steps",
    "num_eval_prompts",
    "num_eval_samples",
    "per_device_eval_batch_size",
    "ref_logps_cache_dir",
}
# Of algorithms that do not learn from the reward.
FREE_WITHOUT_RLOO = {"reward", "reward_model_path", "missing_eos_penalty"}


def save(run: Run, meter: Meter, step: int) -> None:
    save_checkpoint(
        checkpoint_folder(run.output_dir, step),
        step=step,
        model_state=run.trained.trained_parameters(),
        optimizer=run.optimizer,
        scheduler=run.scheduler,
        extra={
            "config": run.config.model_dump(),
            "meter": meter.state(),
            "rollouts": run.rollouts.state() if run.config.draws_samples else [],
        },
    )
    prune(run.output_dir, run.config.save_total_limit)


def refuse_to_overwrite(config: Config) -> None:
    """A used output_dir is continued or left alone, never started over in silence."""
    if config.resume_from_checkpoint is None and (Path(config.output_dir) / "metrics.jsonl").exists():
        raise ConfigError(
            f"output_dir={config.output_dir!r} already holds a run: choose another folder, or continue that run "
            "with resume_from_checkpoint: auto"
        )


def checkpoint_to_resume(config: Config) -> Path | None:
    """The checkpoint that a run continues from, if there is one. Raises ConfigError: the named one is not there."""
    wanted = config.resume_from_checkpoint
    if wanted is None or wanted == "auto":
        return None if wanted is None else latest_checkpoint(Path(config.output_dir))
    if not Path(wanted).is_dir():
        raise ConfigError(f"resume_from_checkpoint={wanted!r}: there is no such folder")
    return Path(wanted)


def resume(run: Run, meter: Meter) -> int:
    """Put weights, optimizer, schedule and meter back to a checkpoint's; the step to go on from, or 0."""
    wanted = run.config.resume_from_checkpoint
    if wanted is None:
        return 0
    folder = checkpoint_to_resume(run.config)
    if folder is None:
        run.report.append(f"no checkpoint in {run.output_dir}: starting from the beginning")
        return 0
    checkpoint = load_checkpoint(
        folder,
        optimizer=run.optimizer,
        scheduler=run.scheduler,
        verify=wanted != "auto",
        accept=lambda extra: _check_same_run(run.config, extra["config"], folder),
    )
    parameters = run.trained.trained_parameters()
    with torch.no_grad():
        for name, saved in checkpoint.model_state.items():
            parameters[name].copy_(saved)
    meter.load(checkpoint.extra["meter"])
    if run.config.draws_samples:
        run.rollouts.load(checkpoint.extra["rollouts"])
    if run.sampler is not None:
        run.sampler.weights_changed(checkpoint.step)
    run.report.append(f"continuing from {folder}, step {checkpoint.step}")
    return checkpoint.step


def _check_same_run(config: Config, saved: dict[str, Any], folder: Path) -> None:
    defaults = {name: field.default for name, field in Config.model_fields.items()}
    saved, now = defaults | saved, config.model_dump()  # a setting that is newer than the checkpoint had its default
    free = FREE_TO_CHANGE if config.algorithm == "rloo" else FREE_TO_CHANGE | FREE_WITHOUT_RLOO
    changed = [
        f"{name} was {saved[name]!r} and is {value!r}"
        for name, value in now.items()
        if name not in free and saved[name] != value
    ]
    if changed:
        raise ConfigError(f"{folder} is of another run: {'; '.join(changed)}")


def save_model(run: Run) -> Path:
    """The final model and its tokenizer, complete or not there at all."""
    folder, unfinished = run.output_dir / "final", run.output_dir / "final.tmp"
    for old in (folder, unfinished):
        shutil.rmtree(old, ignore_errors=True)
    run.trained.save_pretrained(unfinished)
    run.tokenizer.save_pretrained(unfinished)
    return unfinished.rename(folder)
