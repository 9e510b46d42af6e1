"""Held-out evaluation: reward accuracy on pairs, reverse KL and true reward on samples, the samples' texts."""

from __future__ import annotations

import importlib
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hypo_kernels import fused_hypo_loss, sequence_logprobs, token_logprobs
from hypo_kernels.head import LMHead
from hypo_train.batch import example_tree, pair_tree, sample_tree
from hypo_train.config import Config, ConfigError
from hypo_train.data import Example, Pair
from hypo_train.metrics import Meter, add_loss
from hypo_train.model import Policy
from hypo_train.sampler import Sampler
from hypo_train.tree import Tree

# (prompt, completion) -> true reward
RewardFunction = Callable[[str, str], float]


@dataclass(frozen=True)
class Evaluation:
    """Metrics by name, and one record a sample: prompt, completion, kl, ended, reward where there is one."""

    metrics: dict[str, float]
    samples: list[dict[str, Any]]


def load_reward(path: str | None) -> RewardFunction | None:
    """The function that ``package.module:function`` names."""
    if path is None:
        return None
    module, _, name = path.partition(":")
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"reward={path!r}: {error}") from error
    if not callable(function):
        raise ConfigError(f"reward={path!r}: {name} is not a function")
    return function


def logprobs_of(tree: Tree, config: Config) -> Callable[[Tensor, LMHead], Tensor]:
    """A head function: the log-prob of each of the tree's sequences, (S,)."""

    def logprobs(hidden: Tensor, head: LMHead) -> Tensor:
        return sequence_logprobs(
            hidden,
            head.weight,
            tree.targets,
            tree.cu_seqlens,
            max_chunk_bytes=config.max_chunk_bytes,
            impl=config.impl,
            **head.constants(),
        )

    return logprobs


@torch.no_grad()
def evaluate(
    policy: Policy,
    sampler: Sampler,
    rows: Sequence[Pair] | Sequence[Example],
    config: Config,
    tokenizer: Any,
    device: torch.device,
    reward: RewardFunction | None,
) -> Evaluation:
    """Evaluate on ``rows``, with the same samples' seed at every step, so that a curve compares like with like.

    Preference rows give ``eval_loss``, ``eval_rewards/*`` and ``eval_logps/*``; examples give the mean
    ``eval_loss`` of a token in nats. The first ``num_eval_prompts`` prompts are sampled: ``eval_kl`` is the
    mean over samples of log π − log π_ref, which estimates the trajectory's KL(π‖π_ref), and ``eval_kl_se`` its
    standard error.
    """
    training = policy.training
    policy.eval()
    try:
        meter = Meter()
        size = config.per_device_eval_batch_size
        for start in range(0, len(rows), size):
            _add_rows(meter, policy, rows[start : start + size], config, tokenizer.pad_token_id, device)
        metrics = meter.read()
        samples = _samples(policy, sampler, rows[: config.num_eval_prompts], config, tokenizer, device, reward)
    finally:
        policy.train(training)
    if config.algorithm != "sft":
        metrics |= _mean_and_error("kl", [sample["kl"] for sample in samples])
    if reward is not None:
        metrics |= _mean_and_error("reward", [sample["reward"] for sample in samples])
    metrics["completions/mean_length"] = statistics.fmean(sample["length"] for sample in samples)
    metrics["completions/clipped_ratio"] = statistics.fmean(not sample["ended"] for sample in samples)
    return Evaluation({f"eval_{name}": value for name, value in metrics.items()}, samples)


def _add_rows(
    meter: Meter,
    policy: Policy,
    rows: Sequence[Any],
    config: Config,
    pad_token_id: int,
    device: torch.device,
) -> None:
    if config.algorithm == "sft":
        tree = example_tree(rows, pad_token_id).to(device)

        def losses(hidden: Tensor, head: LMHead) -> Tensor:
            return -token_logprobs(hidden, head.weight, tree.targets, impl=config.impl, **head.constants())

        meter.add("loss", policy(tree, losses))
        return
    tree = pair_tree(rows, [], pad_token_id).to(device)
    ref_logps = policy.reference(tree, logprobs_of(tree, config))

    def loss(hidden: Tensor, head: LMHead) -> Any:
        return fused_hypo_loss(
            hidden,
            head.weight,
            tree.targets,
            tree.cu_seqlens,
            num_pairs=len(rows),
            ref_logps=ref_logps,
            beta=config.beta,
            kl_coef=0.0,
            preference="ipo" if config.algorithm == "ipo" else "sigmoid",
            label_smoothing=config.label_smoothing,
            max_chunk_bytes=config.max_chunk_bytes,
            impl=config.impl,
            **head.constants(),
        )

    out = policy(tree, loss)
    add_loss(meter, out._replace(loss=out.loss.expand(len(rows))))  # weighs the last, smaller batch by its rows


def _samples(
    policy: Policy,
    sampler: Sampler,
    rows: Sequence[Any],
    config: Config,
    tokenizer: Any,
    device: torch.device,
    reward: RewardFunction | None,
) -> list[dict[str, Any]]:
    records = []
    size, n = config.per_device_eval_batch_size, config.num_eval_samples
    for start in range(0, len(rows), size):
        prompts = [list(row.prompt) for row in rows[start : start + size]]
        drawn = sampler.sample(prompts, n, config.max_new_tokens or config.max_completion_length, seed=start)
        completions, ended = drawn.completions(), drawn.ended.tolist()
        kl: list[float | None] = [None] * len(completions)
        if config.algorithm != "sft":
            tree = sample_tree(prompts, completions, tokenizer.pad_token_id).to(device)
            logprobs = logprobs_of(tree, config)
            kl = (policy(tree, logprobs) - policy.reference(tree, logprobs)).tolist()
        for i, completion in enumerate(completions):
            prompt = tokenizer.decode(prompts[i // n], skip_special_tokens=True)
            text = tokenizer.decode(completion, skip_special_tokens=True)
            record = {"row": rows[start + i // n].row, "prompt": prompt, "completion": text}
            record |= {"length": len(completion), "ended": ended[i], "kl": kl[i]}
            if reward is not None:
                record["reward"] = float(reward(prompt, text))
            records.append(record)
    return records


def _mean_and_error(name: str, values: list[float]) -> dict[str, float]:
    """Mean and standard error of the mean."""
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")
    return {name: statistics.fmean(values), f"{name}_se": error}
