"""The parts of a model that text reaches. Multimodal models also have towers for images or sound, and projectors."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from difflib import get_close_matches
from typing import Any

from torch import nn


def decoder_of(model: Any) -> Any:
    """Return the module of a transformers model that turns token ids into the hidden states that the head reads.

    ``get_decoder`` gives Llama 4's whole causal language model, and ModernBERT's head, which is called decoder.
    """
    decoder = model.get_decoder()
    if decoder is model.get_output_embeddings():
        decoder = model.base_model
    while decoder.get_output_embeddings() is not None and hasattr(decoder, "model"):
        decoder = decoder.model
    return decoder


def reached_by_text(model: Any) -> set[int]:
    """Return the ids of the parameters of the decoder, the embeddings and the head, which are all that text reaches."""
    parts = (decoder_of(model), model.get_input_embeddings(), model.get_output_embeddings(), _score(model))
    return {id(parameter) for part in parts if part is not None for parameter in part.parameters()}


def unreached_modules(model: Any) -> list[str]:
    """Return the names of the largest modules that no text reaches."""
    return list(_unreached("", model, reached_by_text(model)))


def _unreached(name: str, module: nn.Module, reached: set[int]) -> Iterator[str]:
    inside = {id(parameter) for parameter in module.parameters()}
    if not inside:
        return
    if not inside & reached:
        yield name
        return
    for child_name, child in module.named_children():
        yield from _unreached(f"{name}.{child_name}".removeprefix("."), child, reached)


def _score(model: Any) -> Any:
    return getattr(model, "score", None)


def nearest_names(names: Iterable[str], name: str) -> str:
    """Return the end of an error message: the modules or parameters whose names are nearest to ``name``."""
    full = [other for other in names if other]
    last = sorted({part for other in full for part in other.split(".") if not part.isdigit()})
    near = get_close_matches(name, full if "." in name else last, n=3, cutoff=0.5)
    return f": did you mean {', '.join(near)}?" if near else f"; it has {', '.join(last)}"
