"""Vocabulary parallelism: each rank of a process group holds and multiplies a part of the head's rows."""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class VocabShard:
    """This rank's part of the vocabulary: entries ``start`` to ``start + size`` of ``vocab_size``.

    ``largest`` is the size of the largest part. All ranks plan their chunks with it, so that their plans are equal.
    """

    group: dist.ProcessGroup
    start: int
    size: int
    largest: int
    vocab_size: int

    @classmethod
    def even(cls, vocab_size: int, group: dist.ProcessGroup | None = None) -> VocabShard:
        """Return this rank's part as ``torch.chunk`` and DTensor split: ⌈V/n⌉ entries, fewer on the last ranks."""
        group = dist.group.WORLD if group is None else group
        assert group is not None
        largest = -(-vocab_size // dist.get_world_size(group))
        start = min(vocab_size, dist.get_rank(group) * largest)
        return cls(group, start, min(largest, vocab_size - start), largest, vocab_size)

    def max_(self, x: Tensor) -> Tensor:
        """Replace ``x`` by its elementwise maximum over the ranks, and return it."""
        dist.all_reduce(x, dist.ReduceOp.MAX, group=self.group)
        return x

    def sum_(self, x: Tensor) -> Tensor:
        """Replace ``x`` by its sum over the ranks, and return it."""
        dist.all_reduce(x, dist.ReduceOp.SUM, group=self.group)
        return x
