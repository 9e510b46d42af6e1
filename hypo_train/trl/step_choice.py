"""Choose who computes a step: this project, or TRL where an option has no counterpart in the fused loss.

The fused step serves plain DPO (``kl_coef=0``) and HyPO. Everything else that ``DPOTrainer`` can train is trained by
TRL's own step, if there is no KL; with a KL it is refused, before a model is loaded.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from transformers import AutoConfig, ProcessorMixin
from trl.trainer.dpo_trainer import DataCollatorForPreference

from hypo_train.config import ConfigError
from hypo_train.loss_names import NOT_FUSED

if TYPE_CHECKING:
    from hypo_train.trl.config import HyPOConfig


class Obstacle(NamedTuple):
    """Something that the fused step does not serve."""

    what: str
    fix: str


def check_step(args: HyPOConfig, obstacles: Sequence[Obstacle]) -> str | None:
    """Return why TRL's own step trains, or None if the fused step does.

    Raises:
        ConfigError: the fused step is needed, because only it knows the KL and the temperature.
    """
    if not obstacles:
        return None
    if args.kl_coef:
        fixes = "; ".join(f"{what}: {fix}" for what, fix in obstacles)
        raise ConfigError(f"HyPOConfig: {fixes}; or set kl_coef=0: TRL's own step then trains it, without samples")
    reasons = ", ".join(what for what, _ in obstacles)
    if args.temperature != 1:
        raise ConfigError(
            f"HyPOConfig: temperature={args.temperature!r}: TRL's own step, which serves {reasons}, has none, use 1.0"
        )
    return reasons


def options_of_trls_step(args: HyPOConfig) -> list[Obstacle]:
    """Return the options that only TRL's step serves."""
    rules = [
        (bool(NOT_FUSED.intersection(args.loss_type)), "loss_type", "it sorts the whole batch, use another"),
        # TRL's sigmoid has no smoothing, even beside a loss that has one.
        (bool(args.label_smoothing) and "sigmoid" in args.loss_type, "label_smoothing", "use 0"),
        (args.ld_alpha is not None, "ld_alpha", "all tokens count alike, use None"),
        (args.use_weighting, "use_weighting", "pairs count alike, use False"),
        (args.truncation_mode != "keep_start", "truncation_mode", "pairs share their prompt, use 'keep_start'"),
        (bool(args.neftune_noise_alpha), "neftune_noise_alpha", "samples are of the policy without noise, use None"),
        (args.use_liger_kernel, "use_liger_kernel", 'use model_init_kwargs={"use_kernels": True}'),
        (bool(args.fsdp), "fsdp", "use this project's own loop, python -m hypo_train --fsdp"),
        (args.deepspeed is not None, "deepspeed", "use this project's own loop, python -m hypo_train"),
    ]
    return [Obstacle(f"{name}={getattr(args, name)!r}", fix) for broken, name, fix in rules if broken]


def arguments_of_trls_step(model: Any, args: HyPOConfig, arguments: dict[str, Any]) -> list[Obstacle]:
    """Return the arguments of the trainer, and properties of the model, that only TRL's step serves."""
    config = _config_of(model, args)
    return [
        *_processes(args),
        *_peft_methods(model, arguments["peft_config"]),
        *_images(config, arguments["processing_class"], arguments["train_dataset"]),
        *_collator(arguments["data_collator"]),
    ]


def _config_of(model: Any, args: HyPOConfig) -> Any:
    """Return the config of a model, or of the model's name, without its weights."""
    if not isinstance(model, str):
        return model.config
    loading: Any = args.model_init_kwargs or {}  # transformers has parsed JSON text
    trust = loading.get("trust_remote_code", args.trust_remote_code)
    return AutoConfig.from_pretrained(model, revision=loading.get("revision"), trust_remote_code=trust)


def _processes(args: HyPOConfig) -> Iterable[Obstacle]:
    if args.world_size > 1:
        yield Obstacle(f"{args.world_size} processes", "use this project's own loop, torchrun -m hypo_train")


def _peft_methods(model: Any, peft_config: Any) -> Iterable[Obstacle]:
    """Yield adapters other than LoRA. Raise ConfigError for one that cannot be switched off."""
    loaded = getattr(model, "peft_config", None) or {}
    for config in [*loaded.values(), *([] if peft_config is None else [peft_config])]:
        if (bias := getattr(config, "bias", "none")) != "none":
            raise ConfigError(f"peft_config: bias={bias!r} also trains the reference model's biases, use bias='none'")
        if config.peft_type != "LORA":
            yield Obstacle(f"peft_config of type {config.peft_type.value}", "use LoraConfig")


def _images(config: Any, processing_class: Any, train_dataset: Any) -> Iterable[Obstacle]:
    if {"image", "images"} & set(getattr(train_dataset, "column_names", None) or ()):
        yield Obstacle("train_dataset has images", "use a data set of text")
    is_processor = isinstance(processing_class, ProcessorMixin)
    if is_processor or (processing_class is None and hasattr(config, "vision_config")):
        what = type(processing_class).__name__ if is_processor else "the processor of a vision-language model"
        yield Obstacle(f"processing_class is {what}", "pass the model's tokenizer, AutoTokenizer.from_pretrained(...)")


def _collator(collator: Any) -> Iterable[Obstacle]:
    if collator is None:
        return
    if type(collator) is not DataCollatorForPreference:
        yield Obstacle(f"data_collator is {type(collator).__name__}", "use DataCollatorForPreference, or None")
    elif collator.truncation_mode != "keep_start":
        yield Obstacle(f"truncation_mode={collator.truncation_mode!r}", "pairs share their prompt, use 'keep_start'")
