"""The longest rows whose positions a model gives the same values in every batch.

RoPE of the types ``longrope`` and ``dynamic`` takes its frequencies from the longest row of a call: above a number of
tokens a row's log-probs depend on the other rows, and tokens that were sampled before a row passed it are scored with
other frequencies afterwards. Rows of at most that number have one set of frequencies everywhere.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from hypo_train.config import Config
from hypo_train.model.tree_model import ModelError


class LongestRow(NamedTuple):
    """The most tokens that a prompt and its completion can have together, and the settings that allow them."""

    tokens: int | None  # None: any number
    settings: str

    @classmethod
    def of(cls, config: Config) -> LongestRow:
        """Return that of a run, whose samples may be longer than the completions in its data."""
        completion, name = config.max_completion_length, "max_completion_length"
        if config.max_new_tokens is not None and config.max_new_tokens > completion:
            completion, name = config.max_new_tokens, "max_new_tokens"
        return cls(config.max_prompt_length + completion, f"max_prompt_length + {name}")


ANY_LENGTH = LongestRow(None, "the caller")


@dataclass(frozen=True)
class RopeLimit:
    """A RoPE whose frequencies change once a row of a call has more than ``tokens`` tokens."""

    rope_type: str
    setting: str  # the config's name for ``tokens``
    tokens: int
    advice: str  # how longer rows can be served, or ""
    is_chosen_on_host: bool  # a call waits for its longest row, so it cannot be captured in a CUDA graph

    def refusal(self, name: str, longest: LongestRow) -> str:
        """Return why rows longer than the limit are refused, and what to do."""
        allowed = "rows of any length" if longest.tokens is None else longest.tokens
        return (
            f"{name} has RoPE of rope_type {self.rope_type!r}, whose frequencies change for all rows of a batch once "
            f"one has more than {self.tokens} tokens ({self.setting}), and {longest.settings} allows {allowed}: "
            f"lower it to {self.tokens}{self.advice}"
        )

    def is_exceeded(self, longest: LongestRow) -> bool:
        return longest.tokens is None or longest.tokens > self.tokens


def rope_limit(model_config: Any) -> RopeLimit | None:
    """Return the limit of a transformers config whose RoPE depends on the longest row; None if there is none."""
    config = model_config.get_text_config()
    limits = [limit for rope in _rope_groups(config) if (limit := _limit(config, rope)) is not None]
    return min(limits, key=lambda limit: limit.tokens, default=None)


def check_sample_length(model: Any, tokens: int) -> None:
    """Raise ValueError if a prompt and its completion of ``tokens`` may pass the limit of the model's RoPE."""
    longest, limit = LongestRow(tokens, "prompt + max_new_tokens"), rope_limit(model.config)
    if limit is not None and limit.is_exceeded(longest):
        raise ValueError(limit.refusal(type(model).__name__, longest))


def check_positions(model: Any, longest: LongestRow) -> None:
    """Raise ModelError if a transformers model has no positions for rows so long, or none that batches leave alone."""
    name = type(model).__name__
    limit = rope_limit(model.config)
    if limit is not None and limit.is_exceeded(longest):
        raise ModelError(limit.refusal(name, longest))
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and longest.tokens is not None and longest.tokens > positions:
        raise ModelError(
            f"{name} has {positions} positions, and prompt and completion may take {longest.tokens}: "
            f"lower {longest.settings} to {positions}"
        )


def _rope_groups(config: Any) -> Iterator[Mapping[str, Any]]:
    """Yield the RoPE parameters of a config, which are given once or for each type of layer."""
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    for group in (rope, *rope.values()):
        if isinstance(group, Mapping):
            yield group


def _limit(config: Any, rope: Mapping[str, Any]) -> RopeLimit | None:
    kind = rope.get("rope_type", rope.get("type"))
    if kind == "dynamic" and not rope.get("alpha"):  # Hunyuan's has a fixed alpha
        return RopeLimit(kind, "max_position_embeddings", config.max_position_embeddings, "", True)
    if kind in ("longrope", "su"):
        if rope.get("short_factor") == rope.get("long_factor") and rope.get("short_mscale") == rope.get("long_mscale"):
            return None
        setting = "original_max_position_embeddings"
        tokens = rope.get(setting) or getattr(config, setting, None) or config.max_position_embeddings
        mscale = " and short_mscale to long_mscale" if "long_mscale" in rope else ""
        advice = (
            f", or set short_factor to long_factor{mscale} in the model's config.json: all rows then have the long ones"
        )
        return RopeLimit(kind, setting, tokens, advice, "long_mscale" in rope)
    return None
