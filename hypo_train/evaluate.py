"""Held-out evaluation: reward accuracy on pairs, reverse KL and true reward on samples, the samples' texts."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from hypo_train.losses import (
    Reference,
    bradley_terry_loss,
    preference_loss,
    reference_of,
    sequence_logprobs_of,
    token_losses,
)
from hypo_train.metrics import Meter, add_loss, add_rewards
from hypo_train.model.mode import eval_mode
from hypo_train.model.reward_model import RewardModel
from hypo_train.run import Run


@dataclass(frozen=True)
class Evaluation:
    """Metrics by name, and one record a sample: prompt, completion, kl, ended, reward where there is one."""

    metrics: dict[str, float]
    samples: list[dict[str, Any]]


@torch.no_grad()
def evaluate(run: Run) -> Evaluation:
    """Evaluate on the run's held-out rows, with the same random numbers at every step: a curve compares like
    with like.

    Preference rows give ``eval_loss``, ``eval_rewards/*`` and ``eval_logps/*``, or a reward model's ``eval_accuracy``
    and ``eval_margin``; examples give the mean ``eval_loss`` of a token in nats. The first ``num_eval_prompts``
    prompts are sampled, but for a reward model: ``eval_kl`` is the mean over samples of log π − log π_ref, which
    estimates the trajectory's KL(π‖π_ref), and ``eval_kl_se`` its standard error; ``eval_reward`` is the mean
    reward, where one is configured.
    """
    config = run.config
    with eval_mode(run.trained):
        meter = Meter()
        size = config.per_device_eval_batch_size
        for start in range(0, len(run.eval_rows), size):
            _add_rows(meter, run, start, start + size)
        metrics = meter.read()
        samples = _samples(run) if run.sampler is not None else []
    if config.has_reference:
        metrics |= _mean_and_error("kl", [sample["kl"] for sample in samples])
    if run.reward is not None:
        metrics |= _mean_and_error("reward", [sample["reward"] for sample in samples])
    if samples:
        metrics["completions/mean_length"] = statistics.fmean(sample["length"] for sample in samples)
        metrics["completions/clipped_ratio"] = statistics.fmean(not sample["ended"] for sample in samples)
    return Evaluation({f"eval_{name}": value for name, value in metrics.items()}, samples)


def _add_rows(meter: Meter, run: Run, start: int, stop: int) -> None:
    """Loss and rewards of held-out rows ``start`` to ``stop``."""
    rows: Sequence[Any] = run.eval_rows[start:stop]
    device = run.accelerator.device
    if run.config.algorithm == "rloo":  # it knows prompts alone: all there is to say is of its samples
        return
    if run.config.algorithm == "sft":
        tree = run.batcher.examples(rows).to(device)
        meter.add("loss", run.policy(tree, token_losses(tree, run.config)))
        return
    if isinstance(run.trained, RewardModel):
        tree = run.batcher.scored_pairs(rows).to(device)
        rewards = run.trained.rewards(tree).view(-1, 2)
        add_rewards(meter, rewards, bradley_terry_loss(rewards))
        return
    tree = run.batcher.pairs(rows, []).to(device)
    if run.eval_ref_logps is None:
        reference = run.policy.reference(tree, reference_of(tree, run.config))
    else:
        reference = Reference(logps=run.eval_ref_logps[start:stop].T.flatten())
    out = run.policy(tree, preference_loss(tree, reference, len(rows), run.config))
    add_loss(meter, out)


def _samples(run: Run) -> list[dict[str, Any]]:
    """One record for each of ``num_eval_samples`` completions of each evaluation prompt."""
    assert run.sampler is not None
    config, records = run.config, []
    rows = run.eval_rows[: config.num_eval_prompts]
    size, n = config.per_device_eval_batch_size, config.num_eval_samples
    for start in range(0, len(rows), size):
        batch = rows[start : start + size]
        prompts = [list(row.prompt) for row in batch]
        drawn = run.sampler.sample(prompts, n, run.max_new_tokens, seed=start)
        completions, ended = drawn.completions(), drawn.ended.tolist()
        kl = _log_ratios(run, prompts, completions)
        rewards = None if run.reward is None else run.reward(prompts, completions).tolist()
        for i, completion in enumerate(completions):
            prompt = run.tokenizer.decode(prompts[i // n], skip_special_tokens=True)
            text = run.tokenizer.decode(completion, skip_special_tokens=True)
            record: dict[str, Any] = {"row": batch[i // n].row, "prompt": prompt, "completion": text}
            record |= {"length": len(completion), "ended": ended[i], "kl": kl[i]}
            if rewards is not None:
                record["reward"] = rewards[i]
            records.append(record)
    return records


def _log_ratios(
    run: Run, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]]
) -> Sequence[float | None]:
    """log π − log π_ref of each completion; nothing for SFT, whose start is no reference."""
    if not run.config.has_reference:
        return [None] * len(completions)
    tree = run.batcher.samples(prompts, completions).to(run.accelerator.device)
    logprobs = sequence_logprobs_of(tree, run.config)
    return (run.policy(tree, logprobs) - run.policy.reference(tree, logprobs)).tolist()


def _mean_and_error(name: str, values: list[float]) -> dict[str, float]:
    """Mean and standard error of the mean."""
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")
    return {name: statistics.fmean(values), f"{name}_se": error}
