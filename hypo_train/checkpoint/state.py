"""A run's state on disk: its checkpoints, put there and taken back, and the model it ends with."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from hypo_train.checkpoint.files import (
    checkpoint_folder,
    load_checkpoint,
    prune,
    remove_temporaries,
    save_checkpoint,
)
from hypo_train.checkpoint.model_card import write_card
from hypo_train.checkpoint.resume import check_same_run, checkpoint_to_resume
from hypo_train.checkpoint.whole_folder import put_whole
from hypo_train.config import ConfigError
from hypo_train.metrics.meter import Meter, sum_states
from hypo_train.model.trained_weights import put_saved

if TYPE_CHECKING:
    from hypo_train.build import Run


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
            "rows_a_step": run.plan.batch_size,
            "origin": run.origin,
            "processes": parts,  # by rank
        },
        processes=run.processes,
    )
    run.processes.on_main(lambda: prune(run.output_dir, run.config.save_total_limit))


def resume(run: Run, meter: Meter) -> int:
    """Put weights, optimizer, schedule and meter back to a checkpoint's; the step to go on from, or 0."""
    wanted = run.config.resume_from_checkpoint
    if wanted is None:
        return 0
    folder = run.processes.on_main(lambda: checkpoint_to_resume(run.config))
    if folder is None:
        run.notes.append(f"no checkpoint in {run.output_dir}: starting from the beginning")
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
    run.notes.append(f"continuing from {folder}, step {checkpoint.step}")
    if checkpoint.step >= run.plan.total_steps:
        run.notes.append("all steps are done: the final model is saved from there, and nothing is trained")
    return checkpoint.step


def _load_parts(run: Run, meter: Meter, parts: list[dict[str, Any]], folder: Path) -> None:
    """What each process had counted and drawn ahead; all of it on the main one, where there were not as many."""
    if len(parts) == run.plan.world_size:
        own = parts[run.plan.rank_share.rank]
    elif any(part["rollouts"] for part in parts):
        raise ConfigError(
            f"{folder} holds samples that {len(parts)} processes have drawn ahead (rollout_steps="
            f"{run.config.rollout_steps}), and these are {run.plan.world_size}: go on with as many"
        )
    elif run.processes.is_main:
        meters = [part["meter"] for part in parts]
        own = {"meter": sum_states(meters), "num_tokens": sum(part["num_tokens"] for part in parts), "rollouts": []}
    else:
        own = {"meter": {}, "num_tokens": 0, "rollouts": []}
    meter.load(own["meter"])
    run.throughput.num_tokens = own["num_tokens"]
    if run.config.draws_samples:
        run.rollouts.load(own["rollouts"])


def _check_same_origin(run: Run, extra: dict[str, Any], folder: Path) -> None:
    check_same_run(run.plan, extra, folder)
    before = extra.get("origin", run.origin)["weights"]  # a checkpoint from before it was kept
    if before != run.origin["weights"]:
        raise ConfigError(
            f"{folder} is of another model: the weights in {run.config.model_name_or_path!r} have changed since the "
            "run began; bring them back, or start a new run in another output_dir"
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
