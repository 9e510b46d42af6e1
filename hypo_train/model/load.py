"""A model, loaded with or without its weights, refused where they do not fit, and made ready to train."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
)
from transformers.utils import logging

from hypo_train.config import Config
from hypo_train.model.exactness import check_exactness, check_rewards
from hypo_train.model.liger import use_layer_kernels
from hypo_train.model.policy import Policy
from hypo_train.model.quantization import keep_scales, quantizable, quantization_options
from hypo_train.model.reward_model import RewardModel
from hypo_train.model.source import check_architecture, check_source, read_architecture, why_not
from hypo_train.model.trainable import made_trainable
from hypo_train.model.tree_model import ModelError, TreeModel, first_line
from hypo_train.model.weight_files import SAFETENSORS_ONLY, check_weight_files, why_not_read
from hypo_train.trees.attention import NAME


class StructureError(ModelError):
    """A model that cannot be built from its architecture's config alone; its checkpoint may load all the same."""


def load_policy(config: Config, *, autocast: bool) -> Policy:
    """The policy ready to train: loaded, its trained parameters chosen and in fp32, its head and mask checked.

    Raises:
        ModelError: not a causal language model, a head the kernels cannot serve exactly, attention that
            cannot take the prefix mask, a choice of trained parameters that does not fit the model, or Liger's
            kernels asked for where they cannot be had.
    """
    check_source(config.model_name_or_path)
    check_architecture(read_architecture(config), config)
    options = quantization_options(config, autocast=autocast)
    model = _open(AutoModelForCausalLM, config, config.model_name_or_path, autocast=autocast, **options)
    keep_scales(model)
    _check_window(model, config.max_prompt_length + config.max_completion_length)
    if config.use_liger_kernel:
        use_layer_kernels(model)
    policy = made_ready(model, config, device_type="cuda" if torch.cuda.is_available() else "cpu")
    assert isinstance(policy, Policy)
    return policy


def load_reward_model(config: Config, *, pad_token_id: int, autocast: bool) -> RewardModel:
    """A reward model ready to train, from a causal language model, whose head makes room for a score, or a classifier.

    Raises:
        ModelError: as of :func:`load_policy`; or there is no such classifier of the architecture.
    """
    check_source(config.model_name_or_path)
    check_architecture(read_architecture(config), config)
    kind, path = AutoModelForSequenceClassification, config.model_name_or_path
    model = _open(kind, config, path, autocast=autocast, new=["score.weight"], num_labels=1)
    _check_window(model, config.max_prompt_length + config.max_completion_length)
    model.config.get_text_config().pad_token_id = pad_token_id  # which token a classifier reads depends on it
    if config.use_liger_kernel:
        use_layer_kernels(model)
    reward_model = made_ready(model, config, device_type="cuda" if torch.cuda.is_available() else "cpu")
    assert isinstance(reward_model, RewardModel)
    return reward_model


def made_ready(model: Any, config: Config, *, device_type: str) -> Policy | RewardModel:
    """A transformers model with its trained parameters chosen, run on trees where it is proved to run so exactly.

    Raises:
        ModelError: it cannot be trained exactly, or not as configured.
    """
    trained = _as_configured(model, config, device_type)
    if isinstance(trained, RewardModel):
        _share_prompts(trained, config.attn_implementation, lambda: check_rewards(trained))
    else:
        _share_prompts(trained, config.attn_implementation, lambda: check_exactness(trained))
    return trained


def policy_of(model: Any, *, is_peft: bool, temperature: float) -> Policy:
    """A transformers model (or peft's around one) whose trained parameters others have chosen and whose reference they
    keep, on trees where it is proved to run so exactly.

    Raises:
        ModelError: it cannot be trained exactly.
    """
    policy = Policy(model, is_peft=is_peft, temperature=temperature)
    policy.drop_reference()
    _share_prompts(policy, "auto", lambda: check_exactness(policy))
    return policy


