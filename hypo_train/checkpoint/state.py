"""Save a run's state as a checkpoint, resume from one, and save the final model."""

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
    save_folder,
)
from hypo_train.checkpoint.model_card import write_card
from hypo_train.checkpoint.resume import check_same_run, checkpoint_to_resume
from hypo_train.metrics.meter import Meter, sum_states
from hypo_train.model.source import list_turn_end
from hypo_train.model.trained_weights import put_saved
from hypo_train.utils.errors import ConfigError

if TYPE_CHECKING:
    from hypo_train.build import Run


def save(run: Run, meter: Meter, step: int, *, best: int | None = None) -> None:
    """Save a checkpoint. Every process must call this; the main process writes.

    ``best``: the step of the best checkpoint so far, which is not deleted.
    """
    process_state = {
        "meter": meter.state(),
        "num_tokens": run.throughput.num_tokens,
        "num_online_samples": run.throughput.num_online_samples,
        "rollouts": run.rollouts.state() if run.config.draws_samples else [],
    }
    states = run.processes.gather(process_state)
    save_checkpoint(
        checkpoint_folder(run.output_dir, step),
        step=step,
        model_state=run.trained.trained_parameters(),
        optimizer=run.optimizer,
        scheduler=run.scheduler,
        extra={
            "config": run.config.model_dump(),
            "rows_a_step": run.plan.batch_size,
            "steps_per_epoch": run.plan.steps_per_epoch,
            "origin": run.origin,
            "processes": states,  # one entry for each rank
        },
        processes=run.processes,
    )
    run.processes.run_on_main(lambda: prune(run.output_dir, run.config.save_total_limit, best=best))


def resume(run: Run, meter: Meter) -> int:
    """Restore weights, optimizer, scheduler and meter. Return the next step: 0 if there is no checkpoint."""
    resume_from = run.config.resume_from_checkpoint
    if resume_from is None:
        return 0
    folder = run.processes.run_on_main(lambda: checkpoint_to_resume(run.config))
    if folder is None:
        run.notes.append(f"no checkpoint in {run.output_dir}: starting from the beginning")
        return 0
    checkpoint = load_checkpoint(
        folder,
        optimizer=run.optimizer,
        scheduler=run.scheduler,
        verify=resume_from != "auto",
        accept=lambda extra: _check_same_origin(run, extra, folder),
    )
    put_saved(run.trained, checkpoint.model_state, folder)
    if run.zero is not None:
        run.zero.weights_changed()
    _load_process_state(run, meter, checkpoint.extra["processes"], folder)
    if run.sampler is not None:
        run.sampler.weights_changed(checkpoint.step)
    # The next save would do this too, but a finished run saves no more checkpoints.
    run.processes.run_on_main(lambda: remove_temporaries(run.output_dir))
    run.notes.append(f"continuing from {folder}, step {checkpoint.step}")
    if checkpoint.step >= run.plan.total_steps:
        run.notes.append("all steps are done: only the final model is saved, and evaluated if it was not yet")
    return checkpoint.step


def _load_process_state(run: Run, meter: Meter, states: list[dict[str, Any]], folder: Path) -> None:
    """Restore this process's state. If the number of processes has changed, the main process gets the sums."""
    if len(states) == run.plan.world_size:
        state = states[run.plan.rank_share.rank]
    elif any(saved["rollouts"] for saved in states):
        raise ConfigError(
            f"{folder} holds samples that {len(states)} processes have drawn ahead (rollout_steps="
            f"{run.config.rollout_steps}), and this run has {run.plan.world_size}: start {len(states)} processes"
        )
    elif run.processes.is_main:
        meters = [saved["meter"] for saved in states]
        counts = {name: sum(saved.get(name, 0) for saved in states) for name in ("num_tokens", "num_online_samples")}
        state = {"meter": sum_states(meters), **counts, "rollouts": []}
    else:
        state = {"meter": {}, "num_tokens": 0, "rollouts": []}
    meter.load(state["meter"])
    run.throughput.num_tokens = state["num_tokens"]
    run.throughput.num_online_samples = state.get("num_online_samples", 0)  # older checkpoints do not have it
    if run.config.draws_samples:
        run.rollouts.load(state["rollouts"])


def _check_same_origin(run: Run, extra: dict[str, Any], folder: Path) -> None:
    check_same_run(run.plan, extra, folder)
    saved_weights = extra.get("origin", run.origin)["weights"]  # older checkpoints have no origin
    if saved_weights != run.origin["weights"]:
        raise ConfigError(
            f"{folder} belongs to another model: the weights in {run.config.model_name_or_path!r} have changed since "
            "the run began; restore them, or start a new run in another output_dir"
        )


def load_weights(run: Run, step: int) -> None:
    """Give the model the weights of the checkpoint of ``step``, for saving: the optimizer keeps its state."""
    folder = checkpoint_folder(run.output_dir, step)
    put_saved(run.trained, load_checkpoint(folder).model_state, folder)


def save_model(run: Run, *, step: int | None = None) -> Path:
    """Save the final model and its tokenizer atomically in ``output_dir/final``, and return that folder.

    ``step``: the step after which the weights were saved, for the model card; None for the last one.
    """
    state = run.trained.full_state_dict()
    return run.processes.run_on_main(lambda: _write_model(run, state, step))


def _write_model(run: Run, state: dict[str, Tensor] | None, step: int | None) -> Path:
    def fill(folder: Path) -> None:
        run.trained.save_pretrained(folder, state)
        run.tokenizer.save_pretrained(folder)
        list_turn_end(folder, run.tokenizer)
        write_card(folder, run.config, run.output_dir, step=step)

    final = run.output_dir / "final"
    advice = "; training is done and the last checkpoint is kept: --resume_from_checkpoint auto saves the model from it"
    save_folder(final, fill, advice=advice)
    return final
