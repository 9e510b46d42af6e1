"""Describe the model of a run from the config of its architecture, and check its reward model."""

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
from hypo_train.model.router_loss import asked_weight
from hypo_train.model.source import check_source, why_not
from hypo_train.model.text_parts import decoder_of, unreached_modules
from hypo_train.model.tree_model import ModelError
from hypo_train.preflight.device import existing_samplers
from hypo_train.preflight.findings import Findings
from hypo_train.preflight.substitutes import is_missing
from hypo_train.preflight.tiny_model import Structure
from hypo_train.sampling.registry import AUTO, SamplerEntry


def describe_model(
    config: Config, source: Source, trained: Policy | RewardModel, structure: Structure, findings: Findings
) -> None:
    """Put the lines on the model on the page, and a problem if the sampler does not support it."""
    count = sum(p.numel() for p in trained.trained_parameters().values())
    everything = sum(p.numel() for p in trained.parameters()) - (count if config.use_peft else 0)
    layers = source.architecture.get_text_config().num_hidden_layers
    findings.model += source.description.split("\n")
    findings.model.append(f"{type(trained.base).__name__}, {layers} layers, {everything:,} parameters")
    unreached = unreached_modules(trained.base)
    how = "all that text reaches" if unreached else "all"
    if config.use_peft:
        kind = "DoRA" if config.use_dora else "LoRA"
        below = ", on 4-bit weights" if config.load_in_4bit else ""
        whole = f", and whole {', '.join(config.lora_modules_to_save)}" if config.lora_modules_to_save else ""
        how = f"{kind}, rank {config.lora_r}, on {', '.join(_adapted(trained))}{below}{whole}"
    elif config.num_layers_unfrozen is not None:
        how = f"the last {config.num_layers_unfrozen} layers, the final norm and an untied head"
    elif config.unfrozen_parameters is not None:
        how = ", ".join(config.unfrozen_parameters)
    findings.model.append(
        f"training {count:,} {'more' if config.use_peft else 'of them'} ({count / everything:.1%}): {how}"
    )
    if unreached:
        findings.model.append(f"no text reaches {', '.join(unreached)}: left as it is")
    if config.use_peft and (experts := _fused_experts(trained)):
        findings.model.append(f"no LoRA on the experts, which are no linear layers: {', '.join(experts)}")
    if coef := trained.router_aux_loss_coef:
        findings.model.append(f"the load-balancing loss of the routers is added, times {coef:g} (router_aux_loss_coef)")
    elif config.router_aux_loss_coef is None and (asked := asked_weight(trained.base)):
        findings.warnings.append(
            f"the model's config asks for a load-balancing loss of its routers (output_router_logits: true, "
            f"router_aux_loss_coef={asked:g}), and {type(trained.base).__name__} has none: it is not added"
        )
    if structure.shares_prompts is None:
        findings.unchecked.append("whether completions can share their prompt (assumed)")
    elif structure.shares_prompts:
        findings.model.append("completions share their prompt (checked on a tiny model of the architecture)")
    else:
        findings.model.append(f"each completion is trained on in a row of its own: {structure.why_separate_rows}")
    if structure.why_generate is not None:
        if config.sampler == AUTO:
            findings.model.append(f"samples come from transformers' generate: {structure.why_generate}")
        else:
            problem = f"sampler={config.sampler}: {structure.why_generate}; use sampler: generate"
            findings.problems.append(ConfigError(problem))
    if config.use_liger_kernel:
        findings.unchecked.append("whether Liger's kernels support the model (memory is estimated without them)")
    findings.unchecked.append("the weights themselves: whether they load, and whether the loss is exact with them")


def _fused_experts(trained: Policy | RewardModel) -> list[str]:
    """Return the names of the parameters that hold the matrices of several experts."""
    decoder = decoder_of(trained.base)
    return sorted({name.split(".")[-1] for name, parameter in decoder.named_parameters() if parameter.ndim == 3})


def _adapted(trained: Policy | RewardModel) -> list[str]:
    """Return the names of the modules that have an adapter."""
    return sorted({name.split(".")[-1] for name, module in trained.model.named_modules() if hasattr(module, "lora_A")})


def expected_sampler(config: Config, structure: Structure) -> SamplerEntry | None:
    """Return the sampler that the run will choose, or None if there is none."""
    entries = () if config.spec.trains_reward_model else existing_samplers(config)
    return next(iter(entries[-1:] if structure.decodes is False else entries), None)


def check_reward_model(config: Config, source: Source, findings: Findings, *, must_exist: bool) -> Any:
    """Return the reward model on the meta device, or None if there is none or its config cannot be read.

    Args:
        must_exist: if False, a folder that does not exist yet is assumed to have the policy's architecture.

    Raises:
        ModelError: it is not a reward model, or ``must_exist`` is set and it does not exist.
    """
    path = config.reward_model_path
    if path is None:
        return None
    if must_exist or not is_missing(path):
        check_source(path, "reward_model_path")
        if must_exist:
            check_weights(path, "reward_model_path")
        architecture = _classifier_config(config, path, findings, must_exist=must_exist)
        if architecture is None:
            return None
        findings.model.append(f"reward model {path}: {architecture.model_type}")
    else:
        architecture = source.architecture
        findings.model.append(f"reward model {path}: does not exist yet, counted with the policy's architecture")
    return model_on_meta(AutoModelForSequenceClassification, config, architecture)


def _classifier_config(config: Config, path: str, findings: Findings, *, must_exist: bool) -> Any:
    """Return the reward model's config; None, noted as unchecked, if it need not exist and the Hub is not reached."""
    try:
        architecture = AutoConfig.from_pretrained(path, trust_remote_code=config.trust_remote_code)
    except Exception as error:  # transformers raises a different class for every way to fail
        if huggingface_hub.constants.HF_HUB_OFFLINE and not must_exist and not Path(path).is_dir():
            findings.unchecked.append(f"reward model {path} and its memory: the Hub was not reached")
            return None
        raise ModelError(f"cannot read the config of reward_model_path={path!r}: {why_not(error)}") from error
    if (labels := architecture.num_labels) != 1:
        raise ModelError(f"reward_model_path={path!r} gives {labels} labels: a reward model has one")
    return architecture
