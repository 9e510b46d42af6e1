"""Read the config, the tokenizer and the EOS tokens of a model before any weights are read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import (
    AutoConfig,
    AutoTokenizer,
    GenerationConfig,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from hypo_train.config import Config
from hypo_train.data.chat import turn_end
from hypo_train.data.template_date import fix_date, writes_date
from hypo_train.model.tree_model import ModelError, first_line
from hypo_train.model.weight_files import refuse_pickles


def looks_local(name: str) -> bool:
    """Return whether a name is the path of a folder rather than a name on the Hub."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1


def check_source(name: str, field: str = "model_name_or_path") -> None:
    """Raise ModelError for a local path, the value of ``field``, that is not the folder of a saved model."""
    path = Path(name).expanduser()
    if looks_local(name) and not path.is_dir():
        raise ModelError(f"{field}: there is no folder {name!r}")
    if not path.is_dir():
        return
    if (path / "adapter_config.json").is_file():
        raise ModelError(
            f"{field}: {name!r} is an adapter and not a whole model: merge it into its base model first, as with "
            f"AutoPeftModelForCausalLM.from_pretrained({name!r}).merge_and_unload().save_pretrained(...) and the "
            "tokenizer beside it; of a run of this project, python -m hypo_train export RUN --merge --output_dir FOLDER"
        )
    if not (path / "config.json").is_file():
        gguf_advice = (
            ": convert it first, python -m hypo_train.convert_gguf FILE FOLDER" if any(path.glob("*.gguf")) else ""
        )
        raise ModelError(f"{field}: the folder {name!r} has no config.json, so it is not a saved model{gguf_advice}")
    refuse_pickles(path, field)


def read_architecture(config: Config) -> Any:
    """Read the transformers config of the model to train. Raise ModelError if it cannot be read."""
    try:
        return AutoConfig.from_pretrained(config.model_name_or_path, trust_remote_code=config.trust_remote_code)
    except Exception as error:
        where = "" if Path(config.model_name_or_path).is_dir() else "no local folder, and from the Hub: "
        raise ModelError(f"cannot read the config of {config.model_name_or_path!r}: {where}{why_not(error)}") from error


def check_architecture(architecture: Any, config: Config) -> None:
    """Raise ModelError for an encoder, a sequence-to-sequence model or a quantised checkpoint, by its config."""
    if (quantized := getattr(architecture, "quantization_config", None)) is not None:
        fields = quantized if isinstance(quantized, dict) else vars(quantized)
        method = fields.get("quant_method", "unknown method")
        raise ModelError(
            f"{config.model_name_or_path!r} is a quantised checkpoint ({method}): "
            "name the model that it was made from; load_in_4bit: true with use_peft: true holds its frozen weights in "
            "4 bits"
        )
    listed = architecture.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or "AutoModelForCausalLM" in (
        getattr(architecture, "auto_map", None) or {}
    )
    architectures = getattr(architecture, "architectures", None) or []
    suffixes: tuple[str, ...] = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
    if config.spec.trains_reward_model:
        suffixes += ("ForSequenceClassification",)
    masked = architectures and not any(a.endswith(suffixes) for a in architectures)
    if not listed or masked or getattr(architecture, "is_encoder_decoder", False):
        raise ModelError(
            f"{config.model_name_or_path!r} is a {architecture.model_type} model"
            f"{f' ({architectures[0]})' if architectures else ''}, not a causal language model: "
            "choose a decoder that AutoModelForCausalLM loads"
        )


def load_tokenizer(config: Config, architecture: Any = None) -> Any:
    """Load the model's tokenizer. If it has no padding token, it pads with its EOS, and masks tell the two apart.

    Args:
        architecture: what :func:`read_architecture` returned, if it was read already.
    """
    check_source(config.model_name_or_path)
    check_architecture(read_architecture(config) if architecture is None else architecture, config)
    tokenizer = _open_tokenizer(config, config.model_name_or_path)
    if tokenizer.eos_token_id is None:
        raise ModelError(f"the tokenizer of {config.model_name_or_path!r} has no EOS token: set its eos_token")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if config.template_date is not None and writes_date(tokenizer):
        fix_date(tokenizer, config.template_date)
    return tokenizer


def load_text_tokenizer(config: Config, path: str, field: str) -> Any:
    """Load the tokenizer at ``path``, the value of ``field``, unchanged. Raise ModelError if there is none."""
    check_source(path, field)
    return _open_tokenizer(config, path)


def load_classifier_tokenizer(config: Config, classifier: Any) -> Any:
    """Load a classifier's tokenizer. It truncates a text that is too long on the left."""
    path = str(config.reward_model_path)
    tokenizer = _open_tokenizer(config, path)
    tokenizer.pad_token_id = classifier.config.get_text_config().pad_token_id
    tokenizer.truncation_side = "left"
    positions = getattr(classifier.config.get_text_config(), "max_position_embeddings", None)
    tokenizer.model_max_length = min(tokenizer.model_max_length, positions or tokenizer.model_max_length)
    return tokenizer


def _open_tokenizer(config: Config, path: str) -> Any:
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=config.trust_remote_code)
    except Exception as error:  # transformers raises many kinds of errors
        folder = Path(path).expanduser()
        if folder.is_dir() and not any(folder.glob("token*")) and not any(folder.glob("vocab*")):
            raise ModelError(
                f"cannot load the tokenizer of {path!r}: the folder has none; save it there as well, as with "
                f"AutoTokenizer.from_pretrained(BASE).save_pretrained({path!r})"
            ) from error
        raise ModelError(f"cannot load the tokenizer of {path!r}: {why_not(error)}") from error


def eos_token_ids(model_generation_config: Any, tokenizer: Any) -> tuple[int, ...]:
    """Return all tokens that end a completion: the tokenizer's EOS, then the checkpoint's (Llama 3 has several).

    If the chat template ends an answer with another special token, this is the last one.
    """
    listed = _listed_ends(model_generation_config, tokenizer)
    end = turn_end(tokenizer, listed)
    return listed if end is None else (*listed, end)


def _listed_ends(model_generation_config: Any, tokenizer: Any) -> tuple[int, ...]:
    """Return the tokenizer's EOS, then those of the generation config."""
    more = getattr(model_generation_config, "eos_token_id", None)
    listed = [] if more is None else [more] if isinstance(more, int) else list(more)
    return tuple(dict.fromkeys([tokenizer.eos_token_id, *listed]))


def generation_config(config: Config) -> GenerationConfig | None:
    """Load the checkpoint's generation config, which may list EOS tokens; None if it has none."""
    try:
        return GenerationConfig.from_pretrained(config.model_name_or_path)
    except OSError:
        return None


def list_turn_end(folder: Path, tokenizer: Any) -> None:
    """Add the token that ends an answer in the chat template to a saved model's generation config, for servers.

    Nothing changes if it is already among the tokens that end a completion, or if the folder has no generation config.
    """
    if not (folder / "generation_config.json").is_file():
        return
    found = GenerationConfig.from_pretrained(folder)
    if turn_end(tokenizer, _listed_ends(found, tokenizer)) is not None:
        found.eos_token_id = list(eos_token_ids(found, tokenizer))
        found.save_pretrained(folder)


def why_not(error: Exception) -> str:
    """Return in one line why transformers could not load something."""
    if "trust_remote_code" in str(error):
        return "it asks for Python code of its own: set trust_remote_code: true if you have read that code and trust it"
    return first_line(error)
