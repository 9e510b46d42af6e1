"""A decode step as a CUDA graph: the thousands of small launches of a step become one.

A graph replays addresses. So it lives with static buffers, reads the weights wherever they were when it was
captured, and is captured again when `fingerprint` says that they are elsewhere.
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

_WIDTH_STEP = 512  # slots; each graph attends to so many more, and no step to many that are still empty
_SMALLEST_BUCKET = 128


def bucket(length: int) -> int:
    """The next of 128, 256, 512, ... tokens: shapes repeat from call to call, and so do graphs."""
    return max(_SMALLEST_BUCKET, 1 << (length - 1).bit_length())


def fingerprint(model: nn.Module) -> tuple[Any, ...]:
    """Where the weights are, and which adapters a forward pass would apply: what a graph has built in."""
    layers: list[Any] = [module for module in model.modules() if is_adapted(module)]
    adapters = [
        (layer.disable_adapters, tuple(layer.active_adapters), tuple(layer.merged_adapters)) for layer in layers
    ]
    tensors = chain(model.parameters(), model.buffers())
    return tuple((tensor.data_ptr(), tensor.dtype, tensor.shape) for tensor in tensors), tuple(adapters)


class CapturedBranches:
    """Branches in buffers that stay, and their step as one graph for every width.

    Built before any prompt is loaded, since warming up draws tokens: `branches.reset` before use.
    """

    def __init__(self, branches: Branches) -> None:
        self.branches = branches
        self.fingerprint = fingerprint(branches.model)
        self._widths = [*range(branches.L + _WIDTH_STEP, branches.slots, _WIDTH_STEP), branches.slots]
        pool = None
        self._replays: dict[int, Callable[[], None]] = {}
        for width in self._widths if branches.T > 1 else ():
            replay, pool = captured(partial(branches.step, width), rewind=branches.newest.zero_, pool=pool)
            self._replays[width] = replay

    def step(self, width: int) -> None:
        """`Branches.step`, attending to `width` slots or a few more that are hidden."""
        self._replays[next(w for w in self._widths if w >= width)]()


def captured(step: Callable[[], None], *, rewind: Callable[[], Any], pool: Any) -> tuple[Callable[[], None], Any]:
    """`step` as a graph, and the memory pool that graphs which never run at the same time may share.

    `step` runs twice before it is captured, on a stream of its own as PyTorch asks, after a `rewind` each.

    Raises:
        RuntimeError: there is no CUDA device, or `step` does what a graph cannot hold.
    """
    kind = "cuda"
    # Autocast caches its copies of the weights, and a graph would read the copy of the day of its capture.
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
    # thread_local: what a logger's thread does on the device meanwhile is no business of the capture.
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"), uncached():
        step()
    return graph.replay, graph.pool()
