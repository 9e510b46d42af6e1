"""Split a batch into chunks of rows that pass through the LM head together. No chunk splits a pair or group."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Chunk:
    """Consecutive complete pairs and groups: their sequences in group order, and their rows."""

    sequences: slice
    rows: slice
    num_pairs: int

    def blocks(self, max_rows: int) -> Iterator[tuple[slice, slice]]:
        """Yield slices of at most ``max_rows`` of the chunk's rows, as positions in the layout and in the chunk."""
        for block in split(self.rows, max_rows):
            yield block, slice(block.start - self.rows.start, block.stop - self.rows.start)


def split(rows: slice, max_rows: int) -> Iterator[slice]:
    """Yield the fewest consecutive slices of at most ``max_rows``, of equal sizes but for one row.

    A small rest would use the GEMMs badly, and read the weight all the same. An empty slice is yielded once.
    """
    count = rows.stop - rows.start
    parts = max(1, -(-count // max_rows))
    for i in range(parts):
        yield slice(rows.start + count * i // parts, rows.start + count * (i + 1) // parts)


def chunks(lengths: Sequence[int], num_pairs: int, num_generations: int, max_rows: int) -> list[Chunk]:
    """Return chunks of complete groups with at most ``max_rows`` rows each. A larger group becomes one chunk.

    There are as few as possible, and the largest of them is as small as these groups allow.
    """
    fewest = _chunks(lengths, num_pairs, num_generations, max_rows)
    low, high = 0, max_rows  # the least bound that gives as few chunks is in (low, high]
    while len(fewest) > 1 and high - low > 1:
        middle = (low + high) // 2
        if len(_chunks(lengths, num_pairs, num_generations, middle)) == len(fewest):
            high = middle
        else:
            low = middle
    return _chunks(lengths, num_pairs, num_generations, high)


def _chunks(lengths: Sequence[int], num_pairs: int, num_generations: int, max_rows: int) -> list[Chunk]:
    """Fill one chunk after the other."""
    sizes = [2] * num_pairs + [num_generations] * ((len(lengths) - 2 * num_pairs) // num_generations)
    out: list[Chunk] = []
    seq = row = first_seq = first_row = pairs = 0
    for i, size in enumerate(sizes):
        rows = sum(lengths[seq : seq + size])
        if row > first_row and row + rows - first_row > max_rows:
            out.append(Chunk(slice(first_seq, seq), slice(first_row, row), pairs))
            first_seq, first_row, pairs = seq, row, 0
        seq, row, pairs = seq + size, row + rows, pairs + (i < num_pairs)
    if seq > first_seq:
        out.append(Chunk(slice(first_seq, seq), slice(first_row, row), pairs))
    return out
