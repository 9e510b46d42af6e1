"""What the processes of a run send each other within a pass: rows of their own, for the others to work on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


class Exchange:
    """All processes, by rank. Every method is called by all of them, in the same order.

    Tensors go from device to device; what Python has to know goes between the hosts, and waits for no accelerator.
    """

    def __init__(self) -> None:
        self.rank, self.count = dist.get_rank(), dist.get_world_size()
        self._hosts: Any = dist.new_group(backend="gloo")

    def gather(self, value: T) -> list[T]:
        """Every process's ``value``, which can be pickled, by rank."""
        values: list[Any] = [None] * self.count
        dist.all_gather_object(values, value, group=self._hosts)
        return values

    def of(self, owner: int, mine: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """``owner``'s tensor of this shape and dtype, on the device of ``mine``, which is this process's own."""
        theirs = mine.contiguous() if owner == self.rank else mine.new_empty(shape, dtype=dtype)
        if theirs.numel():
            dist.broadcast(theirs, src=owner)
        return theirs

    def add_up_at(self, owner: int, part: Tensor) -> Tensor:
        """The sum of every process's ``part``, in place, on ``owner``; on the others nothing that is of use."""
        if part.numel():
            dist.reduce(part, dst=owner)
        return part
