"""One optimizer step: ``batch → sample → tree → reference → loss of the policy → backward → clip → step``.

Everything random in a step is a function of (seed, step), and so is its batch: a resumed run needs no state
but the weights, the optimizer's, the step's number and what was sampled ahead.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from hypo_train.costs.timing import PhaseTimer
from hypo_train.data import Example, Pair
from hypo_train.losses import Reference, preference_loss, reference_of, sequence_logprobs_of, token_losses
from hypo_train.metrics import Meter, add_loss
from hypo_train.model.policy import Head, HeadFunction, PromptPass, Trunk
from hypo_train.rollouts import StepSamples, add_importance
from hypo_train.run import Run
from hypo_train.sampling import PromptKV
from hypo_train.trees.tree import Tree

T = TypeVar("T")


def train_step(run: Run, step: int, meter: Meter) -> None:
    """One optimizer step; its statistics go to ``meter``, its time and work to the run's timer and throughput."""
    timer = run.timer
    torch.manual_seed(run.step_seed(step))
    with timer.phase("data"):
        indices = run.rows_of_step(step)
        rows: list[Any] = [run.train_rows[i] for i in indices]
    prompts = _run_prompts(run, rows) if run.prompts_run_first else None
    samples = _samples(run, rows, step, prompts) if run.config.algorithm == "hypo" else None
    for part in run.micro_batches(_lengths(rows, samples)):
        micro = rows[part]
        if run.config.algorithm == "sft":
            loss = _sft_loss(run, micro, meter)
        else:
            drawn = samples.of_prompts(part.start, part.stop) if samples else None
            known = _known_logps(run, indices[part])
            loss = _preference_loss(run, micro, drawn, known, prompts, meter)
        with timer.phase("backward"):
            run.accelerator.backward(loss * (_weight(micro) / _weight(rows)))
    with timer.phase("optimizer"):
        if run.config.max_grad_norm > 0:
            meter.add("grad_norm", _clip_gradients(run))
        run.optimizer.step()
        run.scheduler.step()
        run.optimizer.zero_grad()
    run.sampler.weights_changed(step + 1)


def _lengths(rows: Sequence[Any], samples: StepSamples | None) -> list[int]:
    """Tokens of each row, its samples included."""
    if samples is None:
        return [row.num_tokens for row in rows]
    k = samples.num_generations
    return [row.num_tokens + sum(map(len, samples.completions[i * k : (i + 1) * k])) for i, row in enumerate(rows)]


def _weight(rows: Sequence[Any]) -> int:
    """How many values the mean loss of ``rows`` is taken over: SFT's tokens, else pairs."""
    return sum(len(row.completion) if isinstance(row, Example) else 1 for row in rows)


def _run_prompts(run: Run, pairs: Sequence[Pair]) -> PromptPass:
    """The step's prompts through the policy, with gradients: sampling and training both go on from them."""
    with run.timer.phase("data"):
        tree = run.batcher.prompts([pair.prompt for pair in pairs]).to(run.accelerator.device)
    with run.timer.phase("forward"), run.accelerator.autocast():
        return run.policy.run_prompts(tree)


def _samples(run: Run, pairs: Sequence[Pair], step: int, prompts: PromptPass | None) -> StepSamples:
    """``num_generations`` completions of each of the step's prompts, in one draw: the weights do not move within it."""
    with run.timer.phase("sample"), run.accelerator.autocast():
        samples = run.rollouts.of_step(step, None if prompts is None else _prompt_kv(run, prompts))
        if not run.config.keep_sampling_memory:
            run.sampler.release()
    run.throughput.sample([pair.prompt for pair in pairs], samples.completions, prompts_known=prompts is not None)
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


def _known_logps(run: Run, indices: Sequence[int]) -> Tensor | None:
    """The reference's log-probs of these rows' chosen, then their rejected, (2 P,), where they were precomputed."""
    known = run.train_ref_logps
    if known is None:
        return None
    # Not blocking: an index on the host would wait for the device.
    return known[torch.tensor(indices).to(known.device, non_blocking=True)].T.flatten()


def _preference_loss(
    run: Run,
    pairs: Sequence[Pair],
    samples: StepSamples | None,
    known: Tensor | None,
    prompts: PromptPass | None,
    meter: Meter,
) -> Tensor:
    """The loss of a micro-batch's pairs and samples."""
    timer = run.timer
    with timer.phase("data"):
        tree = run.batcher.pairs(pairs, samples.completions if samples else []).to(run.accelerator.device)
        behavior_logps = samples.behavior_logps(tree) if samples else None
    with run.accelerator.autocast():
        with timer.phase("forward"):
            trunk = run.policy.run_trunk(tree, prompts) if run.shares_trunk else None
        with timer.phase("reference"):
            reference = _reference(run, pairs, samples, known, tree, trunk)
    loss = _timed(timer, preference_loss(tree, reference, len(pairs), run.config, behavior_logps))
    with timer.phase("forward"):
        out = run.model(tree, loss, prompts=prompts, trunk=trunk)
    run.throughput.policy(tree, len(pairs))
    add_loss(meter, out)
    add_importance(meter, out)
    return out.loss


def _reference(
    run: Run,
    pairs: Sequence[Pair],
    samples: StepSamples | None,
    known: Tensor | None,
    tree: Tree,
    trunk: Trunk | None,
) -> Reference:
    """What the loss has to know of the reference, asked for no more than is not ``known``."""
    if known is None:
        asked = tree
    elif samples is None:
        return Reference(logps=known)
    elif trunk is not None:  # the layers above it are few: what the pairs cost there is not worth another trunk
        asked = tree.sequences_from(len(known))
    else:
        asked = run.batcher.samples([pair.prompt for pair in pairs], samples.completions).to(known.device)
    run.throughput.reference(asked, trunk_known=trunk is not None)
    if known is None:
        return run.policy.reference(asked, reference_of(asked, run.config), trunk=trunk)
    of_samples = run.policy.reference(asked, sequence_logprobs_of(asked, run.config), trunk=trunk)
    return Reference(logps=torch.cat([known, of_samples]))


def _sft_loss(run: Run, examples: Sequence[Example], meter: Meter) -> Tensor:
    """Mean negative log-prob of a micro-batch's completion tokens."""
    with run.timer.phase("data"):
        tree = run.batcher.examples(examples).to(run.accelerator.device)
    with run.timer.phase("forward"):
        losses = run.model(tree, _timed(run.timer, token_losses(tree, run.config)))
    run.throughput.policy(tree, len(examples))
    meter.add("loss", losses)
    return losses.mean()


def _timed(timer: PhaseTimer, function: HeadFunction[T]) -> HeadFunction[T]:
    """The function as the phase "loss", which is no part of the forward pass around it."""

    def timed(hidden: Tensor, head: Head) -> T:
        with timer.phase("loss"):
            return function(hidden, head)

    return timed


def _clip_gradients(run: Run) -> Tensor:
    """Global norm before clipping, ()."""
    norm = run.accelerator.clip_grad_norm_(run.policy.trained_parameters().values(), run.config.max_grad_norm)
    return torch.as_tensor(norm)
