"""The training loop, read top to bottom: prepare, step, log, evaluate, save."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch

from hypo_train.checkpoint import checkpoint_folder
from hypo_train.config import Config
from hypo_train.costs.memory import peak_memory
from hypo_train.evaluation.held_out import Evaluation, evaluate
from hypo_train.finite import stop_if_not_finite
from hypo_train.interrupt import Stopped, StopRequest
from hypo_train.log import RunLog
from hypo_train.metrics import Meter
from hypo_train.run import Run, prepare, with_reference_logps
from hypo_train.state import refuse_to_overwrite, resume, save, save_model
from hypo_train.step import train_step


@dataclass(frozen=True)
class Result:
    """Where the final model is, and the last evaluation (None without held-out rows)."""

    model_dir: Path
    evaluation: Evaluation | None


def train(config: Config, *, progress: bool = True) -> Result:
    """Run ``config`` from its data to a saved model.

    Raises:
        ValueError: it cannot be run; before any training.
        NotFiniteError: a loss or gradient is NaN or infinite.
        Stopped: SIGTERM or SIGINT came, and the step that it came in is done and saved.
    """
    refuse_to_overwrite(config)
    run, meter = prepare(config, show=_print_lines), Meter()
    first_step = resume(run, meter)
    _print_lines(["", *run.report])
    run = with_reference_logps(run, progress=progress)
    log = RunLog(
        run.output_dir,
        run.total_steps,
        tensorboard=config.tensorboard,
        resume_step=first_step,
        progress=progress,
    )
    with log, StopRequest() as stop:
        (run.output_dir / "config.yaml").write_text(config.to_yaml(), encoding="utf-8")
        evaluation = _train_from(run, log, meter, first_step, stop)
    return Result(save_model(run), evaluation)


def _print_lines(lines: list[str]) -> None:
    print("\n".join(lines), flush=True)


def _train_from(run: Run, log: RunLog, meter: Meter, first_step: int, stop: StopRequest) -> Evaluation | None:
    """Steps ``first_step`` to the end; the last evaluation."""
    config = run.config
    evaluation = None
    run.model.train()
    if first_step == 0 and config.eval_steps:
        evaluation = _evaluate(run, log, 0)
    for step in range(first_step, run.total_steps):
        _step(run, step, meter)
        done = step + 1
        last = done == run.total_steps
        stopped_by = None if last else stop.number
        log.advance(done)
        logs = last or done % config.logging_steps == 0
        evaluates = last or (config.eval_steps and done % config.eval_steps == 0)
        saves = last or stopped_by is not None or (config.save_steps and done % config.save_steps == 0)
        if logs or evaluates or saves:
            stop_if_not_finite(run)  # from here on, and nowhere else, the host waits for the device
        if logs:
            metrics = meter.read()
            metrics["learning_rate"] = float(run.scheduler.get_last_lr()[0])
            metrics["epoch"] = done / run.steps_per_epoch
            log.log(done, metrics | _costs(run))
        if evaluates:
            evaluation = _evaluate(run, log, done)
        if saves:
            save(run, meter, done)
        if stopped_by is not None:
            raise Stopped(stopped_by, checkpoint_folder(run.output_dir, done))
    return evaluation


def _step(run: Run, step: int, meter: Meter) -> None:
    try:
        with run.timer.step():
            train_step(run, step, meter)
    except (RuntimeError, LookupError):  # weights that are not finite break a sampler before anybody has looked
        stop_if_not_finite(run)
        raise


def _costs(run: Run) -> dict[str, float]:
    """What the steps since the last call took: time by phases, work and its rates, memory."""
    steps = run.timer.steps
    times = run.timer.read()
    return times | run.throughput.read(steps, steps * times["time/step"]) | peak_memory(run.accelerator.device)


def _evaluate(run: Run, log: RunLog, step: int) -> Evaluation | None:
    if not run.eval_rows:
        return None
    if run.config.has_reference:
        run.policy.reference_to(run.accelerator.device)
    with run.accelerator.autocast():
        evaluation = evaluate(run)
    if run.config.has_reference and not run.steps_ask_reference:
        run.policy.reference_to(torch.device("cpu"))
    log.log(step, evaluation.metrics)
    if not evaluation.samples:
        return evaluation
    folder = run.output_dir / "samples"
    folder.mkdir(exist_ok=True)
    lines = [json.dumps(sample, ensure_ascii=False) + "\n" for sample in evaluation.samples]
    (folder / f"step-{step}.jsonl").write_text("".join(lines), encoding="utf-8")
    return evaluation
