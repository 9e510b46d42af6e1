"""Which rows a step trains on."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import lru_cache
from itertools import chain

MEGA_BATCH_AT_MOST, MEGA_BATCHES_AT_LEAST = 50, 4  # batches in one, and how many an epoch has; transformers' choice


def batches_per_epoch(num_rows: int, batch_size: int) -> int:
    """Batches in one pass: whole ones only, unless the rows do not fill a single one."""
    return max(1, num_rows // batch_size)


def batch_indices(
    num_rows: int, batch_size: int, step: int, seed: int, lengths: tuple[int, ...] | None = None
) -> list[int]:
    """The rows of batch number ``step``, counted from 0 over all epochs.

    A pure function: a resumed run needs no cursor. Each epoch has its own order, drawn from (seed, epoch), and
    leaves out what does not fill its last batch. With ``lengths``, one a row, a batch holds rows of like length,
    and the batches come in random order. Raises ``ValueError`` when there is no row.
    """
    if num_rows < 1:
        raise ValueError(f"num_rows={num_rows}: there is nothing to train on")
    epoch, place = divmod(step, batches_per_epoch(num_rows, batch_size))
    return list(_epoch_order(num_rows, batch_size, seed, epoch, lengths)[place * batch_size : (place + 1) * batch_size])


def longest_first(indices: Sequence[int], lengths: Sequence[int]) -> list[int]:
    """``indices`` by the length of their rows.

    A step whose rows are cut into micro-batches in this order trains on the same rows with less padding, and
    runs out of memory, if it does, at once.
    """
    return sorted(indices, key=lambda i: -lengths[i])


@lru_cache(maxsize=2)  # an epoch asks for its order once a step
def _epoch_order(
    num_rows: int, batch_size: int, seed: int, epoch: int, lengths: tuple[int, ...] | None
) -> tuple[int, ...]:
    rng = random.Random(f"{seed},{epoch}")
    order = list(range(num_rows))
    rng.shuffle(order)
    return tuple(order if lengths is None else _grouped(order, batch_size, lengths, rng))


def _grouped(order: list[int], batch_size: int, lengths: Sequence[int], rng: random.Random) -> list[int]:
    """A random order whose batches are of like length, in the way of transformers' ``group_by_length``.

    Rows are sorted within mega-batches of the random order, so that who shares a batch still changes every epoch.
    """
    count = batches_per_epoch(len(order), batch_size)
    mega = batch_size * max(1, min(count // MEGA_BATCHES_AT_LEAST, MEGA_BATCH_AT_MOST))
    kept = order[: count * batch_size]  # after the sorting, what does not fill a batch would always be the shortest
    parts = [longest_first(kept[start : start + mega], lengths) for start in range(0, len(kept), mega)]
    batches = [part[start : start + batch_size] for part in parts for start in range(0, len(part), batch_size)]
    rng.shuffle(batches)
    return list(chain.from_iterable(batches))
