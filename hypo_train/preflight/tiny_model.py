"""Build a tiny model of an architecture, and check what its structure supports before the weights are read.

It has random weights, the widths and heads of the real model, two layers, a small vocabulary and a narrow MLP.
Whether trees and decoding from shared prompts are exact does not depend on the parts that are left out.
"""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from hypo_train.config import Config
from hypo_train.model.load import make_trained_exact
from hypo_train.model.policy import Policy
from hypo_train.model.tree_model import ModelError, first_line
from hypo_train.preflight.device import existing_samplers

_SMALLER = {"num_hidden_layers": 2, "n_layer": 2, "vocab_size": 512, "intermediate_size": 256, "ffn_dim": 256}


class Structure(NamedTuple):
    """The results of the checks on a tiny model; all None if it could not be built."""

    shares_prompts: bool | None
    why_separate_rows: str | None
    decodes: bool | None
    why_generate: str | None


UNKNOWN = Structure(None, None, None, None)


def look_at_structure(config: Config, architecture: Any) -> Structure:
    """Return whether completions can share their prompt, and whether the decode sampler supports the architecture.

    Raises:
        ModelError: the architecture cannot be trained exactly, whatever its weights are.
    """
    trains_reward_model = config.spec.trains_reward_model
    changes: dict[str, Any] = {"dtype": "float32", "gradient_checkpointing": False}
    if config.num_layers_unfrozen is not None:
        changes["num_layers_unfrozen"] = 1
    changes["unfrozen_parameters"] = None  # they may name layers that the tiny model lacks
    try:
        small = _smaller(architecture)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            kind = AutoModelForSequenceClassification if trains_reward_model else AutoModelForCausalLM
            model = kind.from_config(small, trust_remote_code=config.trust_remote_code)
            if config.attn_implementation != "auto":
                _set_attention(model, config.attn_implementation)
            trained = make_trained_exact(model, config.model_copy(update=changes), device_type="cpu")
    except ModelError:
        if config.lora_target_modules is not None:
            return UNKNOWN  # they may name layers that the tiny model lacks
        raise
    except Exception:  # some architectures do not accept other sizes
        return UNKNOWN
    why_generate = None
    if isinstance(trained, Policy):
        why_generate = next((entry.why_unsupported(trained.model) for entry in existing_samplers(config)), None)
    return Structure(trained.shares_prompts, trained.why_separate_rows, why_generate is None, why_generate)


def _set_attention(model: Any, name: str) -> None:
    """Set the attention of a model. Raises ModelError if it does not exist, or not for this model."""
    try:
        model.set_attn_implementation(name)
    except (ValueError, ImportError) as error:
        raise ModelError(f"attn_implementation={name!r}: {first_line(error)}") from error


def _smaller(architecture: Any) -> Any:
    small = copy.deepcopy(architecture)
    small.num_labels = 1
    settings = small.get_text_config()
    for name, size in _SMALLER.items():
        if isinstance(current := getattr(settings, name, None), int):
            setattr(settings, name, min(size, current))
    if kinds := getattr(settings, "layer_types", None):
        settings.layer_types = kinds[: settings.num_hidden_layers]
    settings.pad_token_id = 0
    return small