def _as_configured(model: Any, config: Config, device_type: str) -> Policy | RewardModel:
    model = made_trainable(model, config, device_type)
    if config.spec.trains_reward_model:
        return RewardModel(model, is_peft=config.use_peft)
    return Policy(model, is_peft=config.use_peft, temperature=config.temperature)


def outline(config: Config, architecture: Any, *, device_type: str, autocast: bool) -> Policy | RewardModel:
    """What :func:`load_policy` or :func:`load_reward_model` would give, from the architecture's config alone.

    Its tensors lie on the meta device: they have shapes and dtypes, and neither memory nor values. So all is checked
    but what needs values: whether the loss is exact, and whether the model's attention takes trees.

    Raises:
        ModelError: as of those two.
    """
    _check_dtype(config, autocast=autocast)
    of_reward = config.spec.trains_reward_model
    architecture = copy.deepcopy(architecture)  # transformers writes to it
    if of_reward:
        architecture.num_labels = 1
    model = meta_model(AutoModelForSequenceClassification if of_reward else AutoModelForCausalLM, config, architecture)
    _check_window(model, config.max_prompt_length + config.max_completion_length)
    if config.load_in_4bit:
        for weight in quantizable(model):  # which reach every product in the type that it computes in
            weight.data = weight.data.to(torch.bfloat16 if autocast else torch.float32)
    return _as_configured(model, config, device_type)


def load_structure(config: Config, *, pad_token_id: int, device_type: str, autocast: bool) -> Policy | RewardModel:
    """What :func:`load_policy` or :func:`load_reward_model` gives another process: on the meta device, for that
    process's values to be put in, and not yet proved to be exact.

    Raises:
        ModelError: as of those two; or the architecture's config alone does not show the structure.
    """
    check_source(config.model_name_or_path)
    trained = outline(config, read_architecture(config), device_type=device_type, autocast=autocast)
    if config.use_liger_kernel:
        use_layer_kernels(trained.base)
    if isinstance(trained, RewardModel):
        trained.base.config.get_text_config().pad_token_id = pad_token_id
    return trained


def meta_model(kind: Any, config: Config, architecture: Any) -> Any:
    """A model of an auto class on the meta device, without dropout."""
    try:
        with torch.device("meta"):
            model = kind.from_config(
                architecture, dtype=getattr(torch, config.dtype), trust_remote_code=config.trust_remote_code
            )
    except Exception as error:  # every architecture refuses in its own way
        raise StructureError(f"cannot build a {architecture.model_type} model: {first_line(error)}") from error
    _disable_dropout(model)
    return model


def load_classifier(config: Config, *, autocast: bool) -> Any:
    """The frozen sequence classifier at ``reward_model_path``, in eval mode.

    Raises:
        ModelError: it cannot be loaded, has more than one label, no score of its own or no padding token.
    """
    path = str(config.reward_model_path)
    check_source(path, "reward_model_path")
    model = _open(AutoModelForSequenceClassification, config, path, autocast=autocast)
    if model.config.num_labels != 1:
        raise ModelError(f"reward_model_path={path!r} gives {model.config.num_labels} labels: a reward model has one")
    if model.config.get_text_config().pad_token_id is None:
        raise ModelError(f"reward_model_path={path!r}: its config has no pad_token_id, set it to its tokenizer's")
    return model.requires_grad_(False).eval()


def as_reward_model(classifier: Any, config: Config) -> RewardModel:
    """A classifier that runs trees, or separate rows. Raises ModelError where it does not run so exactly."""
    _check_window(classifier, config.max_prompt_length + config.max_completion_length)
    reward_model = RewardModel(classifier, is_peft=False)
    _share_prompts(reward_model, config.attn_implementation, lambda: check_rewards(reward_model))
    return reward_model


