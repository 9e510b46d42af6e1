"""The training loop, read top to bottom: prepare, step, log, save, evaluate."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from hypo_train.build import Run, precompute_ref_logps
from hypo_train.checkpoint.files import checkpoint_folder
from hypo_train.checkpoint.hub import upload
from hypo_train.checkpoint.lock import locked
from hypo_train.checkpoint.model_card import DATA_FILE, write_card, write_data_report
from hypo_train.checkpoint.resume import refuse_to_overwrite
from hypo_train.checkpoint.state import load_weights, resume, save, save_model
from hypo_train.config import Config
from hypo_train.evaluation.held_out import Evaluation, evaluate
from hypo_train.evaluation.history import Evaluations
from hypo_train.metrics.devices import device_name
from hypo_train.metrics.environment import Attempt
from hypo_train.metrics.log import RunLog, SilentLog
from hypo_train.metrics.memory import peak_memory
from hypo_train.metrics.meter import Meter
from hypo_train.metrics.throughput import combine_processes
from hypo_train.metrics.trackers import Trackers
from hypo_train.nan_guard import raise_not_finite, stop_if_not_finite
from hypo_train.prepare import prepare
from hypo_train.report.page import report_at_the_end
from hypo_train.report.runs import CONFIG_FILE
from hypo_train.step import train_step
from hypo_train.utils.allocator import keep_freed_memory
from hypo_train.utils.atomic import write_file
from hypo_train.utils.errors import HubError, Stopped
from hypo_train.utils.records import record_errors, write_json_lines
from hypo_train.utils.safe_print import safe_print
from hypo_train.utils.signals import StopRequest


@dataclass(frozen=True)
class Result:
    """The folder of the final model, its evaluation and its address on the Hub, if it was uploaded.

    The evaluation is None without held-out rows, or if an earlier call made it.
    """

    model_dir: Path
    evaluation: Evaluation | None
    hub_url: str | None = None


def train(config: Config, *, progress: bool = True) -> Result:
    """Train and save the model that ``config`` describes.

    Raises:
        ValueError: the run cannot start; nothing was trained.
        NotFiniteError: a loss or gradient is NaN or infinite.
        HubError: the model is saved, but could not be uploaded.
        Stopped: SIGTERM, SIGINT or SIGHUP arrived; the step in progress was finished and saved.
    """
    refuse_to_overwrite(config)
    if not torch.cuda.is_available():
        keep_freed_memory()
    run = prepare(config, show=_print_lines)
    with run.processes.report_failures():
        result = _train(run, progress=progress)
    # The other processes do not wait for the upload: it may take longer than a collective operation may.
    return _uploaded(run.config, result) if config.push_to_hub and run.processes.is_main else result


def _uploaded(config: Config, result: Result) -> Result:
    """Upload the final model, and return the result with its address."""
    repo_id = str(config.hub_model_id)
    try:
        return replace(result, hub_url=upload(result.model_dir, repo_id, private=config.hub_private_repo))
    except HubError as error:
        raise HubError(
            f"the model is saved in {result.model_dir}, but not uploaded: {error}; to upload it: python -m hypo_train "
            f"export {config.output_dir} --output_dir FOLDER --push_to_hub {repo_id}"
        ) from error


def _train(run: Run, *, progress: bool) -> Result:
    with ExitStack() as held:
        run.processes.run_on_main(lambda: _lock_output_dir(run.config, held))
        return _train_in_locked_folder(run, progress=progress)


def _lock_output_dir(config: Config, held: ExitStack) -> None:
    """Lock output_dir, and check again that no other run has started in it."""
    held.enter_context(locked(Path(config.output_dir)))
    refuse_to_overwrite(config)


def _train_in_locked_folder(run: Run, *, progress: bool) -> Result:
    config, meter = run.config, Meter()
    first_step = resume(run, meter)
    if run.processes.is_main:
        _print_lines(["", *run.notes])
    trackers = run.processes.run_on_all(lambda: Trackers(config, first_step) if run.processes.is_main else None)
    with closing(trackers) if trackers else nullcontext():
        precompute_ref_logps(run, progress=progress and run.processes.is_main)
        with _recorded(run, first_step, trackers, progress=progress) as log, StopRequest() as stop:
            return _train_from(run, log, meter, first_step, stop)


@contextmanager
def _recorded(run: Run, first_step: int, trackers: Trackers | None, *, progress: bool) -> Iterator[SilentLog]:
    """Open the run's log, and write its configuration, environment and report. Only the main process writes."""
    if not run.processes.is_main:
        yield SilentLog()
        return
    folder, device = run.output_dir, device_name(run.accelerator.device)
    with record_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with (
        report_at_the_end(folder),
        Attempt(folder, first_step=first_step, total_steps=run.plan.total_steps, device=device),
        RunLog(folder, run.plan.total_steps, trackers=trackers, resume_step=first_step, progress=progress) as log,
    ):
        with record_errors(folder / CONFIG_FILE):
            write_file(folder / CONFIG_FILE, run.config.to_yaml())
        with record_errors(folder / DATA_FILE):
            write_data_report(folder, run.data_report)
        yield log


