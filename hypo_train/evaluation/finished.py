"""Load a trained model for evaluation, as a ``Run`` without the parts that only training needs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import Tensor

from hypo_train.build import build_accelerator, build_sampler
from hypo_train.config import Config, ConfigError
from hypo_train.data.load import load_held_out
from hypo_train.distributed.processes import Processes
from hypo_train.evaluation.settings import EvaluateSettings
from hypo_train.model.load import load_policy, load_reward_model
from hypo_train.model.policy import Policy
from hypo_train.model.reward_model import RewardModel
from hypo_train.model.source import eos_token_ids, generation_config, load_tokenizer
from hypo_train.model.trained_weights import put_trained_weights, whole_model_config
from hypo_train.model.tree_model import ModelError
from hypo_train.rewards import Reward, load_function, load_reward
from hypo_train.sampling import Sampler
from hypo_train.trees.pack import Batcher


@dataclass(frozen=True)
class FinishedRun:
    """A trained model with the attributes of a ``Run`` that an evaluation reads."""

    config: Config
    accelerator: Accelerator
    processes: Processes
    tokenizer: Any
    trained: Policy | RewardModel
    has_reference: bool
    batcher: Batcher
    sampler: Sampler | None  # None for a reward model
    eval_rows: Sequence[Any]
    reward: Reward | None
    eos_token_ids: Sequence[int]
    report: list[str]
    eval_ref_logps: Tensor | None = None  # not precomputed, because they are used once

    @property
    def policy(self) -> Policy:
        """Return the policy. Raises TypeError for a reward model."""
        if not isinstance(self.trained, Policy):
            raise TypeError(f"{type(self.trained).__name__} is no policy")
        return self.trained

    @property
    def max_new_tokens(self) -> int:
        return self.config.max_new_tokens or self.config.max_completion_length


def prepare_finished(settings: EvaluateSettings) -> FinishedRun:
    """Load and check a trained model. As in :func:`hypo_train.prepare.prepare`, the cheapest checks come first.

    The policy is loaded as for training, then gets its final weights. So weights that it shares with its reference
    (LoRA, or a few trained layers) are in memory once.

    Raises:
        ValueError: the model cannot be evaluated.
    """
    config = _config_to_load(settings)
    function = None if config.reward is None else load_function(config.reward)
    accelerator = build_accelerator(config)
    processes = Processes()
    if processes.world_size > 1:
        raise ConfigError(
            f"started as {processes.world_size} processes: evaluate runs in one, start it without torchrun"
        )
    autocast = accelerator.mixed_precision == "bf16"
    tokenizer = load_tokenizer(config)
    _check_tokenizers(settings, tokenizer)
    ends = eos_token_ids(generation_config(config), tokenizer)
    rows, data_report = load_held_out(config, tokenizer, ends)
    reward, why_texts = load_reward(config, function, tokenizer, ends, accelerator)
    trained: Policy | RewardModel
    sampler, why_generate = None, None
    if config.spec.trains_reward_model:
        trained = load_reward_model(config, pad_token_id=tokenizer.pad_token_id, autocast=autocast)
        trained.to(accelerator.device)
    else:
        trained = _policy(settings, config, accelerator, autocast=autocast)
        stops = () if settings.kl_mask == "all" else ends
        sampler, why_generate = build_sampler(config, trained, stops, tokenizer.pad_token_id)
    report = [f"held out: {line}" for line in data_report.lines()]
    if why_texts is not None:
        report.append(f"the reward model reads texts: {why_texts}")
    if why_generate is not None:
        report.append(f"samples come from transformers' generate: {why_generate}")
    report += [f"warning: {line}" for line in settings.warnings()]
    return FinishedRun(
        config=config,
        accelerator=accelerator,
        processes=processes,
        tokenizer=tokenizer,
        trained=trained,
        has_reference=settings.reference is not None,
        batcher=Batcher(tokenizer.pad_token_id, shares_prompts=trained.shares_prompts),
        sampler=sampler,
        eval_rows=rows,
        reward=reward,
        eos_token_ids=ends,
        report=report,
    )


def _config_to_load(settings: EvaluateSettings) -> Config:
    """Return the configuration of the model that is loaded before its final weights."""
    config = settings.config.model_copy(update={"gradient_checkpointing": False})  # no backward pass
    if config.spec.trains_reward_model:
        return whole_model_config(config, settings.model_dir)
    if settings.reference_is_start:
        return config
    if config.load_in_4bit:
        raise ConfigError(
            "the run trained on weights of 4 bits, which another reference does not have: export it with --merge, and "
            "evaluate the result with --model_name_or_path"
        )
    # All weights may differ from those of another reference, so no weights are shared.
    other = {
        "model_name_or_path": settings.reference,
        "use_peft": False,
        "num_layers_unfrozen": None,
        "unfrozen_parameters": None,
    }
    return config.model_copy(update=other)


def _policy(settings: EvaluateSettings, config: Config, accelerator: Accelerator, *, autocast: bool) -> Policy:
    """Return the policy with its final weights and its reference, on the device."""
    at_training = config.model_copy(update={"temperature": settings.training_temperature})
    policy = load_policy(at_training, autocast=autocast)
    put_trained_weights(policy, settings.model_dir, trust_remote_code=config.trust_remote_code)
    policy.to(accelerator.device)
    if settings.reference is None:
        policy.drop_reference()
    else:
        policy.move_reference(accelerator.device)
    return policy


def _check_tokenizers(settings: EvaluateSettings, tokenizer: Any) -> None:
    """Raise ModelError if policy and reference have different tokenizers: a KL needs the same tokens."""
    if settings.reference_is_start:
        return
    other = load_tokenizer(settings.config.model_copy(update={"model_name_or_path": _tokenizer_source(settings)}))
    if other.get_vocab() != tokenizer.get_vocab():
        raise ModelError(
            f"{str(settings.model_dir)!r} and its reference {settings.reference!r} have different tokenizers: there is "
            "no KL between them"
        )


def _tokenizer_source(settings: EvaluateSettings) -> str:
    """Return the model's folder, or the start model's if the final folder holds an adapter without a config."""
    has_config = not settings.model_dir.is_dir() or Path(settings.model_dir / "config.json").is_file()
    return str(settings.model_dir) if has_config else settings.config.model_name_or_path
