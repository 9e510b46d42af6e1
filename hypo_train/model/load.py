"""Load a transformers model, with or without its weights, and make it ready to train exactly."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.utils import logging

from hypo_train.config import Config
from hypo_train.model.exactness import check_exactness
from hypo_train.model.liger import use_layer_kernels
from hypo_train.model.policy import Policy
from hypo_train.model.positions import ANY_LENGTH, LongestRow, check_positions
from hypo_train.model.quantization import keep_scales, quantizable, quantization_options
from hypo_train.model.reward_model import RewardModel
from hypo_train.model.router_loss import router_aux_loss_coef
from hypo_train.model.source import check_architecture, check_source, read_architecture, why_not
from hypo_train.model.trainable import make_trainable
from hypo_train.model.tree_model import ModelError, TreeModel, first_line
from hypo_train.model.weight_files import SAFETENSORS_ONLY, check_weight_files, why_not_read
from hypo_train.trees.attention import NAME

M = TypeVar("M", bound=TreeModel[Any])


class StructureError(ModelError):
    """A model that cannot be built from its architecture's config alone; its checkpoint may still load."""


def make_exact(
    model: Any,
    wrap: Callable[[Any], M],
    *,
    longest: LongestRow = ANY_LENGTH,
    attn_implementation: str = "auto",
    disable_dropout: bool = True,
) -> M:
    """Turn a transformers model into a policy or a reward model that trains exactly. All of them are made here.

    Dropout is switched off, and 4-bit weights keep their scales. Trees are used if a check on a few tokens shows that
    the model gives the same log-probs on them; otherwise separate rows are used.

    Args:
        model: with its weights; peft's wrapper is allowed.
        wrap: chooses the trained parameters and returns the policy or reward model.
        longest: the longest row that it will get.
        attn_implementation: "auto" tries trees.

    Raises:
        ModelError: it cannot be trained exactly, or not on rows so long; or ``wrap`` refuses it.
    """
    check_positions(model.get_base_model() if hasattr(model, "get_base_model") else model, longest)
    make_repeatable(model, disable_dropout=disable_dropout)
    trained = wrap(model)
    original = trained.base.config._attn_implementation
    if attn_implementation == "auto":
        trained.base.set_attn_implementation(NAME)
    trained.why_separate_rows = check_exactness(trained, rows_attention=original, has_dropout=not disable_dropout)
    if not trained.shares_prompts:
        trained.base.set_attn_implementation(original)
    return trained


def make_repeatable(model: nn.Module, *, disable_dropout: bool = True) -> None:
    """Make a model compute the same in every pass: 4-bit weights keep their scales, dropout is switched off."""
    keep_scales(model)
    if disable_dropout:
        _disable_dropout(model)


def load_policy(config: Config, *, autocast: bool) -> Policy:
    """Load the policy, ready to train: trained parameters chosen and in fp32, head and attention checked to be exact.

    Raises:
        ModelError: not a causal language model, or one whose head or attention is not served exactly; trained
            parameters that do not fit the model; or Liger's kernels are not available.
    """
    options = quantization_options(config, autocast=autocast)
    policy = _load(AutoModelForCausalLM, config, autocast=autocast, **options)
    assert isinstance(policy, Policy)
    return policy


def load_reward_model(config: Config, *, pad_token_id: int, autocast: bool) -> RewardModel:
    """Load a reward model, ready to train, from a classifier or a causal language model, whose head a score replaces.

    Raises:
        ModelError: as for :func:`load_policy`; or the architecture has no such classifier.
    """
    options = {"new": ["score.weight"], "num_labels": 1, "pad_token_id": pad_token_id}
    reward_model = _load(AutoModelForSequenceClassification, config, autocast=autocast, **options)
    assert isinstance(reward_model, RewardModel)
    return reward_model


def _load(kind: Any, config: Config, *, autocast: bool, **options: Any) -> Policy | RewardModel:
    check_source(config.model_name_or_path)
    check_architecture(read_architecture(config), config)
    pad_token_id = options.pop("pad_token_id", None)
    model = _from_pretrained(kind, config, config.model_name_or_path, autocast=autocast, **options)
    if pad_token_id is not None:
        model.config.get_text_config().pad_token_id = pad_token_id  # a classifier reads the token before it
    if config.use_liger_kernel:
        use_layer_kernels(model)
    return make_trained_exact(model, config, device_type="cuda" if torch.cuda.is_available() else "cpu")


