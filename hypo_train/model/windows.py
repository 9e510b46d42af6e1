"""The sliding window of each layer of a decoder, as transformers' masks define it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from hypo_train.model.text_parts import decoder_of

MaskFunction = Callable[[Any, Any, Tensor, Tensor], Tensor]  # (batch, head, query, key) -> whether query sees key
_RECORDER = "hypo_mask_recorder"
_FARTHEST = 2**17  # positions beyond this one are not asked for


def layer_windows(config: Any) -> list[int | None]:
    """Return, for each layer, how many tokens a token sees: itself and those just before it. None means all of them.

    Args:
        config: of a transformers model; a composite one's text config is read.

    Raises:
        ValueError: a layer is not plain causal attention, with or without a window.
    """
    config = config.get_text_config()
    bidirectional = getattr(config, "use_bidirectional_attention", None) in (True, "all")  # Gemma: "vision" is images
    if bidirectional or not getattr(config, "is_causal", True):
        raise ValueError("its attention is bidirectional")
    if "local" in (getattr(config, "attention_layers", None) or ()):  # GPT-Neo counts rows of its own mask
        raise ValueError("it has layers of local attention")
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


@contextmanager
def shortened_windows(config: Any, window: int) -> Iterator[None]:
    """Shorten the sliding windows of a model to ``window`` tokens for a block, so that short rows show their effect.

    transformers reads the config whenever it makes a mask.
    """
    config = config.get_text_config()
    original = getattr(config, "sliding_window", None)
    if original is None or original <= window:
        yield
        return
    config.sliding_window = window
    try:
        yield
    finally:
        config.sliding_window = original


def other_window(model: Any, windows: Sequence[int | None]) -> str | None:
    """Return how a layer's mask differs from the layer's window in ``windows``, or None if no mask is known to differ.

    The masks are those that the model asks transformers for, in a pass over a few tokens. Which keys they keep is read
    from their functions at distant positions, so that long windows need no long rows.
    """
    recorder = _MaskRecorder()
    config, device = model.config.get_text_config(), next(model.parameters()).device
    AttentionInterface.register(_RECORDER, recorder.attend)
    AttentionMaskInterface.register(_RECORDER, recorder.mask)
    attention = config._attn_implementation
    ids = torch.tensor([[*range(1, 8), 0]], device=device)
    model.set_attn_implementation(_RECORDER)
    try:
        # Padding at the end keeps masks from being left out as plain causal ones.
        decoder_of(model)(input_ids=ids, attention_mask=torch.arange(8, device=device)[None] < 7, use_cache=False)
    finally:
        model.set_attn_implementation(attention)
        masks = dict(recorder.of_layer)
        recorder.clear()
    positions = max(2 * max((w or 0) for w in windows), getattr(config, "max_position_embeddings", None) or 0)
    positions = min(max(positions, 1024), _FARTHEST)
    for layer, sees in masks.items():
        for query in (positions - 1, positions // 2 + 3):
            keys = torch.arange(positions, device=device)
            window = windows[layer] or positions
            expected = (keys <= query) & (keys > query - window)
            zero = torch.zeros((), dtype=torch.long, device=device)
            if not torch.equal(sees(zero, zero, torch.tensor(query, device=device), keys).expand(positions), expected):
                span = "all tokens before it" if windows[layer] is None else f"the last {window} tokens"
                return f"a token does not see {span} in layer {layer}, as its config says"
    return None


class _MaskRecorder:
    """An attention implementation that records the function behind each layer's mask, and attends to nothing."""

    def __init__(self) -> None:
        self._made: list[tuple[Tensor, MaskFunction]] = []
        self.of_layer: dict[int, MaskFunction] = {}

    def clear(self) -> None:
        self._made, self.of_layer = [], {}

    def mask(self, *, mask_function: MaskFunction, **options: Any) -> Tensor | None:
        mask: Tensor | None = sdpa_mask(mask_function=mask_function, **options)
        if mask is not None:
            self._made.append((mask, mask_function))
        return mask

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **options: Any
    ) -> tuple[Tensor, None]:
        for mask, mask_function in self._made:
            if mask is attention_mask:
                self.of_layer[int(module.layer_idx)] = mask_function  # type: ignore[arg-type]
        values = value.repeat_interleave(query.shape[1] // value.shape[1], dim=1)
        return values.transpose(1, 2).contiguous(), None