def _print_lines(lines: list[str]) -> None:
    safe_print("\n".join(lines))


def _train_from(run: Run, log: SilentLog, meter: Meter, first_step: int, stop: StopRequest) -> Result:
    """Train from ``first_step`` to the end. Weights are saved before they are evaluated, so a failure loses none."""
    config, total_steps = run.config, run.plan.total_steps
    evaluations = Evaluations(run)
    run.model.train()
    done = saved = first_step
    if done < total_steps and _evaluates_at(config, done) and not evaluations.has(done):
        _evaluate(run, log, done, evaluations)
    while done < total_steps and not evaluations.end_training:
        step, done = done, done + 1
        learning_rate = float(run.scheduler.get_last_lr()[0])  # read first: a step ends by setting the next one's rate
        _step(run, step, meter)
        is_last = done == total_steps
        stopped_by = None if is_last else run.processes.max(stop.number or 0) or None
        log.advance(done)
        logs = is_last or done % config.logging_steps == 0
        evaluates = not is_last and _evaluates_at(config, done)
        saves = is_last or stopped_by is not None or (config.save_steps and done % config.save_steps == 0)
        if logs or evaluates or saves:
            # The host waits for the device only here.
            stop_if_not_finite(run, step, saves=bool(saves))
        if logs:
            metrics = meter.read(run.processes)
            metrics["learning_rate"] = learning_rate
            metrics["epoch"] = done / run.plan.steps_per_epoch
            log.log(done, metrics | _costs(run))
        if saves:
            log.flush()
            save(run, meter, done, best=evaluations.best_step)
            saved = done
        if stopped_by is not None:
            raise Stopped(stopped_by, checkpoint_folder(run.output_dir, done))
        if evaluates:
            _evaluate(run, log, done, evaluations)
    if done > saved:  # training ends early, after an evaluation between two checkpoints
        log.flush()
        save(run, meter, done, best=evaluations.best_step)
    return _finish(run, log, done, evaluations)


def _finish(run: Run, log: SilentLog, last_step: int, evaluations: Evaluations) -> Result:
    """Save the final model, before the last evaluation if that does not choose it, and return the result."""
    model_dir = None if run.config.load_best_model_at_end else save_model(run)
    evaluation = None if evaluations.has(last_step) else _evaluate(run, log, last_step, evaluations)
    if last_step < run.plan.total_steps:
        log.message(evaluations.why_training_ends(last_step))
    if model_dir is None:
        log.message(evaluations.what_is_final(last_step))
        best = evaluations.best_step
        if best is not None and best != last_step:
            load_weights(run, best)
            evaluation = None
        model_dir = save_model(run, step=best)
    elif evaluation is not None:
        final = model_dir
        run.processes.run_on_main(lambda: write_card(final, run.config, run.output_dir))
    return Result(model_dir, evaluation)


def _evaluates_at(config: Config, step: int) -> bool:
    """Return whether the weights after ``step`` steps, fewer than all, are evaluated."""
    return config.eval_steps > 0 and step % config.eval_steps == 0


def _step(run: Run, step: int, meter: Meter) -> None:
    try:
        with run.timer.step():
            train_step(run, step, meter)
    except (RuntimeError, LookupError):  # weights that are not finite can make a sampler fail before the check for them
        if (bad := run.finite.first_bad()) is not None:  # this rank only: other ranks may not have failed
            raise_not_finite(run, bad)
        raise


def _costs(run: Run) -> dict[str, float]:
    """Return the time of each phase, the throughput and the peak memory since the last call."""
    steps = run.timer.steps
    times = run.timer.read()
    costs = times | run.throughput.read(steps, steps * times["time/step"]) | peak_memory(run.accelerator.device)
    return combine_processes(run.processes.gather(costs))


def _evaluate(run: Run, log: SilentLog, step: int, evaluations: Evaluations) -> Evaluation | None:
    if not run.plan.eval_rows:
        return None
    if run.config.has_reference:
        run.policy.move_reference(run.accelerator.device)
    with run.accelerator.autocast():
        evaluation = evaluate(run)
    if run.config.has_reference and not run.steps_ask_reference:
        run.policy.move_reference(torch.device("cpu"))
    if evaluation.samples and run.processes.is_main:
        path = run.output_dir / "samples" / f"step-{step}.jsonl"
        with record_errors(path):
            path.parent.mkdir(exist_ok=True)
            write_json_lines(path, evaluation.samples)
    # Logged last: a resumed run repeats an evaluation that is not in the log.
    log.log(step, evaluation.metrics | evaluations.add(step, evaluation.metrics))
    return evaluation
