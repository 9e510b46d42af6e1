"""An estimate for one process of several, where they share the weights (``fsdp: true``)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from hypo_train.costs.rehearsal import bytes_of
from hypo_train.model.trunk import decoder_layers


class Groups(NamedTuple):
    """Parameters that processes put together at one time, a shared one once."""

    outside: list[nn.Parameter]  # what lies in no layer: embeddings, the final norm, the head
    layers: list[list[nn.Parameter]]


def groups(trained: Any) -> Groups:
    """As :func:`hypo_train.model.sharding.shard` makes them."""
    layers: Sequence[nn.Module] = decoder_layers(trained.base.get_decoder()) or ()  # type: ignore[assignment]
    inside = {id(p) for layer in layers for p in layer.parameters()}
    return Groups(
        [p for p in trained.parameters() if id(p) not in inside], [list(layer.parameters()) for layer in layers]
    )


def divided(number: int, count: int) -> int:
    """Bytes of a process's part."""
    return -(-number // count)


def put_together(trained: Any, *, autocast: bool) -> tuple[int, int]:
    """Bytes of weights that a process holds whole, beside its parts: while it samples, and while it trains.

    Sampling has all of them. A pass has what lies in no layer, and two layers, the one that runs and the next; in the
    backward pass also a layer's gradients.
    """
    own = groups(trained)
    outside = _computed_bytes(own.outside, autocast)
    of_layers = [_computed_bytes(layer, autocast) for layer in own.layers]
    gradients = max((bytes_of(p for p in layer if p.requires_grad) for layer in own.layers), default=0)
    largest = max(of_layers, default=0)
    return outside + sum(of_layers), outside + min(2 * largest, sum(of_layers)) + gradients


def _computed_bytes(parameters: Iterable[torch.Tensor], autocast: bool) -> int:
    """In the dtype that the processes exchange."""
    return sum(p.numel() * (2 if autocast else p.element_size()) for p in parameters)