def make_trained_exact(model: Any, config: Config, *, device_type: str) -> Policy | RewardModel:
    """Choose the trained parameters as configured, and make the model exact. Raise ModelError if that is impossible."""
    return make_exact(
        model,
        lambda model: _wrap(model, config, device_type),
        longest=LongestRow.of(config),
        attn_implementation=config.attn_implementation,
    )


def _wrap(model: Any, config: Config, device_type: str) -> Policy | RewardModel:
    if config.spec.trains_reward_model:
        return RewardModel(make_trainable(model, config, device_type), is_peft=config.use_peft)
    try:
        coef = router_aux_loss_coef(model, config.router_aux_loss_coef)
    except ValueError as error:
        raise ModelError(str(error)) from None
    model = make_trainable(model, config, device_type)
    return Policy(model, is_peft=config.use_peft, temperature=config.temperature, router_aux_loss_coef=coef)


def build_on_meta(config: Config, architecture: Any, *, device_type: str, autocast: bool) -> Policy | RewardModel:
    """Build from its architecture's config what :func:`load_policy` or :func:`load_reward_model` would load.

    Its tensors are on the meta device: they have shapes and dtypes, but no memory. Everything is checked that needs no
    values; exactness is not.

    Raises:
        ModelError: as for those two functions.
    """
    _check_dtype(config, autocast=autocast)
    is_reward_model = config.spec.trains_reward_model
    architecture = copy.deepcopy(architecture)  # transformers writes to it
    if is_reward_model:
        architecture.num_labels = 1
    kind = AutoModelForSequenceClassification if is_reward_model else AutoModelForCausalLM
    model = model_on_meta(kind, config, architecture)
    check_positions(model, LongestRow.of(config))
    if config.load_in_4bit:
        for weight in quantizable(model):  # a product unpacks them to the dtype that it computes in
            weight.data = weight.data.to(torch.bfloat16 if autocast else torch.float32)
    return _wrap(model, config, device_type)


def load_on_meta(config: Config, *, pad_token_id: int, device_type: str, autocast: bool) -> Policy | RewardModel:
    """Build the model on the meta device for a rank that receives its values from rank 0; exactness is not checked.

    Raises:
        ModelError: as for :func:`build_on_meta`; or the config alone does not describe the structure.
    """
    check_source(config.model_name_or_path)
    trained = build_on_meta(config, read_architecture(config), device_type=device_type, autocast=autocast)
    if config.use_liger_kernel:
        use_layer_kernels(trained.base)
    if isinstance(trained, RewardModel):
        trained.base.config.get_text_config().pad_token_id = pad_token_id
    return trained


def model_on_meta(kind: Any, config: Config, architecture: Any) -> Any:
    """Build a model of an auto class on the meta device, without dropout."""
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
    """Load the frozen sequence classifier at ``reward_model_path``, in eval mode.

    Raises:
        ModelError: it cannot be loaded, has more than one label, no score of its own or no padding token.
    """
    path = str(config.reward_model_path)
    check_source(path, "reward_model_path")
    model = _from_pretrained(AutoModelForSequenceClassification, config, path, autocast=autocast)
    if model.config.num_labels != 1:
        raise ModelError(f"reward_model_path={path!r} gives {model.config.num_labels} labels: a reward model has one")
    if model.config.get_text_config().pad_token_id is None:
        raise ModelError(f"reward_model_path={path!r}: its config has no pad_token_id, set it to its tokenizer's")
    return model.requires_grad_(False).eval()


def as_reward_model(classifier: Any, config: Config) -> RewardModel:
    """Make a classifier a frozen reward model. Raise ModelError if its rewards would not be exact."""
    return make_exact(
        classifier,
        lambda model: RewardModel(model, is_peft=False),
        longest=LongestRow.of(config),
        attn_implementation=config.attn_implementation,
    )


