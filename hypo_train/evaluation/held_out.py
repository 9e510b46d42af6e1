"""Evaluation on held-out rows: loss and reward accuracy on pairs; reverse KL, reward and texts of samples."""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from hypo_train.algorithms.preference import preference_loss_call
from hypo_train.algorithms.reference import Reference, compute_reference
from hypo_train.algorithms.reward_model import bradley_terry_loss
from hypo_train.algorithms.sft import token_losses_call
from hypo_train.build import Run
from hypo_train.data.rows import Example, Ids, Pair, Prompt
from hypo_train.evaluation.finished import FinishedRun
from hypo_train.metrics.meter import Meter, add_loss, add_rewards
from hypo_train.metrics.standard_error import standard_error
from hypo_train.model.eval_mode import eval_mode
from hypo_train.model.head_functions import sequence_logprobs_call
from hypo_train.model.policy import Head
from hypo_train.model.reward_model import RewardModel
from hypo_train.utils.seeding import seeded


@dataclass(frozen=True)
class Evaluation:
    """Metrics by name, and one record for each sample: prompt, completion, reference response, kl, reward."""

    metrics: dict[str, float]
    samples: list[dict[str, Any]]


@dataclass(frozen=True)
class KLRule:
    """The temperature of both distributions in the reverse KL, and the positions that it sums over."""

    temperature: float | None = None  # of both log-probs; None: the sampling temperature
    # Not empty: sampling continues after an EOS, and the KL sums over all positions; text, length and reward end at the
    # first of these tokens. Empty: sampling stops at the EOS, which is the last position in the KL.
    eos_token_ids: Collection[int] = ()


@torch.no_grad()
def evaluate(run: Run | FinishedRun, kl_rule: KLRule | None = None, *, progress: bool = False) -> Evaluation:
    """Return metrics and samples on the run's held-out rows. Each call uses the same random numbers.

    Preference rows give ``eval_loss``, ``eval_rewards/*`` and ``eval_logps/*``, or a reward model's ``eval_accuracy``
    and ``eval_margin``; examples give ``eval_loss``, the mean over tokens in nats. A policy also samples completions
    of the first ``num_eval_prompts`` prompts: ``eval_kl`` is their mean log π − log π_ref, which estimates the
    trajectory's KL(π‖π_ref), and ``eval_kl_se`` its standard error over prompts; ``eval_reward`` is the mean reward,
    where one is configured.
    """
    config = run.config
    with eval_mode(run.trained), seeded(config.seed):
        meter = Meter()
        size = config.per_device_eval_batch_size
        starts = run.processes.divide(range(0, len(run.eval_rows), size), same_count=config.fsdp)
        for start, counts in _bar(starts, "rows", progress):
            _add_rows(meter if counts else Meter(), run, start, start + size)
        metrics = meter.read(run.processes)
        samples = []
        if run.sampler is not None:
            samples = _samples(run, kl_rule or KLRule(), progress=progress)
            if not config.keep_sampling_memory:
                run.sampler.release()
    if samples and run.has_reference:
        metrics |= _mean_and_error("kl", samples)
    if samples and run.reward is not None:
        metrics |= _mean_and_error("reward", samples)
    if samples:
        metrics["completions/mean_length"] = statistics.fmean(sample["length"] for sample in samples)
        metrics["completions/clipped_ratio"] = statistics.fmean(not sample["ended"] for sample in samples)
    return Evaluation({f"eval_{name}": value for name, value in metrics.items()}, samples)


def _add_rows(meter: Meter, run: Run | FinishedRun, start: int, stop: int) -> None:
    """Add loss and rewards of the held-out rows ``start`` to ``stop`` to ``meter``."""
    rows: Sequence[Any] = run.eval_rows[start:stop]
    device = run.accelerator.device
    if isinstance(rows[0], Prompt):  # only samples are evaluated
        return
    if isinstance(rows[0], Example):
        tree = run.batcher.examples(rows).to(device)
        meter.add("loss", run.policy(tree, token_losses_call(tree, run.config)).per_token)
        return
    if isinstance(run.trained, RewardModel):
        tree = run.batcher.scored_pairs(rows).to(device)
        rewards = run.trained.rewards(tree).view(-1, 2)
        add_rewards(meter, rewards, bradley_terry_loss(rewards))
        return
    needs_none = run.config.spec.row_type == "pair" and not run.config.asks_reference_about_pairs
    if not run.has_reference and not needs_none:
        return
    tree = run.batcher.pairs(rows, []).to(device)
    if needs_none:
        reference = Reference(logps=torch.zeros(2 * len(rows), device=device))
    elif run.eval_ref_logps is None:
        reference = compute_reference(run.policy, tree, run.config)
    else:
        reference = Reference(logps=run.eval_ref_logps[start:stop].T.flatten())
    output = run.policy(tree, preference_loss_call(tree, reference, len(rows), run.config))
    add_loss(meter, output, num_generations=1)  # a tree without samples


