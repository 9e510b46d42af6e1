"""Sizes for one process of several that shard weights (``fsdp``) or optimizer state (``zero_stage``)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from hypo_train.distributed.zero import BUCKET
from hypo_train.model.meta_pass import num_bytes
from hypo_train.model.trunk import decoder_layers


class Groups(NamedTuple):
    """Parameters that FSDP gathers together; a shared parameter is counted once."""

    outside: list[nn.Parameter]  # what lies in no layer: embeddings, the final norm, the head
    layers: list[list[nn.Parameter]]


def groups(trained: Any) -> Groups:
    """Return the groups that :func:`hypo_train.distributed.fsdp.shard` makes."""
    layers: Sequence[nn.Module] = decoder_layers(trained.base.get_decoder()) or ()  # type: ignore[assignment]
    inside = {id(p) for layer in layers for p in layer.parameters()}
    return Groups(
        [p for p in trained.parameters() if id(p) not in inside], [list(layer.parameters()) for layer in layers]
    )


def divided(number: int, count: int) -> int:
    """Return the size of one process's part."""
    return -(-number // count)


class ZeroBytes(NamedTuple):
    """Bytes that a process holds with ZeRO in addition to the weights."""

    weights: int  # a copy of its part, which is updated
    state: int
    gradients: int
    changing_gradients: int
    bucket: int  # gradients on their way
    temporary: int  # of the update, beyond the bucket before it


def zero_bytes(stage: int, count: int, *, trained: int, gradients: int, state: int, temporary: int) -> ZeroBytes:
    """Return the sizes with ZeRO-``stage`` over ``count`` processes.

    Args:
        trained: of the trained weights, fp32.
        gradients: of a whole training pass at its peak, without ZeRO.
        state, temporary: of the optimizer, whole; it has temporaries of a tensor's size, which are a part's here.
    """
    part, bucket = divided(trained, count), min(4 * BUCKET, trained)
    update = 2 * part if temporary else 0
    return ZeroBytes(
        weights=part,
        state=divided(state, count),
        gradients=min(part, gradients) if stage == 2 else gradients,
        changing_gradients=max(2 * part, 0 if stage == 2 else trained),  # a part of them, and it flat; or all, before
        bucket=bucket,
        temporary=max(0, update - bucket),
    )


def put_together(trained: Any, *, autocast: bool, vocab_parallel: bool) -> tuple[int, int]:
    """Return the bytes of gathered weights that a process holds while it samples, and while it trains.

    Sampling has all of them. A pass has what lies in no layer, and two layers, the one that runs and the next; in the
    backward pass also a layer's gradients. ``vocab_parallel``: it has neither embedding nor head.
    """
    own = groups(trained)
    in_parts = {id(p) for p in _of_the_vocabulary(trained.base)} if vocab_parallel else set()
    outside = _computed_bytes(own.outside, autocast)
    outside_a_pass = _computed_bytes((p for p in own.outside if id(p) not in in_parts), autocast)
    of_layers = [_computed_bytes(layer, autocast) for layer in own.layers]
    gradients = max((num_bytes(p for p in layer if p.requires_grad) for layer in own.layers), default=0)
    largest = max(of_layers, default=0)
    return outside + sum(of_layers), outside_a_pass + min(2 * largest, sum(of_layers)) + gradients


def _of_the_vocabulary(model: Any) -> list[torch.Tensor]:
    return [*model.get_input_embeddings().parameters(), *model.get_output_embeddings().parameters()]


def _computed_bytes(parameters: Iterable[torch.Tensor], autocast: bool) -> int:
    """Return the bytes of parameters in the dtype in which they are gathered."""
    return sum(p.numel() * (2 if autocast else p.element_size()) for p in parameters)
