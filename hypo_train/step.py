"""One optimizer step: ``batch → sample → micro-batches' losses → backward → clip → step``.

Everything random in a step is a function of (seed, step), and so is its batch: what a reward function draws from
Python's, NumPy's or torch's own generators too. A resumed run needs no state but the weights, the optimizer's, the
step's number and what was sampled ahead.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from hypo_train.algorithms.micro_batch import MicroBatch
from hypo_train.build import Run
from hypo_train.data.rows import Example
from hypo_train.distributed.fsdp import whole
from hypo_train.metrics.meter import Meter
from hypo_train.model.tree_model import PromptPass
from hypo_train.sampling import PromptKV
from hypo_train.sampling.rollouts import StepSamples
from hypo_train.utils.seeding import seed_everything


def train_step(run: Run, step: int, meter: Meter) -> None:
    """One optimizer step; its statistics go to ``meter``, its time and work to the run's timer and throughput."""
    timer = run.timer
    seed_everything(run.own_seed(step))
    with timer.phase("data"):
        everywhere = run.rows_of_step(step)  # on all processes
        indices = run.rank_share.select(everywhere)
        rows: list[Any] = [run.train_rows[i] for i in indices]
        # Of the step's mean loss, which the processes' gradients are averaged to.
        weight = _weight([run.train_rows[i] for i in everywhere]) / run.world_size
    micro_batch_loss = run.config.spec.load_micro_batch_loss()
    prompts = _run_prompts(run, rows) if run.prompts_run_first else None
    samples = _samples(run, rows, step, prompts) if run.config.draws_samples else None
    for part in _micro_batches(run, _lengths(rows, samples)):
        drawn = samples.of_prompts(part.start, part.stop) if samples else None
        batch = MicroBatch(rows[part], indices[part], drawn, prompts, loss_weight=_weight(rows[part]) / weight)
        last = part.stop == len(rows)
        with _gradients_of(run, last=last):
            loss = micro_batch_loss(run, batch, meter)
            run.finite.see(step, loss.detach())
            with timer.phase("backward"):
                _backward(run, loss * batch.loss_weight)
    with timer.phase("optimizer"):
        norm = _update(run)
        if norm is not None:
            run.finite.see(step, norm)
            if run.processes.is_main and run.config.max_grad_norm > 0:  # one number of all processes
                meter.add("grad_norm", norm)
        run.scheduler.step()
    if run.sampler is not None:
        run.sampler.weights_changed(step + 1)


def _micro_batches(run: Run, lengths: Sequence[int]) -> list[slice]:
    """Of this process's rows of so many tokens: as many as the others have, where passes are made together."""
    parts = list(run.micro_batches(lengths))
    together = run.config.fsdp or run.config.zero_stage == 2  # which exchange something in every one
    wanted = run.processes.max(len(parts)) if together else len(parts)
    while len(parts) < wanted:  # all processes have as many rows, so there is one to cut
        i = max(range(len(parts)), key=lambda i: parts[i].stop - parts[i].start)
        start, stop = parts[i].start, parts[i].stop
        parts[i : i + 1] = [slice(start, (start + stop) // 2), slice((start + stop) // 2, stop)]
    return parts


def _lengths(rows: Sequence[Any], samples: StepSamples | None) -> list[int]:
    """Tokens of each row, its samples included."""
    if samples is None:
        return [row.num_tokens for row in rows]
    k = samples.num_generations
    return [row.num_tokens + sum(map(len, samples.completions[i * k : (i + 1) * k])) for i, row in enumerate(rows)]


def _weight(rows: Sequence[Any]) -> int:
    """How many values the mean loss of ``rows`` is taken over: SFT's tokens, else pairs or prompts."""
    return sum(len(row.completion) if isinstance(row, Example) else 1 for row in rows)


def _run_prompts(run: Run, rows: Sequence[Any]) -> PromptPass:
    """The step's prompts through the policy, with gradients: sampling and training both go on from them."""
    with run.timer.phase("data"):
        tree = run.batcher.prompts([row.prompt for row in rows]).to(run.accelerator.device)
    with run.timer.phase("forward"), run.accelerator.autocast():
        return run.policy.run_prompts(tree)


def _samples(run: Run, rows: Sequence[Any], step: int, prompts: PromptPass | None) -> StepSamples:
    """``num_generations`` completions of each of the step's prompts, in one draw: the weights do not move within it."""
    assert run.sampler is not None
    with run.timer.phase("sample"), run.accelerator.autocast():
        samples = run.rollouts.of_step(step, None if prompts is None else _prompt_kv(run, prompts))
        if not run.config.keep_sampling_memory:
            run.sampler.release()
    run.throughput.sample([row.prompt for row in rows], samples.completions, prompts_known=prompts is not None)
    return samples


@torch.no_grad()
def _prompt_kv(run: Run, prompts: PromptPass) -> PromptKV:
    keys_values = prompts.padded_key_values()
    return PromptKV(
        keys=[keys for keys, _ in keys_values],
        values=[values for _, values in keys_values],
        mask=prompts.mask(),
        logits=run.policy.head().next_token_logits(prompts.last_hidden()),
    )


def _gradients_of(run: Run, *, last: bool) -> AbstractContextManager[Any]:
    """Around a micro-batch: processes exchange gradients once a step, at its last one (ZeRO-2: at every one)."""
    if run.zero is not None:
        run.zero.exchanges_after(last=last)
    elif not last:
        context: AbstractContextManager[Any] = run.accelerator.no_sync(run.model)
        return context
    return nullcontext()


def _backward(run: Run, loss: Tensor) -> None:
    if run.zero is not None:
        run.zero.backward(loss)
    else:
        run.accelerator.backward(loss)


def _update(run: Run) -> Tensor | None:
    """New weights from the gradients; their global norm before clipping, (), where it is known."""
    if run.zero is not None:
        return run.zero.step()
    norm = _clip_gradients(run) if run.config.max_grad_norm > 0 else None
    run.optimizer.step()
    run.optimizer.zero_grad()
    return norm


def _clip_gradients(run: Run) -> Tensor:
    """Global norm before clipping, ()."""
    norm = run.accelerator.clip_grad_norm_(run.trained.trained_parameters().values(), run.config.max_grad_norm)
    return whole(torch.as_tensor(norm))
