"""What is trained, as far as its architecture's config shows it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import huggingface_hub
from transformers import AutoConfig, AutoModelForSequenceClassification

from hypo_train.config import Config, ConfigError
from hypo_train.inputs import Source, check_weights
from hypo_train.model.load import model_on_meta
from hypo_train.model.policy import Policy
from hypo_train.model.reward_model import RewardModel
from hypo_train.model.source import check_source, why_not
from hypo_train.model.tree_model import ModelError
from hypo_train.preflight.device import existing_samplers
from hypo_train.preflight.findings import Findings
from hypo_train.preflight.substitutes import is_missing
from hypo_train.preflight.tiny_model import Structure
from hypo_train.sampling.registry import AUTO, SamplerEntry


def describe_model(
    config: Config, source: Source, trained: Policy | RewardModel, structure: Structure, found: Findings
) -> None:
    count = sum(p.numel() for p in trained.trained_parameters().values())
    everything = sum(p.numel() for p in trained.parameters()) - (count if config.use_peft else 0)
    layers = source.architecture.get_text_config().num_hidden_layers
    found.model += source.description.split("\n")
    found.model.append(f"{type(trained.base).__name__}, {layers} layers, {everything:,} parameters")
    how = "all"
    if config.use_peft:
        kind = "DoRA" if config.use_dora else "LoRA"
        below = ", over weights of 4 bits" if config.load_in_4bit else ""
        how = f"{kind}, rank {config.lora_r}, on {', '.join(_adapted(trained))}{below}"
    elif config.num_layers_unfrozen is not None:
        how = f"the last {config.num_layers_unfrozen} layers, the final norm and an untied head"
    found.model.append(
        f"training {count:,} {'more' if config.use_peft else 'of them'} ({count / everything:.1%}): {how}"
    )
    if structure.shares_prompts is None:
        found.unchecked.append("whether its completions can share their prompt (taken to)")
    elif structure.shares_prompts:
        found.model.append("completions share their prompt (shown by a miniature of the architecture)")
    else:
        found.model.append(f"each completion is trained on in a row of its own: {structure.why_separate_rows}")
    if structure.why_generate is not None:
        if config.sampler == AUTO:
            found.model.append(f"samples come from transformers' generate: {structure.why_generate}")
        else:
            problem = f"sampler={config.sampler}: {structure.why_generate}; use sampler: generate"
            found.problems.append(ConfigError(problem))
    if config.use_liger_kernel:
        found.unchecked.append("whether Liger's kernels serve it (memory is without them)")
    found.unchecked.append("the weights themselves: that they load, and that the loss is exact on them")


def _adapted(trained: Policy | RewardModel) -> list[str]:
    """The names of the modules that have an adapter."""
    return sorted({name.split(".")[-1] for name, module in trained.model.named_modules() if hasattr(module, "lora_A")})


def expected_sampler(config: Config, structure: Structure) -> SamplerEntry | None:
    """Return the sampler that the run will choose, or None if there is none."""
    entries = () if config.spec.trains_reward_model else existing_samplers(config)
    return next(iter(entries[-1:] if structure.decodes is False else entries), None)


def check_reward_model(config: Config, source: Source, found: Findings, *, must_exist: bool) -> Any:
    """The reward model on the meta device, from its config; None where there is none to look at.

    Raises:
        ModelError: it is none; or, where it ``must_exist``, it is not there. Elsewhere one that is not there yet is
            taken to have the policy's architecture.
    """
    path = config.reward_model_path
    if path is None:
        return None
    if must_exist or not is_missing(path):
        check_source(path, "reward_model_path")
        if must_exist:
            check_weights(path, "reward_model_path")
        architecture = _classifier_config(config, path, found, must_exist=must_exist)
        if architecture is None:
            return None
        found.model.append(f"reward model {path}: {architecture.model_type}")
    else:
        architecture = source.architecture
        found.model.append(f"reward model {path}: not there yet, counted as one of the policy's architecture")
    return model_on_meta(AutoModelForSequenceClassification, config, architecture)


def _classifier_config(config: Config, path: str, found: Findings, *, must_exist: bool) -> Any:
    """None where the Hub, which would have it, is not reached, and that is no problem."""
    try:
        architecture = AutoConfig.from_pretrained(path, trust_remote_code=config.trust_remote_code)
    except Exception as error:  # transformers raises a different class for every way to fail
        if huggingface_hub.constants.HF_HUB_OFFLINE and not must_exist and not Path(path).is_dir():
            found.unchecked.append(f"reward model {path}, nor its memory: the Hub was not reached")
            return None
        raise ModelError(f"cannot read the config of reward_model_path={path!r}: {why_not(error)}") from error
    if (labels := architecture.num_labels) != 1:
        raise ModelError(f"reward_model_path={path!r} gives {labels} labels: a reward model has one")
    return architecture
