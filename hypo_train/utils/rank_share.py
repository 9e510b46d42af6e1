"""Divide work among the ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class RankShare:
    """One rank's part of a list: every ``world_size``-th item, starting with item ``rank``.

    If the items are sorted by size, all ranks get about the same amount of work. The default is a single process.
    """

    rank: int = 0
    world_size: int = 1

    def select(self, items: Sequence[T]) -> list[T]:
        """Return this rank's items."""
        return list(items[self.rank :: self.world_size])

    def indices(self, num_items: int) -> range:
        """Return the indices of this rank's items in a list of ``num_items``."""
        return range(self.rank, num_items, self.world_size)


SINGLE_PROCESS = RankShare()
