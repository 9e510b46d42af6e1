"""A vocabulary spread over the ranks of a process group: each rank multiplies its own rows of the head."""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class VocabShard:
    """This rank's share of the vocabulary: entries ``start`` to ``start + size`` of ``vocab_size``.

    ``largest`` is the largest share of any rank: all ranks plan their chunks with it, and so alike.
    """

    group: dist.ProcessGroup
    start: int
    size: int
    largest: int
    vocab_size: int

    @classmethod
    def even(cls, vocab_size: int, group: dist.ProcessGroup | None = None) -> VocabShard:
        """``torch.chunk``'s and DTensor's split: ⌈V/n⌉ entries a rank, fewer or none for the last ones."""
        group = dist.group.WORLD if group is None else group
        assert group is not None
        largest = -(-vocab_size // dist.get_world_size(group))
        start = min(vocab_size, dist.get_rank(group) * largest)
        return cls(group, start, min(largest, vocab_size - start), largest, vocab_size)

    def max_(self, x: Tensor) -> Tensor:
        """The elementwise maximum over the ranks, in place."""
        dist.all_reduce(x, dist.ReduceOp.MAX, group=self.group)
        return x

    def sum_(self, x: Tensor) -> Tensor:
        """The sum over the ranks, in place."""
        dist.all_reduce(x, dist.ReduceOp.SUM, group=self.group)
        return x
