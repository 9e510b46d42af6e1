"""How much of the benchmarks runs: a smoke test, a telling part, or everything."""

from __future__ import annotations

from enum import Enum


class Grid(Enum):
    """The part that runs; ``--quick`` and ``--full`` choose it."""

    QUICK = "quick"  # every path, on tiny shapes: two or three minutes
    SHORT = "short"  # the most telling groups, in ten minutes on two cores
    FULL = "full"  # hours on a CPU
