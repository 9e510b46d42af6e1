"""One optimizer step (Algorithm 1): ``batch → samples → loss of each micro-batch → backward → clip → update``.

The batch and all random numbers of a step depend only on the seed and the step's number. This includes the generators
of Python, NumPy and torch, which a reward function may use. So a resumed run needs only the weights, the optimizer's
state, the step's number and samples that were drawn for later steps.
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
from hypo_train.distributed.fsdp import full_tensor
from hypo_train.metrics.meter import Meter
from hypo_train.model.tree_model import PromptPass
from hypo_train.sampling import PromptKV
from hypo_train.sampling.rollouts import StepSamples
from hypo_train.utils.seeding import seed_everything


def train_step(run: Run, step: int, meter: Meter) -> None:
    """Do one optimizer step; add its statistics to ``meter`` and its time and FLOPs to the run's counters."""
    timer = run.timer
    seed_everything(run.plan.own_seed(step))
    with timer.phase("data"):
        all_indices = run.plan.rows_of_step(step)  # the rows of all ranks
        indices = run.plan.rank_share.select(all_indices)
        rows: list[Any] = [run.plan.train_rows[i] for i in indices]
        # Gradients are averaged over ranks, so each rank divides by the mean number of losses per rank.
        losses_per_rank = _num_losses([run.plan.train_rows[i] for i in all_indices]) / run.plan.world_size
    micro_batch_loss = run.config.spec.load_micro_batch_loss()
    prompts = _run_prompts(run, rows) if run.prompts_run_first else None
    samples = _samples(run, rows, step, prompts) if run.config.draws_samples else None
    parts = _micro_batches(run, _lengths(rows, samples))
    for number, (part, counts) in enumerate(parts, start=1):
        part_samples = samples.of_rows(part.start, part.stop) if samples else None
        loss_weight = _num_losses(rows[part]) / losses_per_rank if counts else 0.0
        batch = MicroBatch(rows[part], indices[part], part_samples, prompts, loss_weight)
        statistics = meter if counts else Meter()
        with _gradient_exchange(run, last=number == len(parts)):
            loss = _with_aux_loss(run, micro_batch_loss(run, batch, statistics), batch, statistics)
            run.finite.see(step, loss.detach())
            with timer.phase("backward"):
                _backward(run, loss * batch.loss_weight)
    with timer.phase("optimizer"):
        norm = _update(run)
        if norm is not None:
            run.finite.see(step, norm)
            if run.processes.is_main and run.config.max_grad_norm > 0:  # all ranks have the same norm
                meter.add("grad_norm", norm)
        run.scheduler.step()
    if run.sampler is not None:
        run.sampler.weights_changed(step + 1)


def _with_aux_loss(run: Run, loss: Tensor, batch: MicroBatch, meter: Meter) -> Tensor:
    """Return the loss () plus the routers' load-balancing loss, if the model has one."""
    for aux_loss in batch.aux_losses:
        meter.add("aux_loss", aux_loss.detach().expand(len(batch.rows)))  # a smaller micro-batch has less weight
        loss = loss + run.trained.router_aux_loss_coef * aux_loss
    return loss


def _micro_batches(run: Run, lengths: Sequence[int]) -> list[tuple[slice, bool]]:
    """Split rows of these lengths into micro-batches, each with whether it counts.

    Under FSDP and ZeRO-2 every rank gets the same number. A rank with too few rows for that repeats its last
    micro-batch, which does not count then.
    """
    parts = list(run.plan.micro_batches(lengths))
    exchanges_in_each = run.config.fsdp or run.config.zero_stage == 2
    num_parts = run.processes.max(len(parts)) if exchanges_in_each else len(parts)
    while len(parts) < min(num_parts, len(lengths)):
        i = max(range(len(parts)), key=lambda i: parts[i].stop - parts[i].start)
        start, stop = parts[i].start, parts[i].stop
        parts[i : i + 1] = [slice(start, (start + stop) // 2), slice((start + stop) // 2, stop)]
    return [(part, True) for part in parts] + [(parts[-1], False)] * (num_parts - len(parts))


def _lengths(rows: Sequence[Any], samples: StepSamples | None) -> list[int]:
    """Return the number of tokens of each row, including the samples of its prompt."""
    if samples is None:
        return [row.num_tokens for row in rows]
    k = samples.num_generations
    return [row.num_tokens + sum(map(len, samples.completions[i * k : (i + 1) * k])) for i, row in enumerate(rows)]


def _num_losses(rows: Sequence[Any]) -> int:
    """Return the number of values that the mean loss of ``rows`` averages: tokens for SFT, else rows."""
    return sum(len(row.completion) if isinstance(row, Example) else 1 for row in rows)


def _run_prompts(run: Run, rows: Sequence[Any]) -> PromptPass:
    """Run the policy on the step's prompts, with gradients. Sampling and training reuse the result."""
    with run.timer.phase("data"):
        tree = run.batcher.prompts([row.prompt for row in rows]).to(run.accelerator.device)
    with run.timer.phase("forward"), run.accelerator.autocast():
        return run.policy.run_prompts(tree)


def _samples(run: Run, rows: Sequence[Any], step: int, prompts: PromptPass | None) -> StepSamples:
    """Sample ``num_generations`` completions of each of the step's online prompts from the current weights."""
    assert run.sampler is not None
    online = [row.prompt for row in rows[: run.plan.num_online_here(step)]]
    with run.timer.phase("sample"), run.accelerator.autocast():
        known = _prompt_kv(run, prompts.first(len(online))) if prompts is not None and online else None
        samples = run.rollouts.of_step(step, known)
        if not run.config.keep_sampling_memory:
            run.sampler.release()
    run.throughput.sample(online, samples.completions, prompts_known=prompts is not None)
    return samples


@torch.no_grad()
def _prompt_kv(run: Run, prompts: PromptPass) -> PromptKV:
    """Return the prompts' keys, values and next-token logits for the sampler."""
    keys_values = prompts.padded_key_values()
    return PromptKV(
        keys=[keys for keys, _ in keys_values],
        values=[values for _, values in keys_values],
        mask=prompts.mask(),
        logits=run.policy.head().next_token_logits(prompts.last_hidden()),
    )


def _gradient_exchange(run: Run, *, last: bool) -> AbstractContextManager[Any]:
    """Return a context in which ranks exchange gradients only after the last micro-batch (ZeRO-2: after each)."""
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
    """Update the weights; return the gradients' global norm () before clipping, or None without clipping."""
    if run.zero is not None:
        return run.zero.step()
    norm = _clip_gradients(run) if run.config.max_grad_norm > 0 else None
    run.optimizer.step()
    run.optimizer.zero_grad()
    return norm


def _clip_gradients(run: Run) -> Tensor:
    """Clip the gradients; return their global norm () before clipping."""
    norm = run.accelerator.clip_grad_norm_(run.trained.trained_parameters().values(), run.config.max_grad_norm)
    return full_tensor(torch.as_tensor(norm))
