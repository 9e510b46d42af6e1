"""The sliding window of each layer of a decoder, as transformers' masks define it."""

from __future__ import annotations

from typing import Any


def layer_windows(config: Any) -> list[int | None]:
    """Return, for each layer, how many tokens a token sees: itself and those just before it. None means all of them.

    Args:
        config: of a transformers model; a composite one's text config is read.

    Raises:
        ValueError: a layer is not plain causal attention, with or without a window.
    """
    config = config.get_text_config()
    if getattr(config, "use_bidirectional_attention", None) or not getattr(config, "is_causal", True):
        raise ValueError("its attention is bidirectional")
    count = config.num_hidden_layers
    layers = config.per_layer_config if getattr(config, "is_heterogeneous", False) else [config] * count
    kinds = config.layer_types if _reads_layer_types(config) else None
    return [_window(layer, kind) for layer, kind in zip(layers, kinds or [None] * count, strict=True)]


def _reads_layer_types(config: Any) -> bool:
    """Return whether the model obeys ``layer_types``. Mistral's config stores what a file says, and never reads it."""
    if getattr(config, "layer_types", None) is None:
        return False
    kind = type(config)
    is_declared = hasattr(kind, "layer_types") or "layer_types" in kind.attribute_map
    return is_declared or not kind.__module__.startswith("transformers.")


def _window(config: Any, kind: str | None) -> int | None:
    window: int | None = getattr(config, "sliding_window", None)
    if kind is None:
        if window is None and getattr(config, "attention_chunk_size", None) is not None:
            raise ValueError("it has layers of chunked_attention")
        return window
    if kind == "full_attention":
        return None
    if kind != "sliding_attention" or window is None:
        raise ValueError(f"it has layers of {kind}" + (" without a window" if kind == "sliding_attention" else ""))
    return window
