"""Compute rewards of completions with a Python function or a reward model."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from torch import Tensor

from hypo_train.config import Config, ConfigError
from hypo_train.model.load import as_reward_model, load_classifier
from hypo_train.model.reward_model import RewardModel
from hypo_train.model.source import load_classifier_tokenizer
from hypo_train.model.tree_model import ModelError
from hypo_train.trees.pack import Batcher

Tokens = Sequence[Sequence[int]]
# (prompt text, completion text) -> reward
RewardFunction = Callable[[str, str], float]


class RewardError(ValueError):
    """A reward function returned a value that is not a finite number; the message names it and the completion."""


class Reward(Protocol):
    def __call__(self, prompts: Tokens, completions: Tokens) -> Tensor:
        """Return rewards (N,), on any device, of N completions (token ids), grouped by prompt."""


@dataclass(frozen=True)
class FunctionReward:
    """Compute rewards with a Python function of the texts, without special tokens."""

    name: str  # ``package.module:function``
    function: RewardFunction
    tokenizer: Any

    def __call__(self, prompts: Tokens, completions: Tokens) -> Tensor:
        each = len(completions) // len(prompts)
        texts = self.tokenizer.batch_decode([list(ids) for ids in prompts], skip_special_tokens=True)
        answers = self.tokenizer.batch_decode([list(ids) for ids in completions], skip_special_tokens=True)
        source = f"reward={self.name!r}"
        rewards = [
            finite_score(source, self.function(texts[i // each], answer), answer) for i, answer in enumerate(answers)
        ]
        return torch.tensor(rewards, dtype=torch.float64)


@dataclass(frozen=True)
class ModelReward:
    """Compute rewards with a frozen reward model that has the policy's tokenizer."""

    model: RewardModel
    batcher: Batcher
    batch_size: int  # prompts
    device: torch.device
    autocast: Callable[[], AbstractContextManager[Any]]

    @torch.no_grad()
    def __call__(self, prompts: Tokens, completions: Tokens) -> Tensor:
        each, rewards = len(completions) // len(prompts), []
        for start in range(0, len(prompts), self.batch_size):
            stop = start + self.batch_size
            tree = self.batcher.scored(prompts[start:stop], completions[start * each : stop * each]).to(self.device)
            with self.autocast():
                rewards.append(self.model.rewards(tree))
        return torch.cat(rewards)


@dataclass(frozen=True)
class EndedReward:
    """Subtract a penalty from the rewards of completions without an EOS."""

    reward: Reward
    eos_token_ids: frozenset[int]
    missing_eos_penalty: float

    def __call__(self, prompts: Tokens, completions: Tokens) -> Tensor:
        is_cut = torch.tensor([ids[-1] not in self.eos_token_ids for ids in completions])
        rewards = self.reward(prompts, completions)
        return rewards - self.missing_eos_penalty * is_cut.to(rewards.device, non_blocking=True)


@dataclass(frozen=True)
class ClassifierReward:
    """Compute rewards with a frozen sequence classifier of texts, which uses its own tokenizer."""

    model: Any
    tokenizer: Any
    policy_tokenizer: Any
    batch_size: int  # texts
    device: torch.device
    autocast: Callable[[], AbstractContextManager[Any]]

    @torch.no_grad()
    def __call__(self, prompts: Tokens, completions: Tokens) -> Tensor:
        each, rewards = len(completions) // len(prompts), []
        sequences = [[*prompts[i // each], *completion] for i, completion in enumerate(completions)]
        texts = self.policy_tokenizer.batch_decode(sequences, skip_special_tokens=True)
        for start in range(0, len(texts), self.batch_size):
            batch = self.tokenizer(
                texts[start : start + self.batch_size], padding=True, truncation=True, return_tensors="pt"
            ).to(self.device)
            with self.autocast():
                rewards.append(self.model(**batch).logits[:, 0].float())
        return torch.cat(rewards)


def load_reward(
    config: Config,
    function: RewardFunction | None,
    tokenizer: Any,
    eos_token_ids: Sequence[int],
    accelerator: Accelerator,
) -> tuple[Reward | None, str | None]:
    """Return the configured reward. If a reward model reads texts instead of token ids, also return the reason.

    Raises:
        ModelError: the reward model cannot be loaded, or is not a reward model.
    """
    if not config.has_reward:
        return None, None
    why: str | None = None
    reward: Reward
    if function is not None:
        reward = FunctionReward(str(config.reward), function, tokenizer)
    else:
        reward, why = _reward_model(config, tokenizer, accelerator)
    return EndedReward(reward, frozenset(eos_token_ids), config.missing_eos_penalty), why


def _reward_model(config: Config, tokenizer: Any, accelerator: Accelerator) -> tuple[Reward, str | None]:
    classifier = load_classifier(config, autocast=accelerator.mixed_precision == "bf16").to(accelerator.device)
    classifier_tokenizer = load_classifier_tokenizer(config, classifier)
    device, size = accelerator.device, config.per_device_eval_batch_size
    if classifier_tokenizer.get_vocab() != tokenizer.get_vocab():
        why = "its tokenizer is not the policy's"
    else:
        try:
            model = as_reward_model(classifier, config)
        except ModelError as error:
            why = str(error)
        else:
            batcher = Batcher(classifier.config.get_text_config().pad_token_id, shares_prompts=model.shares_prompts)
            return ModelReward(model, batcher, size, device, accelerator.autocast), None
    return ClassifierReward(classifier, classifier_tokenizer, tokenizer, size, device, accelerator.autocast), why


def finite_score(source: str, value: Any, completion: str) -> float:
    """Return ``value``, the result of the user's function for ``completion``, as a float.

    Raises:
        RewardError: it is not a finite number.
    """
    try:
        score = float(value)
    except (TypeError, ValueError):
        score = math.nan
    if not math.isfinite(score):
        raise RewardError(f"{source} gave {value!r} for {completion!r}: it must give a finite number")
    return score


def load_function(path: str, field: str = "reward") -> RewardFunction:
    """Import and return the function at ``path``, ``package.module:function``.

    Raises:
        ConfigError: there is no such function; the message names ``field``.
    """
    module, _, name = path.partition(":")
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"{field}={path!r}: {error}") from error
    if not callable(function):
        raise ConfigError(f"{field}={path!r}: {name} is not a function")
    return function
