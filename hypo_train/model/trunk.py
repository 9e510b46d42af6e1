"""The frozen layers below the trained ones: run once for policy and reference, which differ above them only."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def decoder_layers(decoder: nn.Module) -> nn.ModuleList | None:
    """The decoder's list of layers, where it has one."""
    return next((m for m in decoder.children() if isinstance(m, nn.ModuleList)), None)


def frozen_layers(decoder: nn.Module) -> list[nn.Module]:
    """The layers, from the embeddings up, below which nothing is trained; none where the embeddings are trained."""
    layers = decoder_layers(decoder)
    if layers is None:
        return []
    trained = [any(p.requires_grad for p in layer.parameters()) for layer in layers]
    first = trained.index(True) if True in trained else len(trained)
    above = {id(p) for module in [*layers, *_after(decoder, layers)] for p in module.parameters()}
    if any(p.requires_grad for p in decoder.parameters() if id(p) not in above):
        return []
    return list(layers[:first])


def _after(decoder: nn.Module, layers: nn.ModuleList) -> Sequence[nn.Module]:
    """The decoder's children behind its layers: the final norm."""
    children = list(decoder.children())
    return children[children.index(layers) + 1 :]


class _Reached(Exception):
    """The last frozen layer's output is there; what lies above it need not run."""


def run_trunk(layers: Sequence[nn.Module], decoder: Callable[[], Any]) -> Any:
    """The output of the last of ``layers`` in a call of ``decoder``, without gradients; nothing above it runs."""
    outputs: list[Any] = []

    def stop(module: nn.Module, args: Any, output: Any) -> None:
        outputs.append(output)
        raise _Reached

    handle = layers[-1].register_forward_hook(stop)
    try:
        with torch.no_grad():
            decoder()
    except _Reached:
        return outputs[0]
    finally:
        handle.remove()
    raise RuntimeError("the decoder did not run its frozen layers")


@contextmanager
def kept_trunk(layers: Sequence[nn.Module]) -> Iterator[list[Any]]:
    """A list that gets the output of the last of ``layers`` when the decoder is called; no ``layers``, no output."""
    outputs: list[Any] = []
    handles = [layer.register_forward_hook(lambda m, a, output: outputs.append(output)) for layer in layers[-1:]]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def replayed_trunk(layers: Sequence[nn.Module], output: Any) -> Iterator[None]:
    """Calls of the decoder skip ``layers`` and go on from ``output``, what the last of them gave."""
    own = [vars(layer).get("forward") for layer in layers]  # a library may have wrapped a layer's
    for layer in layers:
        layer.forward = lambda *args, **keywords: output
    try:
        yield
    finally:
        for layer, forward in zip(layers, own, strict=True):
            del layer.forward
            if forward is not None:
                layer.forward = forward


def joined(first: Any, second: Any) -> Any:
    """Outputs of a layer, tensors (1, N, D) or tuples that start with one, for the tokens of both."""
    if isinstance(first, Tensor):
        return torch.cat([first, second], dim=1)
    return (joined(first[0], second[0]), *first[1:])
