"""A model and its tokenizer, loaded, refused where they do not fit, and made ready to train."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging

from hypo_train.config import Config
from hypo_train.model import checkpointing
from hypo_train.model.checkpointing import Checkpointing
from hypo_train.model.exactness import check_exactness, check_rewards
from hypo_train.model.liger import use_layer_kernels
from hypo_train.model.policy import Policy
from hypo_train.model.quantization import keep_scales, quantizable, quantization_options
from hypo_train.model.reward_model import RewardModel
from hypo_train.model.tree_model import ModelError, TreeModel, first_line
from hypo_train.model.weight_files import SAFETENSORS_ONLY, refuse_pickles, why_not_read
from hypo_train.trees.attention import NAME

# Parameters from which on selective checkpointing is a CPU's default: it looks at every operation, which took longer
# than to compute it in a model of a million (0.8 s a step instead of 0.5), and 4 % of the time in one of 135 million.
SELECTIVE_FROM = 10_000_000


class StructureError(ModelError):
    """A model that cannot be built from its architecture's config alone; its checkpoint may load all the same."""


def load_tokenizer(config: Config, architecture: Any = None) -> Any:
    """The model's tokenizer; one without a padding token pads with its EOS, which masks keep apart.

    ``architecture``: what :func:`read_architecture` gave, where it has been read.
    """
    check_source(config.model_name_or_path)
    check_causal(read_architecture(config) if architecture is None else architecture, config)
    tokenizer = _open_tokenizer(config, config.model_name_or_path)
    if tokenizer.eos_token_id is None:
        raise ModelError(f"the tokenizer of {config.model_name_or_path!r} has no EOS token: set its eos_token")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _open_tokenizer(config: Config, path: str) -> Any:
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=config.trust_remote_code)
    except Exception as error:  # transformers raises a different class for every way to fail
        raise ModelError(f"cannot load the tokenizer of {path!r}: {why_not(error)}") from error


def why_not(error: Exception) -> str:
    """Why transformers did not load something, in a line."""
    if "trust_remote_code" in str(error):
        return "it asks for Python code of its own: set trust_remote_code: true if you have read that code and trust it"
    return first_line(error)


def eos_token_ids(model_generation_config: Any, tokenizer: Any) -> tuple[int, ...]:
    """Every token that ends a completion: the tokenizer's EOS and the checkpoint's (Llama 3 has several)."""
    more = getattr(model_generation_config, "eos_token_id", None)
    listed = [] if more is None else [more] if isinstance(more, int) else list(more)
    return tuple(dict.fromkeys([tokenizer.eos_token_id, *listed]))


def generation_config(config: Config) -> GenerationConfig | None:
    """The checkpoint's own, for its list of end tokens; many have none."""
    try:
        return GenerationConfig.from_pretrained(config.model_name_or_path)
    except OSError:
        return None


def load_policy(config: Config, *, autocast: bool) -> Policy:
    """The policy ready to train: loaded, its trained parameters chosen and in fp32, its head and mask checked.

    Raises:
        ModelError: not a causal language model, a head the kernels cannot serve exactly, attention that
            cannot take the prefix mask, a choice of trained parameters that does not fit the model, or Liger's
            kernels asked for where they cannot be had.
    """
    check_source(config.model_name_or_path)
    check_causal(read_architecture(config), config)
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
    check_causal(read_architecture(config), config)
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
    model = _made_trainable(model, config, device_type)
    if config.algorithm == "reward":
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
    of_reward = config.algorithm == "reward"
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


def load_classifier_tokenizer(config: Config, classifier: Any) -> Any:
    """The classifier's own; a text that is too long loses its beginning."""
    path = str(config.reward_model_path)
    tokenizer = _open_tokenizer(config, path)
    tokenizer.pad_token_id = classifier.config.get_text_config().pad_token_id
    tokenizer.truncation_side = "left"
    positions = getattr(classifier.config.get_text_config(), "max_position_embeddings", None)
    tokenizer.model_max_length = min(tokenizer.model_max_length, positions or tokenizer.model_max_length)
    return tokenizer


def load_text_tokenizer(config: Config, path: str, field: str) -> Any:
    """The tokenizer at ``path``, the value of ``field``, as it is saved. Raises ModelError where there is none."""
    check_source(path, field)
    return _open_tokenizer(config, path)


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
    try:
        with _errors_only():  # its report of missing weights is what is checked below
            model, found = kind.from_pretrained(
                path,
                dtype=getattr(torch, config.dtype),
                attn_implementation=None if config.attn_implementation == "auto" else config.attn_implementation,
                trust_remote_code=config.trust_remote_code,
                output_loading_info=True,
                **SAFETENSORS_ONLY,
                **options,
            )
    except Exception as error:
        raise ModelError(f"cannot load the model {path!r}: {why_not(error)}{why_not_read(path, error)}") from error
    refuse_missing(found, path, new)
    _disable_dropout(model)
    return model


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