def _samples(run: Run | FinishedRun, kl_rule: KLRule, *, progress: bool) -> list[dict[str, Any]]:
    """Return a record for each completion of each evaluation prompt, gathered from all processes."""
    config = run.config
    starts = range(0, min(config.num_eval_prompts, len(run.eval_rows)), config.per_device_eval_batch_size)
    rank_batches = []
    for start, counts in _bar(run.processes.divide(starts, same_count=config.fsdp), "samples", progress):
        records = _sample_batch(run, kl_rule, start)
        rank_batches += [records] if counts else []
    batches = run.processes.gather(rank_batches)
    return [record for i in range(len(starts)) for record in batches[i % len(batches)][i // len(batches)]]


def _sample_batch(run: Run | FinishedRun, kl_rule: KLRule, start: int) -> list[dict[str, Any]]:
    """Return the records of one batch of prompts. The seed of sampling is ``start``."""
    assert run.sampler is not None
    config, records = run.config, []
    n = config.num_eval_samples
    batch = run.eval_rows[: config.num_eval_prompts][start : start + config.per_device_eval_batch_size]
    prompts = [list(row.prompt) for row in batch]
    drawn = run.sampler.sample(prompts, n, run.max_new_tokens, seed=start)
    completions, ended = drawn.completions(), drawn.ended.tolist()
    kl = _log_ratios(run, prompts, completions, kl_rule)
    if kl_rule.eos_token_ids:
        completions = [_up_to_end(completion, kl_rule.eos_token_ids) for completion in completions]
        ended = [completion[-1] in kl_rule.eos_token_ids for completion in completions]
    rewards = None if run.reward is None else run.reward(prompts, completions).tolist()
    for i, completion in enumerate(completions):
        row = batch[i // n]
        record: dict[str, Any] = {"row": row.row, "prompt": _text(run, row.prompt)}
        record["completion"] = _text(run, completion)
        if (reference := _reference_response(row)) is not None:
            record["reference"] = _text(run, reference)
        record |= {"length": len(completion), "ended": ended[i], "kl": kl[i]}
        if rewards is not None:
            record["reward"] = rewards[i]
        records.append(record)
    return records


def _up_to_end(completion: list[int], ends: Collection[int]) -> list[int]:
    """Return the tokens up to and including the first EOS."""
    stop = next((count for count, token in enumerate(completion, start=1) if token in ends), len(completion))
    return completion[:stop]


def _reference_response(row: Pair | Example | Prompt) -> Ids | None:
    """Return the response in the data for the row's prompt: a judge compares samples with it."""
    if isinstance(row, Pair):
        return row.chosen
    return row.completion if isinstance(row, Example) else None


def _text(run: Run | FinishedRun, ids: Sequence[int]) -> str:
    text: str = run.tokenizer.decode(list(ids), skip_special_tokens=True)
    return text


def _log_ratios(
    run: Run | FinishedRun, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]], kl_rule: KLRule
) -> Sequence[float | None]:
    """Return log π − log π_ref of each completion, or None for each if there is no reference model."""
    if not run.has_reference:
        return [None] * len(completions)
    tree = run.batcher.samples(prompts, completions).to(run.accelerator.device)
    compute_logprobs = sequence_logprobs_call(tree, run.config)

    def logprobs(hidden: Tensor, head: Head) -> Tensor:
        temperature = head.temperature if kl_rule.temperature is None else kl_rule.temperature
        return compute_logprobs(hidden, replace(head, temperature=temperature))

    return (run.policy(tree, logprobs) - run.policy.reference(tree, logprobs)).tolist()


def _bar(starts: Sequence[tuple[int, bool]], what: str, progress: bool) -> Iterable[tuple[int, bool]]:
    """Return ``starts`` with a progress bar on a terminal."""
    return tqdm(starts, desc=what, unit="batch", disable=not (progress and sys.stderr.isatty()), dynamic_ncols=True)


def _mean_and_error(name: str, samples: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Return the mean over samples, and its standard error over prompts: NaN for a single prompt."""
    values = [sample[name] for sample in samples]
    error = standard_error(values, [sample["row"] for sample in samples])
    return {name: statistics.fmean(values), f"{name}_se": math.nan if error is None else error}
