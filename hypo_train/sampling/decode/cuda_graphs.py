"""Capture a decode step as a CUDA graph, which replaces thousands of small kernel launches by one.

A graph replays memory addresses. It therefore needs static buffers and reads the weights at the addresses of its
capture; it is captured again when `memory_layout` changes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import nn

from hypo_train.sampling.decode.branches import Branches
from hypo_train.sampling.merged_weights import is_adapted

_WIDTH_STEP = 512  # slots by which the graphs' widths differ, so that few of the slots of a step are empty
_SMALLEST_BUCKET = 128


def bucket(length: int) -> int:
    """Return the next of 128, 256, 512, ... tokens, so that calls repeat shapes and can reuse graphs."""
    return max(_SMALLEST_BUCKET, 1 << (length - 1).bit_length())


def memory_layout(model: nn.Module) -> tuple[Any, ...]:
    """Return what a graph depends on: the addresses of the weights and the active adapters."""
    layers: list[Any] = [module for module in model.modules() if is_adapted(module)]
    adapters = [
        (layer.disable_adapters, tuple(layer.active_adapters), tuple(layer.merged_adapters)) for layer in layers
    ]
    tensors = chain(model.parameters(), model.buffers())
    return tuple((tensor.data_ptr(), tensor.dtype, tensor.shape) for tensor in tensors), tuple(adapters)


class CapturedBranches:
    """Branches in static buffers, with a graph of their step for every width.

    Capturing draws tokens, so it happens before any prompt is loaded: call `branches.reset` before use.
    """

    def __init__(self, branches: Branches) -> None:
        self.branches = branches
        self.memory_layout = memory_layout(branches.model)
        self._widths = [*range(branches.L + _WIDTH_STEP, branches.slots, _WIDTH_STEP), branches.slots]
        pool = None
        self._replays: dict[int, Callable[[], None]] = {}
        for width in self._widths if branches.T > 1 else ():
            replay, pool = captured(partial(branches.step, width), rewind=branches.newest.zero_, pool=pool)
            self._replays[width] = replay

    def step(self, width: int) -> None:
        """Run `Branches.step` with at least `width` slots; the mask hides those beyond it."""
        self._replays[next(w for w in self._widths if w >= width)]()


def captured(step: Callable[[], None], *, rewind: Callable[[], Any], pool: Any) -> tuple[Callable[[], None], Any]:
    """Return a function that replays `step`, and its memory pool, which graphs can share if they never overlap.

    `step` runs twice before the capture, on a separate stream as PyTorch requires, each time after a `rewind`.

    Raises:
        RuntimeError: there is no CUDA device, or `step` cannot be captured.
    """
    kind = "cuda"
    # Autocast caches its copies of the weights, and a graph would keep reading the cached ones.
    uncached = partial(
        torch.autocast,
        kind,
        dtype=torch.get_autocast_dtype(kind),
        enabled=torch.is_autocast_enabled(kind),
        cache_enabled=False,
    )
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), uncached():
        for _ in range(2):
            rewind()
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    # thread_local: other threads, such as a logger's, may use the device during the capture.
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"), uncached():
        step()
    return graph.replay, graph.pool()
