"""The training loop, read top to bottom: prepare, step, log, evaluate, save.

A step is ``batch → sample → tree → reference → loss of the policy → backward → clip → step``.
Everything random in a step is a function of (seed, step), and so is its batch: a resumed run needs no state
but the weights, the optimizer's and the step's number.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hypo_train.config import Config
from hypo_train.data import Example, Pair
from hypo_train.evaluate import Evaluation, evaluate
from hypo_train.log import RunLog
from hypo_train.losses import Reference, preference_loss, reference_of, sequence_logprobs_of, token_losses
from hypo_train.metrics import Meter, add_loss
from hypo_train.run import Run, prepare, with_reference_logps
from hypo_train.state import refuse_to_overwrite, resume, save, save_model

# A run's steps draw from seeds of their own, above the small ones that evaluations use.
SEEDS_PER_RUN = 2**31


@dataclass(frozen=True)
class Result:
    """Where the final model is, and the last evaluation (None without held-out rows)."""

    model_dir: Path
    evaluation: Evaluation | None


def train(config: Config, *, progress: bool = True) -> Result:
    """Run ``config`` from its data to a saved model. Raises ValueError, before any training, if it cannot."""
    refuse_to_overwrite(config)
    run, meter = prepare(config), Meter()
    first_step = resume(run, meter)
    for line in run.report:
        print(line, flush=True)
    run = with_reference_logps(run, progress=progress)
    log = RunLog(
        run.output_dir,
        run.total_steps,
        tensorboard=config.tensorboard,
        resume_step=first_step,
        progress=progress,
    )
    with log:
        (run.output_dir / "config.yaml").write_text(config.to_yaml(), encoding="utf-8")
        evaluation = _train_from(run, log, meter, first_step)
    return Result(save_model(run), evaluation)


def _train_from(run: Run, log: RunLog, meter: Meter, first_step: int) -> Evaluation | None:
    """Steps ``first_step`` to the end; the last evaluation."""
    config = run.config
    evaluation = None
    run.model.train()
    if first_step == 0 and config.eval_steps:
        evaluation = _evaluate(run, log, 0)
    tokens, since = 0, time.perf_counter()
    for step in range(first_step, run.total_steps):
        tokens += train_step(run, step, meter)
        done = step + 1
        last = done == run.total_steps
        log.advance(done)
        if last or done % config.logging_steps == 0:
            metrics = meter.read()  # metrics wait for the device here alone
            metrics["learning_rate"] = float(run.scheduler.get_last_lr()[0])
            metrics["epoch"] = done / run.steps_per_epoch
            metrics["tokens_per_second"] = tokens / (time.perf_counter() - since)
            log.log(done, metrics)
            tokens, since = 0, time.perf_counter()
        if last or (config.eval_steps and done % config.eval_steps == 0):
            paused = time.perf_counter()
            evaluation = _evaluate(run, log, done)
            since += time.perf_counter() - paused
        if last or (config.save_steps and done % config.save_steps == 0):
            save(run, meter, done)
    return evaluation


def train_step(run: Run, step: int, meter: Meter) -> int:
    """One optimizer step; its statistics go to ``meter``. Returns the tokens that went through the model."""
    config = run.config
    torch.manual_seed(_step_seed(config, step))
    indices = run.rows_of_step(step)
    rows: list[Any] = [run.train_rows[i] for i in indices]
    # One draw serves the whole step: the weights do not move between its micro-batches.
    completions = _sample(run, rows, step) if config.algorithm == "hypo" else []
    k = len(completions) // len(rows)
    size = config.per_device_train_batch_size
    tokens = 0
    for start in range(0, len(rows), size):
        micro = rows[start : start + size]
        if config.algorithm == "sft":
            loss, seen = _sft_loss(run, micro, meter)
        else:
            drawn = completions[start * k : (start + len(micro)) * k]
            loss, seen = _preference_loss(run, micro, drawn, indices[start : start + size], meter)
        run.accelerator.backward(loss * (_weight(micro) / _weight(rows)))
        tokens += seen
    if config.max_grad_norm > 0:
        meter.add("grad_norm", _clip_gradients(run))
    run.optimizer.step()
    run.scheduler.step()
    run.optimizer.zero_grad()
    run.sampler.weights_changed(step + 1)
    return tokens


def _weight(rows: Sequence[Any]) -> int:
    """How many values the mean loss of ``rows`` is taken over: SFT's tokens, else pairs."""
    return sum(len(row.completion) if isinstance(row, Example) else 1 for row in rows)


