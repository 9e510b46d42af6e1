"""Choose the trained parameters (all, LoRA's or the last layers'), and switch on activation checkpointing."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from hypo_train.config import Config
from hypo_train.model import checkpointing
from hypo_train.model.checkpointing import Checkpointing
from hypo_train.model.quantization import quantizable
from hypo_train.model.tree_model import ModelError, first_line
from hypo_train.model.trunk import decoder_layers

# Number of parameters from which selective checkpointing is the default on CPUs. It inspects every operation: that took
# 0.3 of 0.8 s a step in a model of a million parameters, and 4 % of the time in one of 135 million.
SELECTIVE_FROM = 10_000_000


def make_trainable(model: Any, config: Config, device_type: str) -> Any:
    """Return the model, maybe in peft's wrapper, with its trained parameters in fp32 and all others frozen.

    Args:
        device_type: of the device that it will train on; it decides the default of activation checkpointing.
    """
    if config.use_peft:
        model = _with_lora(model, config)
    elif config.num_layers_unfrozen is not None:
        _unfreeze_last(model, config.num_layers_unfrozen)
    for parameter in model.parameters():
        if parameter.requires_grad:
            # In bf16, an update of 3e-6 would change only 4 % of the weights.
            parameter.data = parameter.data.float()
    if kind := _checkpointing(config, model, device_type):
        checkpointing.enable(model, kind, has_dropout=config.lora_dropout > 0)
    return model


def _with_lora(model: Any, config: Config) -> Any:
    from peft import LoraConfig, get_peft_model

    targets = config.lora_target_modules
    if isinstance(targets, list):
        _check_targets(model, targets)
    saved, is_tied = config.lora_modules_to_save, _is_tied(model)
    if saved is not None:
        _check_saved_modules(model, saved, config)
    settings = LoraConfig(
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=targets,
        bias="none",
        use_rslora=config.use_rslora,
        use_dora=config.use_dora,
        modules_to_save=saved,
        ensure_weight_tying=saved is not None and is_tied and bool({"embed_tokens", "lm_head"} & _last_names(saved)),
        task_type="SEQ_CLS" if config.spec.trains_reward_model else "CAUSAL_LM",  # which trains the new score too
    )
    try:
        adapted = get_peft_model(model, settings)
    except (ValueError, re.error) as error:
        as_list = ": write several names as a list, [q_proj, v_proj]" if "," in str(targets) else ""
        raise ModelError(f"lora_target_modules={targets!r}: {first_line(error)}{as_list}") from error
    if saved is not None and is_tied and not _is_tied(model):
        raise ModelError(
            f"lora_modules_to_save={saved!r}: {type(model).__name__} has one matrix for its embeddings and its LM "
            "head, and peft would train only one of the two: leave them out, or train without LoRA"
        )
    return adapted


def _is_tied(model: Any) -> bool:
    head = model.get_output_embeddings()
    return head is not None and head.weight is model.get_input_embeddings().weight


def _last_names(names: Sequence[str]) -> set[str]:
    return {name.split(".")[-1] for name in names}


def _check_saved_modules(model: Any, names: Sequence[str], config: Config) -> None:
    """Raise ModelError for a module that the model lacks, that gets LoRA as well, or whose weights are in 4 bits."""
    modules, given = dict(model.named_modules()), f"lora_modules_to_save={list(names)!r}"
    packed = {id(weight) for weight in quantizable(model)} if config.load_in_4bit else set()
    for name in names:
        found = [full for full in modules if full == name or full.endswith(f".{name}")]
        if not found:
            raise ModelError(f"{given}: {type(model).__name__} has no module {name!r}{_nearest(modules, name)}")
        if any(isinstance(modules[full], nn.ModuleList | nn.ModuleDict) for full in found):
            raise ModelError(f"{given}: {name!r} is a list of modules: name modules in it")
        others = [full for full in modules if full.endswith(name) and full not in found]
        if others:
            raise ModelError(f"{given}: peft would also take {others[0]!r} for {name!r}: write {found[0]!r}")
        if isinstance(config.lora_target_modules, list) and name in config.lora_target_modules:
            raise ModelError(f"{given}: {name!r} is in lora_target_modules too: train it whole, or with LoRA")
        if any(id(parameter) in packed for full in found for parameter in modules[full].parameters()):
            raise ModelError(f"{given}: with load_in_4bit the weights of {name!r} are in 4 bits and stay frozen")


def _nearest(modules: Iterable[str], name: str) -> str:
    """Return the end of an error message: the names of modules that are nearest to ``name``."""
    last = sorted({full.split(".")[-1] for full in modules if full})
    near = get_close_matches(name, [full for full in modules if full] if "." in name else last, n=3, cutoff=0.5)
    near = near or [short for short in last if not short.isdigit()]
    return f": did you mean {', '.join(near)}?"


def _check_targets(model: Any, targets: Sequence[str]) -> None:
    """Raise ModelError for a target that the model lacks; peft ignores it if it finds any other."""
    names = [name for name, _ in model.named_modules()]
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name in names):
            linear = sorted(
                {name.split(".")[-1] for name, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D)}
            )
            raise ModelError(
                f"lora_target_modules={list(targets)!r}: {type(model).__name__} has no module {target!r}; its linear "
                f"ones are {', '.join(linear)}"
            )


def _unfreeze_last(model: Any, count: int) -> None:
    """Train the last ``count`` decoder layers, the norm above them and an untied head."""
    decoder = model.get_decoder()
    layers = decoder_layers(decoder)
    if layers is None:
        raise ModelError(f"num_layers_unfrozen: found no list of layers in {type(decoder).__name__}")
    if count > len(layers):
        raise ModelError(f"num_layers_unfrozen={count}: {type(model).__name__} has {len(layers)} layers")
    model.requires_grad_(False)
    for layer in layers[-count:]:
        layer.requires_grad_(True)
    for name, module in decoder.named_children():
        if "norm" in name or name == "ln_f":
            module.requires_grad_(True)
    head = getattr(model, "score", None) or model.get_output_embeddings()
    if head is not None and head.weight is not model.get_input_embeddings().weight:
        head.requires_grad_(True)


def _checkpointing(config: Config, model: Any, device_type: str) -> Checkpointing:
    """Return the configured kind of checkpointing, or the default for the device."""
    serves = model.supports_gradient_checkpointing
    if config.gradient_checkpointing is None:
        large = sum(p.numel() for p in model.parameters()) >= SELECTIVE_FROM
        return "selective" if serves and large and device_type == "cpu" else False
    if config.gradient_checkpointing and not serves:
        raise ModelError(f"gradient_checkpointing: {type(model).__name__} has none: set it to false")
    return config.gradient_checkpointing
