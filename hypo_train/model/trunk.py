"""The trunk: the frozen layers below the trained ones, which policy and reference share and run once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def decoder_layers(decoder: nn.Module) -> nn.ModuleList | None:
    """Return the decoder's list of layers, or None if it has none."""
    return next((m for m in decoder.children() if isinstance(m, nn.ModuleList)), None)


def frozen_layers(decoder: nn.Module) -> list[nn.Module]:
    """Return the layers, from the lowest up, with nothing trained in or below them."""
    layers = decoder_layers(decoder)
    if layers is None:
        return []
    trained = [any(p.requires_grad for p in layer.parameters()) for layer in layers]
    first = trained.index(True) if True in trained else len(trained)
    children = list(decoder.children())
    behind = children[children.index(layers) + 1 :]  # the final norm
    not_below = {id(p) for module in [*layers, *behind] for p in module.parameters()}
    if any(p.requires_grad for p in decoder.parameters() if id(p) not in not_below):
        return []
    return list(layers[:first])


class _ReachedEnd(Exception):
    """The last frozen layer has run, and the layers above it need not."""


def run_trunk(layers: Sequence[nn.Module], decoder: Callable[[], Any]) -> Any:
    """Call ``decoder`` without gradients up to the last of ``layers``, and return that layer's output."""
    outputs: list[Any] = []

    def stop(module: nn.Module, args: Any, output: Any) -> None:
        outputs.append(output)
        raise _ReachedEnd

    handle = layers[-1].register_forward_hook(stop)
    try:
        with torch.no_grad():
            decoder()
    except _ReachedEnd:
        return outputs[0]
    finally:
        handle.remove()
    raise RuntimeError("the decoder did not run its frozen layers")


@contextmanager
def kept_trunk(layers: Sequence[nn.Module]) -> Iterator[list[Any]]:
    """Collect the output of the last of ``layers`` in a list whenever the decoder runs in the block."""
    outputs: list[Any] = []
    handles = [layer.register_forward_hook(lambda m, a, output: outputs.append(output)) for layer in layers[-1:]]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def replayed_trunk(layers: Sequence[nn.Module], output: Any) -> Iterator[None]:
    """Skip ``layers`` in calls of the decoder, which continue from ``output``, the last one's."""
    replaced = [vars(layer).get("forward") for layer in layers]  # a library may have wrapped a layer's
    for layer in layers:
        layer.forward = lambda *args, **keywords: output
    try:
        yield
    finally:
        for layer, forward in zip(layers, replaced, strict=True):
            del layer.forward
            if forward is not None:
                layer.forward = forward


def concatenated(first: Any, second: Any) -> Any:
    """Concatenate two outputs of a layer along the tokens: tensors (1, N, D), or tuples that start with one."""
    if isinstance(first, Tensor):
        return torch.cat([first, second], dim=1)
    return (concatenated(first[0], second[0]), *first[1:])
