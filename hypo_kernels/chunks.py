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
    """Yield consecutive slices of at most ``max_rows``. An empty slice is yielded once."""
    for start in range(rows.start, max(rows.stop, rows.start + 1), max_rows):
        yield slice(start, min(start + max_rows, rows.stop))


def chunks(lengths: Sequence[int], num_pairs: int, num_generations: int, max_rows: int) -> list[Chunk]:
    """Return chunks of complete groups with at most ``max_rows`` rows each. A larger group becomes one chunk."""
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
