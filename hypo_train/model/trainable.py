"""Choose the trained parameters, and switch on activation checkpointing."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from hypo_train.config import Config
from hypo_train.model import checkpointing
from hypo_train.model.checkpointing import Checkpointing
from hypo_train.model.fused_layers import fuse_layers
from hypo_train.model.lora import add_lora
from hypo_train.model.text_parts import decoder_of, nearest_names, reached_by_text
from hypo_train.model.tree_model import ModelError
from hypo_train.model.trunk import decoder_layers

# Number of parameters from which selective checkpointing is the default on CPUs for models whose layers are not fused.
# It inspects every operation: that took 0.3 of 0.8 s a step in a model of a million parameters, and 4 % of the
# time in one of 135 million.
SELECTIVE_FROM = 10_000_000


def make_trainable(model: Any, config: Config, device_type: str) -> Any:
    """Return the model, maybe in peft's wrapper, with its trained parameters in fp32 and all others frozen.

    Args:
        device_type: of the device that it will train on; it decides the default of activation checkpointing.
    """
    # On CUDA, Liger's kernels serve these layers.
    is_fused = device_type == "cpu" and fuse_layers(model, recompute=not config.gradient_checkpointing)
    if config.use_peft:
        model = add_lora(model, config)
    elif config.num_layers_unfrozen is not None:
        _unfreeze_last(model, config.num_layers_unfrozen)
    elif config.unfrozen_parameters is not None:
        _unfreeze_matching(model, config.unfrozen_parameters)
    else:
        _freeze_unreached(model)
    for parameter in model.parameters():
        if parameter.requires_grad:
            # In bf16, an update of 3e-6 would change only 4 % of the weights.
            parameter.data = parameter.data.float()
    if kind := _checkpointing(config, model, keeps_too_much=device_type == "cpu" and not is_fused):
        checkpointing.enable(model, kind, has_dropout=config.lora_dropout > 0)
    return model


def _freeze_unreached(model: Any) -> None:
    """Freeze parameters that no text reaches: weight decay would shrink them, and each would have a copy."""
    reached = reached_by_text(model)
    for parameter in model.parameters():
        if id(parameter) not in reached:
            parameter.requires_grad_(False)


def _unfreeze_matching(model: Any, patterns: Sequence[str]) -> None:
    """Train the parameters whose names begin with a match of one of the regular expressions, and no others."""
    names, reached = dict(model.named_parameters(remove_duplicate=False)), reached_by_text(model)
    model.requires_grad_(False)
    for pattern in patterns:
        given = f"unfrozen_parameters={list(patterns)!r}: {pattern!r}"
        found = [name for name in names if re.match(pattern, name)]
        if not found:
            raise ModelError(f"{given} matches no parameter of {type(model).__name__}{_nearest(names, pattern)}")
        for name in found:
            if id(names[name]) not in reached:
                raise ModelError(f"{given} matches {name}, which no text reaches")
            names[name].requires_grad_(True)


def _nearest(names: Iterable[str], pattern: str) -> str:
    inside = [name for name in names if pattern in name]
    return f": did you mean {inside[0]}?" if inside else nearest_names(names, pattern)


def _unfreeze_last(model: Any, count: int) -> None:
    """Train the last ``count`` decoder layers, the norm above them and an untied head."""
    decoder = decoder_of(model)
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


def _checkpointing(config: Config, model: Any, *, keeps_too_much: bool) -> Checkpointing:
    """Return the configured kind of checkpointing, or the default.

    Args:
        keeps_too_much: whether a large model is checkpointed by default.
    """
    serves = model.supports_gradient_checkpointing
    if config.gradient_checkpointing is None:
        large = sum(p.numel() for p in model.parameters()) >= SELECTIVE_FROM
        return "selective" if serves and large and keeps_too_much else False
    if config.gradient_checkpointing and not serves:
        raise ModelError(f"gradient_checkpointing: {type(model).__name__} has none: set it to false")
    return config.gradient_checkpointing
