"""A clock that replays recorded samples to pytest-benchmark.

pytest-benchmark times one function after another, but only programs that take turns see the same machine. So the
first test of a group measures all of the group, interleaved, and every test then replays its own samples: the timer
is a clock that only the target moves, by the next recorded sample. Its statistics,
``--benchmark-json`` and ``--benchmark-compare`` work on interleaved samples that way, through documented options
alone.
"""

from __future__ import annotations

from typing import Any


class ReplayClock:
    """A clock that shows the sum of the replayed samples, in seconds."""

    __name__ = "interleaved_samples"

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def replay(self, samples: list[float], benchmark: Any) -> None:
        """Run one round of ``benchmark``, which uses this clock as its timer, for each sample."""
        left = iter(samples)
        benchmark.pedantic(lambda: self._advance(next(left)), rounds=len(samples), iterations=1)

    def _advance(self, seconds: float) -> None:
        self.now += seconds


CLOCK = ReplayClock()