def _made_trainable(model: Any, config: Config, device_type: str) -> Any:
    """The model with the configured parameters trained, in fp32, and its activations checkpointed.

    ``device_type``: of the device that it will train on.
    """
    if config.use_peft:
        model = _with_lora(model, config)
    elif config.num_layers_unfrozen is not None:
        _unfreeze_last(model, config.num_layers_unfrozen)
    for parameter in model.parameters():
        if parameter.requires_grad:
            # One update of 3e-6 changes 4 % of bf16 weights: what is trained is held in fp32.
            parameter.data = parameter.data.float()
    if kind := _checkpointing(config, model, device_type):
        checkpointing.enable(model, kind, has_dropout=config.lora_dropout > 0)
    return model


def _share_prompts(model: TreeModel[Any], attn_implementation: str, check: Callable[[], str | None]) -> None:
    """Run trees where the ``check`` proves that the model does so exactly, and separate rows elsewhere."""
    plain = model.base.config._attn_implementation
    if attn_implementation == "auto":
        model.base.set_attn_implementation(NAME)
    model.why_separate_rows = check()
    if not model.shares_prompts:
        model.base.set_attn_implementation(plain)


def _checkpointing(config: Config, model: Any, device_type: str) -> Checkpointing:
    """What the configuration asks for, or what suits the device where it leaves that open."""
    serves = model.supports_gradient_checkpointing
    if config.gradient_checkpointing is None:
        large = sum(p.numel() for p in model.parameters()) >= SELECTIVE_FROM
        return "selective" if serves and large and device_type == "cpu" else False
    if config.gradient_checkpointing and not serves:
        raise ModelError(f"gradient_checkpointing: {type(model).__name__} has none: set it to false")
    return config.gradient_checkpointing


def looks_local(name: str) -> bool:
    """Whether a name is the path of a folder rather than one on the Hub."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1


def check_source(name: str, field: str = "model_name_or_path") -> None:
    """A local folder that is not there is not worth asking the Hub about."""
    path = Path(name).expanduser()
    if looks_local(name) and not path.is_dir():
        raise ModelError(f"{field}: there is no folder {name!r}")
    if path.is_dir() and not (path / "config.json").is_file():
        if (path / "adapter_config.json").is_file():
            raise ModelError(
                f"{field}: {name!r} is an adapter, and not a whole model: merge it first, with python -m hypo_train "
                "export RUN --output_dir FOLDER --merge, or peft's merge_and_unload, and name the result"
            )
        raise ModelError(f"{field}: the folder {name!r} has no config.json, so it is not a saved model")
    if path.is_dir():
        refuse_pickles(path, field)


def read_architecture(config: Config) -> Any:
    """The transformers config of the model to train. Raises ModelError where it cannot be had."""
    try:
        return AutoConfig.from_pretrained(config.model_name_or_path, trust_remote_code=config.trust_remote_code)
    except Exception as error:
        where = "" if Path(config.model_name_or_path).is_dir() else "no local folder, and from the Hub: "
        raise ModelError(f"cannot read the config of {config.model_name_or_path!r}: {where}{why_not(error)}") from error


def check_causal(found: Any, config: Config) -> None:
    """Refuse encoders and sequence-to-sequence models, from their transformers config, before weights are read."""
    listed = found.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or "AutoModelForCausalLM" in (
        getattr(found, "auto_map", None) or {}
    )
    architectures = getattr(found, "architectures", None) or []
    known: tuple[str, ...] = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
    if config.algorithm == "reward":
        known += ("ForSequenceClassification",)
    masked = architectures and not any(a.endswith(known) for a in architectures)
    if not listed or masked or getattr(found, "is_encoder_decoder", False):
        raise ModelError(
            f"{config.model_name_or_path!r} is a {found.model_type} model"
            f"{f' ({architectures[0]})' if architectures else ''}, not a causal language model: "
            "choose a decoder that AutoModelForCausalLM loads"
        )


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


def _with_lora(model: Any, config: Config) -> Any:
    from peft import LoraConfig, get_peft_model

    targets = config.lora_target_modules
    settings = LoraConfig(
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=targets,
        bias="none",
        use_rslora=config.use_rslora,
        use_dora=config.use_dora,
        task_type="SEQ_CLS" if config.algorithm == "reward" else "CAUSAL_LM",  # which trains the new score too
    )
    try:
        return get_peft_model(model, settings)
    except ValueError as error:
        raise ModelError(f"lora_target_modules={targets!r}: {first_line(error)}") from error


def _unfreeze_last(model: Any, count: int) -> None:
    """Train the last ``count`` decoder layers, the norm above them and an untied head."""
    decoder = model.get_decoder()
    layers = next((m for m in decoder.children() if isinstance(m, nn.ModuleList)), None)
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