def _sample(run: Run, rows: Sequence[Any], step: int) -> list[list[int]]:
    """``num_generations`` completions of each row's prompt, from the weights as they are."""
    with run.accelerator.autocast():
        samples = run.sampler.sample(
            [list(row.prompt) for row in rows],
            run.config.num_generations,
            run.config.max_new_tokens or run.config.max_completion_length,
            seed=_step_seed(run.config, step),
        )
    return samples.completions()


def _preference_loss(
    run: Run, pairs: Sequence[Pair], completions: Sequence[list[int]], indices: Sequence[int], meter: Meter
) -> tuple[Tensor, int]:
    """The loss of a micro-batch's pairs, rows ``indices`` of the data, and their samples; and its tokens."""
    tree = run.batcher.pairs(pairs, completions).to(run.accelerator.device)
    with run.accelerator.autocast():
        if run.train_ref_logps is None:
            reference = run.policy.reference(tree, reference_of(tree, run.config))
        else:
            reference = _with_known_pairs(run, run.train_ref_logps, pairs, completions, indices)
    out = run.model(tree, preference_loss(tree, reference, len(pairs), run.config))
    add_loss(meter, out)
    return out.loss, tree.num_tokens


def _with_known_pairs(
    run: Run, known: Tensor, pairs: Sequence[Pair], completions: Sequence[list[int]], indices: Sequence[int]
) -> Reference:
    """The reference's log-probs of the pairs, looked up in ``known`` (rows, 2), and of their samples."""
    # Not blocking: an index on the host would wait for the device.
    rows = torch.tensor(indices).to(known.device, non_blocking=True)
    of_pairs = known[rows].T.flatten()
    if not completions:
        return Reference(logps=of_pairs)
    tree = run.batcher.samples([pair.prompt for pair in pairs], completions).to(known.device)
    of_samples = run.policy.reference(tree, sequence_logprobs_of(tree, run.config))
    return Reference(logps=torch.cat([of_pairs, of_samples]))


def _sft_loss(run: Run, examples: Sequence[Example], meter: Meter) -> tuple[Tensor, int]:
    """Mean negative log-prob of a micro-batch's completion tokens, and its tokens."""
    tree = run.batcher.examples(examples).to(run.accelerator.device)
    losses = run.model(tree, token_losses(tree, run.config))
    meter.add("loss", losses)
    return losses.mean(), tree.num_tokens


def _clip_gradients(run: Run) -> Tensor:
    """Global norm before clipping, ()."""
    norm = run.accelerator.clip_grad_norm_(run.policy.trained_parameters().values(), run.config.max_grad_norm)
    return torch.as_tensor(norm)


def _evaluate(run: Run, log: RunLog, step: int) -> Evaluation | None:
    if not run.eval_rows:
        return None
    run.policy.reference_to(run.accelerator.device)
    with run.accelerator.autocast():
        evaluation = evaluate(run)
    if not run.steps_ask_reference:
        run.policy.reference_to(torch.device("cpu"))
    log.log(step, evaluation.metrics)
    folder = run.output_dir / "samples"
    folder.mkdir(exist_ok=True)
    lines = [json.dumps(sample, ensure_ascii=False) + "\n" for sample in evaluation.samples]
    (folder / f"step-{step}.jsonl").write_text("".join(lines), encoding="utf-8")
    return evaluation


def _step_seed(config: Config, step: int) -> int:
    return (config.seed + 1) * SEEDS_PER_RUN + step
