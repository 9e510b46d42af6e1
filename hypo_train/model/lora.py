"""Add a LoRA adapter to a model, as configured."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from hypo_train.config import Config
from hypo_train.model.quantization import quantizable
from hypo_train.model.text_parts import nearest_names, unreached_modules
from hypo_train.model.tree_model import ModelError, first_line


def add_lora(model: Any, config: Config) -> Any:
    """Return peft's wrapper of the model with a new LoRA adapter. Raise ModelError if it does not fit the model."""
    from peft import LoraConfig, get_peft_model

    targets = _targets(model, config)
    saved, is_tied = config.lora_modules_to_save, _is_tied(model)
    if saved is not None:
        _check_saved_modules(model, saved, config)
    settings = LoraConfig(
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=targets,
        exclude_modules=_pattern_of(unreached_modules(model)),
        bias="none",
        use_rslora=config.use_rslora,
        use_dora=config.use_dora,
        modules_to_save=saved,
        ensure_weight_tying=saved is not None and is_tied and bool({"embed_tokens", "lm_head"} & _last_names(saved)),
        task_type="SEQ_CLS" if config.spec.trains_reward_model else "CAUSAL_LM",  # which trains the new score too
    )
    try:
        adapted = get_peft_model(model, settings)
    except ValueError as error:
        raise ModelError(f"lora_target_modules={targets!r}: {first_line(error)}") from error
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
            raise ModelError(f"{given}: {type(model).__name__} has no module {name!r}{nearest_names(modules, name)}")
        if any(isinstance(modules[full], nn.ModuleList | nn.ModuleDict) for full in found):
            raise ModelError(f"{given}: {name!r} is a list of modules: name modules in it")
        others = [full for full in modules if full.endswith(name) and full not in found]
        if others:
            raise ModelError(f"{given}: peft would also take {others[0]!r} for {name!r}: write {found[0]!r}")
        if isinstance(config.lora_target_modules, list) and name in config.lora_target_modules:
            raise ModelError(f"{given}: {name!r} is in lora_target_modules too: train it whole, or with LoRA")
        if any(id(parameter) in packed for full in found for parameter in modules[full].parameters()):
            raise ModelError(f"{given}: with load_in_4bit the weights of {name!r} are in 4 bits and stay frozen")


def _targets(model: Any, config: Config) -> list[str] | str | None:
    """Return the modules that get LoRA, as peft takes them. Raise ModelError if the model lacks one of them."""
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as DEFAULTS

    targets, kind = config.lora_target_modules, model.config.model_type
    if isinstance(targets, str) and re.fullmatch(r"\w+", targets):  # one name
        targets = [targets]
    unreached = _pattern_of(unreached_modules(model)) or "$"
    modules = [(name, m) for name, m in model.named_modules() if name and not re.fullmatch(unreached, name)]
    linear = sorted({name.split(".")[-1] for name, module in modules if isinstance(module, nn.Linear | Conv1D)})
    if targets is None and kind not in DEFAULTS:
        raise ModelError(
            f"lora_target_modules: peft has no default for {kind} models: set lora_target_modules: all-linear, or a "
            f"list of {', '.join(linear)}"
        )
    if isinstance(targets, str) and targets != "all-linear":
        try:
            found = any(re.fullmatch(targets, name) for name, _ in modules)
        except re.error as error:
            raise ModelError(f"lora_target_modules={targets!r} is no regular expression: {error}") from None
        if not found:
            raise ModelError(
                f"lora_target_modules={targets!r}: this regular expression matches the whole name of no module of "
                f"{type(model).__name__}, such as {next(n for n, m in modules if isinstance(m, nn.Linear | Conv1D))}"
            )
    if isinstance(targets, list):  # peft ignores an unknown one if it finds any other
        for target in targets:
            if not any(name == target or name.endswith(f".{target}") for name, _ in modules):
                raise ModelError(
                    f"lora_target_modules={targets!r}: {type(model).__name__} has no module {target!r}; its linear "
                    f"ones are {', '.join(linear)}"
                )
    return targets


def _pattern_of(names: Sequence[str]) -> str | None:
    """Return a regular expression that matches the modules of these names and all modules in them."""
    return rf"({'|'.join(map(re.escape, names))})(\..*)?" if names else None