def _open(kind: Any, config: Config, path: str, *, autocast: bool, new: Sequence[str] = (), **options: Any) -> Any:
    """The pretrained model of an auto class, without dropout. What is not in the checkpoint, transformers draws at
    random: only the weights called ``new`` may be so."""
    _check_dtype(config, autocast=autocast)
    if (folder := Path(path).expanduser()).is_dir():
        check_weight_files(folder, "the model")
    try:
        with _errors_only():  # its report of missing weights is what is checked below
            model, found = kind.from_pretrained(
                path,
                dtype=getattr(torch, config.dtype),
                attn_implementation=None if config.attn_implementation == "auto" else config.attn_implementation,
                trust_remote_code=config.trust_remote_code,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # its own error names none; they are refused below
                **SAFETENSORS_ONLY,
                **options,
            )
    except Exception as error:
        raise ModelError(f"cannot load the model {path!r}: {why_not(error)}{why_not_read(path, error)}") from error
    _refuse_other_shapes(found, path)
    _refuse_layers_left_out(found, path, model)
    refuse_missing(found, path, new)
    _disable_dropout(model)
    return model


def _refuse_other_shapes(loading_info: dict[str, Any], path: str) -> None:
    for name, there, wanted in sorted(loading_info["mismatched_keys"]):
        raise ModelError(
            f"the checkpoint {path!r} does not fit its config.json: {name} is {tuple(there)} there, and the config "
            f"makes it {tuple(wanted)}; use the config.json that was saved with the weights"
        )


def _refuse_layers_left_out(loading_info: dict[str, Any], path: str, model: Any) -> None:
    """Raise ModelError for a checkpoint with more layers than its config has, of which transformers reads the first."""
    count, own = model.config.get_text_config().num_hidden_layers, {name for name, _ in model.named_parameters()}
    for name in sorted(loading_info["unexpected_keys"]):
        if re.sub(r"(?<=\.)\d+(?=\.)", "0", name, count=1) in own:
            raise ModelError(
                f"the checkpoint {path!r} does not fit its config.json: it has {name}, and the config has {count} "
                "layers; use the config.json that was saved with the weights"
            )


def refuse_missing(loading_info: dict[str, Any], path: str, new: Sequence[str] = ()) -> None:
    """Raise ModelError for weights, but the ``new`` ones, that a checkpoint lacks and transformers draws at random."""
    if missing := sorted(set(loading_info["missing_keys"]) - set(new)):
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        names = ", ".join(missing[:3])
        raise ModelError(
            f"the checkpoint {path!r} lacks weights: {names}{more}; choose a complete one (or train it first)"
        )


@contextmanager
def _errors_only() -> Iterator[None]:
    """transformers, without its warnings."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def _check_dtype(config: Config, *, autocast: bool) -> None:
    if config.dtype == "bfloat16" and not autocast:
        raise ModelError("dtype='bfloat16' needs bf16 compute: set bf16: true, or dtype: float32")


def _share_prompts(model: TreeModel[Any], attn_implementation: str, check: Callable[[], str | None]) -> None:
    """Run trees where the ``check`` proves that the model does so exactly, and separate rows elsewhere."""
    plain = model.base.config._attn_implementation
    if attn_implementation == "auto":
        model.base.set_attn_implementation(NAME)
    model.why_separate_rows = check()
    if not model.shares_prompts:
        model.base.set_attn_implementation(plain)


def _check_window(model: Any, longest: int) -> None:
    config = model.config.get_text_config()
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if window is not None and (kinds is None or "sliding_attention" in kinds) and window < longest:
        raise ModelError(
            f"{type(model).__name__} attends to the last {window} tokens only, and prompt and completion may have "
            f"{longest}: lower max_prompt_length + max_completion_length to {window}"
        )
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and positions < longest:
        raise ModelError(
            f"{type(model).__name__} has {positions} positions, and prompt and completion may take {longest}: "
            f"lower max_prompt_length + max_completion_length to {positions}"
        )


def _disable_dropout(model: nn.Module) -> None:
    """A log-ratio of two dropout masks is noise; LoRA's own dropout is added later and stays."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if "drop" in name and isinstance(value, float):  # attention's, OPT's functional ones, layerdrop
                setattr(module, name, 0.0)
