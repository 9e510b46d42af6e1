"""The order of the training rows: which rows each batch holds."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import lru_cache
from itertools import chain

# Batches in a mega-batch, and mega-batches in an epoch, as in transformers.
MEGA_BATCH_AT_MOST, MEGA_BATCHES_AT_LEAST = 50, 4


def batches_per_epoch(num_rows: int, batch_size: int, smallest: int = 1) -> int:
    """Return the number of batches in an epoch, at least one.

    The rows that do not fill the last batch are a smaller batch if there are at least ``smallest`` of them; otherwise
    the epoch leaves them out.
    """
    full, rest = divmod(num_rows, batch_size)
    return max(1, full + (rest >= smallest))


def rows_per_epoch(num_rows: int, batch_size: int, smallest: int = 1) -> int:
    """Return the number of rows in an epoch, without the rows that it leaves out."""
    return min(num_rows, batches_per_epoch(num_rows, batch_size, smallest) * batch_size)


def batch_indices(
    num_rows: int,
    batch_size: int,
    step: int,
    seed: int,
    lengths: tuple[int, ...] | None = None,
    smallest: int = 1,
) -> list[int]:
    """Return the row indices of batch number ``step``, counted from 0 over all epochs.

    The result depends on the arguments only, so a resumed run needs no stored position. Each epoch is a permutation
    drawn from (seed, epoch), whose last batch may be smaller (see :func:`batches_per_epoch`). With ``lengths``, one for
    each row, a batch holds rows of similar length, and the batches come in random order; the smaller one is the last,
    of rows drawn at random.

    Raises:
        ValueError: there are no rows.
    """
    if num_rows < 1:
        raise ValueError(f"num_rows={num_rows}: there is nothing to train on")
    epoch, batch = divmod(step, batches_per_epoch(num_rows, batch_size, smallest))
    return list(_epoch_order(num_rows, batch_size, seed, epoch, lengths)[batch * batch_size : (batch + 1) * batch_size])


def longest_first(indices: Sequence[int], lengths: Sequence[int]) -> list[int]:
    """Return ``indices``, sorted so that the longest row comes first.

    Micro-batches that are cut in this order have less padding, and a run that needs too much memory fails at once.
    """
    return sorted(indices, key=lambda i: -lengths[i])


@lru_cache(maxsize=2)  # every step of an epoch needs its order
def _epoch_order(
    num_rows: int, batch_size: int, seed: int, epoch: int, lengths: tuple[int, ...] | None
) -> tuple[int, ...]:
    rng = random.Random(f"{seed},{epoch}")
    order = list(range(num_rows))
    rng.shuffle(order)
    return tuple(order if lengths is None else _grouped(order, batch_size, lengths, rng))


def _grouped(order: list[int], batch_size: int, lengths: Sequence[int], rng: random.Random) -> list[int]:
    """Return a random order whose batches have rows of similar length, like transformers' ``group_by_length``.

    Rows are sorted within mega-batches of the random order, so that the rows of a batch change every epoch.
    """
    full = len(order) // batch_size
    mega = batch_size * max(1, min(full // MEGA_BATCHES_AT_LEAST, MEGA_BATCH_AT_MOST))
    kept = order[: full * batch_size]  # cut before sorting, else the shortest rows would always be the last batch
    parts = [longest_first(kept[start : start + mega], lengths) for start in range(0, len(kept), mega)]
    batches = [part[start : start + batch_size] for part in parts for start in range(0, len(part), batch_size)]
    rng.shuffle(batches)
    return [*chain.from_iterable(batches), *order[len(kept) :]]
