"""A run's state on disk: its checkpoints, what it continues from, and the model it ends with."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from hypo_train.config import Config, ConfigError
from hypo_train.journal.log import METRICS_FILE
from hypo_train.journal.metrics import Meter, added_up
from hypo_train.model.trained_weights import put_saved
from hypo_train.plan import Plan
from hypo_train.saving.checkpoint import (
    checkpoint_folder,
    damaged_checkpoints,
    is_checkpoint,
    latest_checkpoint,
    load_checkpoint,
    prune,
    read_extra,
    remove_temporaries,
    save_checkpoint,
)
from hypo_train.saving.model_card import write_card
from hypo_train.saving.whole_folder import put_whole

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


def save(run: Run, meter: Meter, step: int) -> None:
    """A checkpoint of all processes, which the main one writes."""
    own = {
        "meter": meter.state(),
        "num_tokens": run.throughput.num_tokens,
        "rollouts": run.rollouts.state() if run.config.draws_samples else [],
    }
    parts = run.processes.gather(own)
    save_checkpoint(
        checkpoint_folder(run.output_dir, step),
        step=step,
        model_state=run.trained.trained_parameters(),
        optimizer=run.optimizer,
        scheduler=run.scheduler,
        extra={
            "config": run.config.model_dump(),
            "rows_a_step": run.batch_size,
            "origin": run.origin,
            "processes": parts,  # by rank
        },
        processes=run.processes,
    )
    run.processes.on_main(lambda: prune(run.output_dir, run.config.save_total_limit))


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


def check_resume(plan: Plan, *, rows: bool = True) -> None:
    """Compare the checkpoint that is to be continued with the run, as far as that can be done without any weights.

    ``rows``: the plan's are those that will be trained on.

    Raises:
        ValueError: it is of another run, or not there.
    """
    folder = checkpoint_to_resume(plan.config, tensors=False)
    if folder is not None:
        _check_same_run(plan, read_extra(folder), folder, rows=rows)


def resume(run: Run, meter: Meter) -> int:
    """Put weights, optimizer, schedule and meter back to a checkpoint's; the step to go on from, or 0."""
    wanted = run.config.resume_from_checkpoint
    if wanted is None:
        return 0
    folder = run.processes.on_main(lambda: checkpoint_to_resume(run.config))
    if folder is None:
        run.report.append(f"no checkpoint in {run.output_dir}: starting from the beginning")
        return 0
    checkpoint = load_checkpoint(
        folder,
        optimizer=run.optimizer,
        scheduler=run.scheduler,
        verify=wanted != "auto",
        accept=lambda extra: _check_same_origin(run, extra, folder),
    )
    put_saved(run.trained, checkpoint.model_state, folder)
    if run.zero is not None:
        run.zero.weights_changed()
    _load_parts(run, meter, checkpoint.extra["processes"], folder)
    if run.sampler is not None:
        run.sampler.weights_changed(checkpoint.step)
    # A run that is at its end saves no more, and would leave them.
    run.processes.on_main(lambda: remove_temporaries(run.output_dir))
    run.report.append(f"continuing from {folder}, step {checkpoint.step}")
    if checkpoint.step >= run.total_steps:
        run.report.append("all steps are done: the final model is saved from there, and nothing is trained")
    return checkpoint.step


def _load_parts(run: Run, meter: Meter, parts: list[dict[str, Any]], folder: Path) -> None:
    """What each process had counted and drawn ahead; all of it on the main one, where there were not as many."""
    if len(parts) == run.share.count:
        own = parts[run.share.rank]
    elif any(part["rollouts"] for part in parts):
        raise ConfigError(
            f"{folder} holds samples that {len(parts)} processes have drawn ahead (rollout_steps="
            f"{run.config.rollout_steps}), and these are {run.share.count}: go on with as many"
        )
    elif run.processes.is_main:
        meters = [part["meter"] for part in parts]
        own = {"meter": added_up(meters), "num_tokens": sum(part["num_tokens"] for part in parts), "rollouts": []}
    else:
        own = {"meter": {}, "num_tokens": 0, "rollouts": []}
    meter.load(own["meter"])
    run.throughput.num_tokens = own["num_tokens"]
    if run.config.draws_samples:
        run.rollouts.load(own["rollouts"])


def _check_same_origin(run: Run, extra: dict[str, Any], folder: Path) -> None:
    _check_same_run(run, extra, folder)
    before = extra.get("origin", run.origin)["weights"]  # a checkpoint from before it was kept
    if before != run.origin["weights"]:
        raise ConfigError(
            f"{folder} is of another model: the weights in {run.config.model_name_or_path!r} have changed since the "
            "run began; bring them back, or start a new run in another output_dir"
        )


def _check_same_run(run: Plan, extra: dict[str, Any], folder: Path, *, rows: bool = True) -> None:
    config, saved = run.config, extra["config"]
    defaults = {name: field.default for name, field in Config.model_fields.items()}
    saved, now = defaults | saved, config.model_dump()  # a setting that is newer than the checkpoint had its default
    free = FREE_TO_CHANGE if config.algorithm == "rloo" else FREE_TO_CHANGE | FREE_WITHOUT_RLOO
    if len(extra["processes"]) != run.share.count:
        free |= {"per_device_train_batch_size", "gradient_accumulation_steps"}  # how other devices cut a step up
        if extra["rows_a_step"] != run.batch_size:
            raise ConfigError(
                f"{folder} is of a run with {extra['rows_a_step']} rows a step on {len(extra['processes'])} processes, "
                f"and this one has {run.batch_size} on {run.share.count}: change gradient_accumulation_steps or "
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
    others = [split for split, found in hashes.items() if found != run.rows_hashes[split]]
    if others:
        raise ConfigError(
            f"{folder} is of other data: the {' and '.join(others)} rows of dataset_name={config.dataset_name!r}, as "
            "the tokenizer reads them, have changed since the run began; bring them back, or start a new run in "
            "another output_dir"
        )


def save_model(run: Run) -> Path:
    """The final model and its tokenizer, complete on the disk or not there at all; one of before stays until then."""
    state = run.trained.whole_state()
    return run.processes.on_main(lambda: _write_model(run, state))


def _write_model(run: Run, state: dict[str, Tensor] | None) -> Path:
    def write(folder: Path) -> None:
        run.trained.save_pretrained(folder, state)
        run.tokenizer.save_pretrained(folder)
        write_card(folder, run.config, run.output_dir)

    advice = (
        "; training is done and its last checkpoint is kept: --resume_from_checkpoint auto saves the model from there"
    )
    return put_whole(run.output_dir / "final", write, advice=advice)