def _from_pretrained(
    kind: Any, config: Config, path: str, *, autocast: bool, new: Sequence[str] = (), **options: Any
) -> Any:
    """Load a pretrained model of an auto class, and refuse a checkpoint that does not fit its config.

    Args:
        new: weights that the checkpoint may lack, and that transformers then draws at random.
    """
    _check_dtype(config, autocast=autocast)
    if (folder := Path(path).expanduser()).is_dir():
        check_weight_files(folder, "the model")
    try:
        with _errors_only():  # transformers reports missing weights, which are checked below
            model, loading_info = kind.from_pretrained(
                path,
                dtype=getattr(torch, config.dtype),
                attn_implementation=None if config.attn_implementation == "auto" else config.attn_implementation,
                trust_remote_code=config.trust_remote_code,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # transformers' own error names none; they are refused below
                **SAFETENSORS_ONLY,
                **options,
            )
    except Exception as error:
        raise ModelError(f"cannot load the model {path!r}: {why_not(error)}{why_not_read(path, error)}") from error
    _refuse_other_shapes(loading_info, path)
    _refuse_extra_layers(loading_info, path, model)
    refuse_missing(loading_info, path, new)
    _untie_as_loaded(model, config, path)
    return model


def _untie_as_loaded(model: Any, config: Config, path: str) -> None:
    """Let the config say that embeddings and LM head are two matrices if the checkpoint has two different ones.

    transformers loads both whatever the config says. A model that is built from the config later, for an export or by
    other processes, would have one.
    """
    head, parts = model.get_output_embeddings(), (model.config, model.config.get_text_config())
    said = getattr(model, "_tied_weights_keys", None) and any(getattr(p, "tie_word_embeddings", False) for p in parts)
    if not said or head is None or head.weight is model.get_input_embeddings().weight:
        return
    if config.fsdp:
        raise ModelError(
            f"the checkpoint {path!r} does not fit its config.json: its embeddings and LM head differ, and the config "
            "has tie_word_embeddings: true; set it to false there"
        )
    for part in parts:
        part.tie_word_embeddings = False


def _refuse_other_shapes(loading_info: dict[str, Any], path: str) -> None:
    for name, saved, wanted in sorted(loading_info["mismatched_keys"]):
        raise ModelError(
            f"the checkpoint {path!r} does not fit its config.json: {name} is {tuple(saved)} there, and the config "
            f"makes it {tuple(wanted)}; use the config.json that was saved with the weights"
        )


def _refuse_extra_layers(loading_info: dict[str, Any], path: str, model: Any) -> None:
    """Raise ModelError for a checkpoint with more layers than its config, of which transformers reads the first."""
    count, names = model.config.get_text_config().num_hidden_layers, {name for name, _ in model.named_parameters()}
    for name in sorted(loading_info["unexpected_keys"]):
        if re.sub(r"(?<=\.)\d+(?=\.)", "0", name, count=1) in names:
            raise ModelError(
                f"the checkpoint {path!r} does not fit its config.json: it has {name}, and the config has {count} "
                "layers; use the config.json that was saved with the weights"
            )


def refuse_missing(loading_info: dict[str, Any], path: str, new: Sequence[str] = ()) -> None:
    """Raise ModelError for weights, other than ``new`` ones, that a checkpoint lacks; transformers draws them."""
    if missing := sorted(set(loading_info["missing_keys"]) - set(new)):
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        names = ", ".join(missing[:3])
        raise ModelError(
            f"the checkpoint {path!r} lacks weights: {names}{more}; choose a complete one (or train it first)"
        )


@contextmanager
def _errors_only() -> Iterator[None]:
    """Silence transformers' warnings in a block."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def _check_dtype(config: Config, *, autocast: bool) -> None:
    if config.dtype == "bfloat16" and not autocast:
        raise ModelError("dtype='bfloat16' needs bf16 compute: set bf16: true, or dtype: float32")


def _disable_dropout(model: nn.Module) -> None:
    """Switch off the model's dropout: a log-ratio of two dropout masks is noise. LoRA, added later, keeps its own."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            # Attention's, OPT's functional ones, layerdrop, the noise of Mixtral's routers.
            # PhiMoE's router_jitter_noise is no noise, but a threshold of its routing.
            jitters = "jitter" in name and name != "router_jitter_noise"
            if ("drop" in name or jitters) and isinstance(value, float):
                setattr(module, name, 0.0)
