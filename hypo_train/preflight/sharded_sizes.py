"""Compute what one process holds if weights (``fsdp``) or optimizer state (``zero_stage``) are sharded."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from hypo_train.distributed.zero import BUCKET
from hypo_train.model.meta_pass import num_bytes
from hypo_train.model.text_parts import decoder_of
from hypo_train.model.trunk import decoder_layers


class Groups(NamedTuple):
    """Parameters that FSDP gathers together; a shared parameter is counted once."""

    outside: list[nn.Parameter]  # parameters in no layer: embeddings, the final norm, the head
    layers: list[list[nn.Parameter]]


def groups(trained: Any) -> Groups:
    """Return the groups that :func:`hypo_train.distributed.fsdp.shard` makes."""
    layers: Sequence[nn.Module] = decoder_layers(decoder_of(trained.base)) or ()  # type: ignore[assignment]
    inside = {id(p) for layer in layers for p in layer.parameters()}
    return Groups(
        [p for p in trained.parameters() if id(p) not in inside], [list(layer.parameters()) for layer in layers]
    )


def divided(number: int, count: int) -> int:
    """Return the size of one of ``count`` shards, rounded up."""
    return -(-number // count)


class ZeroBytes(NamedTuple):
    """The bytes that a process holds with ZeRO in addition to the weights."""

    weights: int  # a copy of its shard, which the optimizer updates
    state: int
    gradients: int
    changing_gradients: int
    bucket: int  # gradients that are being reduced
    temporary: int  # of the update, beyond the memory that the bucket has freed


def zero_bytes(stage: int, count: int, *, trained: int, gradients: int, state: int, temporary: int) -> ZeroBytes:
    """Return the sizes with ZeRO-``stage`` over ``count`` processes.

    Args:
        trained: bytes of the trained weights, in fp32.
        gradients: bytes of the gradients at the peak of a training pass without ZeRO.
        state, temporary: bytes of the unsharded optimizer. It has temporaries of one tensor, which is a shard here.
    """
    part, bucket = divided(trained, count), min(4 * BUCKET, trained)
    update = 2 * part if temporary else 0
    return ZeroBytes(
        weights=part,
        state=divided(state, count),
        gradients=min(part, gradients) if stage == 2 else gradients,
        # A shard and its flat copy; with stage 1, all gradients before that.
        changing_gradients=max(2 * part, 0 if stage == 2 else trained),
        bucket=bucket,
        temporary=max(0, update - bucket),
    )


def gathered_bytes(trained: Any, *, autocast: bool, vocab_parallel: bool) -> tuple[int, int]:
    """Return the bytes of gathered weights that a process holds in sampling, and in a training pass.

    Sampling gathers all weights. A training pass gathers the parameters outside the layers and two layers: the one that
    runs and the next. A backward pass also holds a layer's gradients. ``vocab_parallel`` gathers no embedding and head.
    """
    parameter_groups = groups(trained)
    split = {id(p) for p in _of_the_vocabulary(trained.base)} if vocab_parallel else set()
    outside = _computed_bytes(parameter_groups.outside, autocast)
    outside_a_pass = _computed_bytes((p for p in parameter_groups.outside if id(p) not in split), autocast)
    layer_bytes = [_computed_bytes(layer, autocast) for layer in parameter_groups.layers]
    gradients = max((num_bytes(p for p in layer if p.requires_grad) for layer in parameter_groups.layers), default=0)
    largest = max(layer_bytes, default=0)
    return outside + sum(layer_bytes), outside_a_pass + min(2 * largest, sum(layer_bytes)) + gradients


def _of_the_vocabulary(model: Any) -> list[torch.Tensor]:
    return [*model.get_input_embeddings().parameters(), *model.get_output_embeddings().parameters()]


def _computed_bytes(parameters: Iterable[torch.Tensor], autocast: bool) -> int:
    """Return the bytes of parameters in the dtype in which they are gathered."""
    return sum(p.numel() * (2 if autocast else p.element_size()) for p in parameters)
