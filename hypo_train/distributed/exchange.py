"""Exchange tensors between ranks within a pass, so that each rank can compute with the rows of the others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


class RowExchange:
    """All ranks call every method, in the same order.

    Tensors go from device to device. Python objects go from host to host, without waiting for an accelerator.
    """

    def __init__(self) -> None:
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self._host_group: Any = dist.new_group(backend="gloo")

    def gather(self, value: T) -> list[T]:
        """Return the ``value`` of every rank, by rank. Values are pickled."""
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self._host_group)
        return values

    def broadcast(self, owner: int, tensor: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Return the ``tensor`` of rank ``owner``, which has this shape and dtype, on the device of our ``tensor``."""
        received = tensor.contiguous() if owner == self.rank else tensor.new_empty(shape, dtype=dtype)
        if received.numel():
            dist.broadcast(received, src=owner)
        return received

    def reduce(self, owner: int, tensor: Tensor) -> Tensor:
        """Sum the ranks' tensors in place on rank ``owner``; on the other ranks the result is undefined."""
        if tensor.numel():
            dist.reduce(tensor, dst=owner)
        return tensor
