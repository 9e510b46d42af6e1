"""The online prompts of a step: a random part of its rows, whose prompts get samples (Algorithm 1's online batch).

Their number follows systematic sampling. The rows of all steps stand in one line. Every ``1 / fraction``-th place is
marked, from a random start on. A step has as many online prompts as marks:

    fraction = 1/4    | row row row | row row row | row row row | row row row | ...
    marks                   ^               ^               ^                 ^
    online prompts           1             1             1             0

On average over the start, a step has ``fraction`` times as many online prompts as rows, and two steps of as many rows
differ by one at most. Which rows they are is drawn uniformly, so each row is online with the probability ``fraction``.
"""

from __future__ import annotations

import math
import random


def num_online(fraction: float, first_row: int, num_rows: int, seed: int) -> int:
    """Return the number of online prompts of a step.

    Args:
        fraction: share of the rows that are online, above 0 and at most 1.
        first_row: rows of all earlier steps.
        num_rows: rows of the step.
        seed: the seed of the run, which sets the random start.
    """
    if fraction == 1:
        return num_rows
    start = random.Random(f"{seed},online").random()
    return math.floor(fraction * (first_row + num_rows) + start) - math.floor(fraction * first_row + start)


def online_first(rows: list[int], num_online: int, step: int, seed: int) -> list[int]:
    """Return ``rows`` with ``num_online`` random ones first; within the two parts, the rows keep their order."""
    if num_online == len(rows):
        return rows
    chosen = set(random.Random(f"{seed},online,{step}").sample(range(len(rows)), num_online))
    online = [row for i, row in enumerate(rows) if i in chosen]
    return online + [row for i, row in enumerate(rows) if i not in chosen]
