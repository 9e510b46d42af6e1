"""An estimate for one process of several, where they share the weights (``fsdp: true``)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from hypo_train.costs.rehearsal import bytes_of
from hypo_train.model.trunk import decoder_layers


def divided(number: int, count: int) -> int:
    """Bytes of a process's part."""
    return -(-number // count)


def put_together(trained: Any, *, autocast: bool, vocab_parallel: bool) -> tuple[int, int]:
    """Bytes of weights that a process holds whole, beside its parts: while it samples, and while it trains.

    Sampling has all of them. A pass has what lies in no layer, and two layers, the one that runs and the next; in the
    backward pass also a layer's gradients. ``vocab_parallel``: it has neither embedding nor head.
    """
    layers: Sequence[nn.Module] = decoder_layers(trained.base.get_decoder()) or ()  # type: ignore[assignment]
    inside = {id(p) for layer in layers for p in layer.parameters()}
    outside = _computed_bytes((p for p in trained.parameters() if id(p) not in inside), autocast)
    in_parts = {id(p) for p in _of_the_vocabulary(trained.base)} if vocab_parallel else set()
    outside_a_pass = _computed_bytes((p for p in trained.parameters() if id(p) not in inside | in_parts), autocast)
    of_layers = [_computed_bytes(layer.parameters(), autocast) for layer in layers]
    gradients = max((bytes_of(p for p in layer.parameters() if p.requires_grad) for layer in layers), default=0)
    largest = max(of_layers, default=0)
    return outside + sum(of_layers), outside_a_pass + min(2 * largest, sum(of_layers)) + gradients


def _of_the_vocabulary(model: Any) -> list[torch.Tensor]:
    return [*model.get_input_embeddings().parameters(), *model.get_output_embeddings().parameters()]


def _computed_bytes(parameters: Iterable[torch.Tensor], autocast: bool) -> int:
    """In the dtype that the processes exchange."""
    return sum(p.numel() * (2 if autocast else p.element_size()) for p in parameters)
