"""Measure the time of each phase of a step without making the host wait for the device."""

from __future__ import annotations

import time
from collections import defaultdict, deque
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

if TYPE_CHECKING:  # the report reads the phase names and should not load torch
    import torch

PHASES = ("data", "sample", "reward", "reference", "forward", "loss", "backward", "optimizer")  # in the order of a step
OTHER = "other"  # the rest of a step's time


class PhaseTimer:
    """Measure the mean seconds that a step spends in each phase.

    ``with timer.step():`` surrounds a step, ``with timer.phase("forward"):`` a part of it. Times are exclusive: a
    phase that starts inside another one pauses it. Phases outside of a step are not timed, so an evaluation may run
    the same code.

    On CUDA the times are events in the device's stream. A phase lasts from its first kernel to the first kernel of
    the next phase, including time in which the device waits for the host. Host work that overlaps the device's work
    on an earlier phase adds nothing.
    """

    def __init__(self, device: torch.device) -> None:
        self._clock: _Clock = _CudaClock(device) if device.type == "cuda" else _HostClock()
        self._open: list[str] = []  # phases of the current step: OTHER first, the innermost last
        self._marks: list[_Mark] = []  # marks of the current step
        self._ended: deque[list[_Mark]] = deque()  # marks of steps that the device may still be working on
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._steps = 0

    @contextmanager
    def step(self) -> Iterator[None]:
        """Time one optimizer step. Raises RuntimeError inside another step."""
        if self._open:
            raise RuntimeError("a step is timed already: steps do not nest")
        while self._ended and self._clock.passed(self._ended[0][-1].moment):
            self._add(self._ended.popleft())
        self._enter(OTHER)
        try:
            yield
        finally:
            self._leave()
            self._ended.append(self._marks)
            self._marks = []

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time one of ``PHASES``; a step may enter a phase several times. Raises ValueError for another name."""
        if name not in PHASES:
            raise ValueError(f"{name!r} is not a phase of a step: it must be one of {', '.join(PHASES)}")
        if not self._open:
            yield
            return
        self._enter(name)
        try:
            yield
        finally:
            self._leave()

    @property
    def running(self) -> str | None:
        """The innermost phase that is running, ``OTHER`` between phases; None outside of a step."""
        return self._open[-1] if self._open else None

    @property
    def steps(self) -> int:
        """The number of steps that ended since the last :meth:`read`."""
        return self._steps + len(self._ended)

    def read(self) -> dict[str, float]:
        """Return mean seconds a step and reset the timer: ``time/<phase>``, ``time/other`` and their sum ``time/step``.

        Only phases that ran are included; the result is empty if no step has ended. Waits for the last step to finish
        on the device.
        """
        if self._ended:
            self._clock.wait(self._ended[-1][-1].moment)
        while self._ended:
            self._add(self._ended.popleft())
        if not self._steps:
            return {}
        ran = [name for name in (*PHASES, OTHER) if name in self._seconds]
        means = {f"time/{name}": self._seconds[name] / self._steps for name in ran}
        means["time/step"] = sum(means.values())
        self._seconds.clear()
        self._steps = 0
        return means

    def _enter(self, name: str) -> None:
        self._open.append(name)
        self._marks.append(_Mark(name, self._clock.now()))

    def _leave(self) -> None:
        self._open.pop()
        self._marks.append(_Mark(self._open[-1] if self._open else OTHER, self._clock.now()))

    def _add(self, marks: list[_Mark]) -> None:
        for (name, start), (_, stop) in pairwise(marks):
            self._seconds[name] += self._clock.seconds(start, stop)
        self._clock.free(mark.moment for mark in marks)
        self._steps += 1


class _Mark(NamedTuple):
    """A time, and the phase that starts at it."""

    name: str
    moment: Any


class _Clock(Protocol):
    """A clock: times (``now``), and the seconds between two of them."""

    def now(self) -> Any: ...

    def passed(self, moment: Any) -> bool:
        """Return whether ``seconds`` up to ``moment`` can be read without waiting."""

    def wait(self, moment: Any) -> None: ...

    def seconds(self, start: Any, stop: Any) -> float: ...

    def free(self, moments: Iterator[Any]) -> None:
        """Allow ``moments`` to be reused."""


class _HostClock:
    def now(self) -> float:
        return time.perf_counter()

    def passed(self, moment: float) -> bool:
        return True

    def wait(self, moment: float) -> None:
        pass

    def seconds(self, start: float, stop: float) -> float:
        return stop - start

    def free(self, moments: Iterator[float]) -> None:
        pass


class _CudaClock:
    """A clock of events in the device's current stream. Events are reused."""

    def __init__(self, device: torch.device) -> None:
        import torch

        self._cuda = torch.cuda
        self._device = device
        self._free: list[torch.cuda.Event] = []

    def now(self) -> torch.cuda.Event:
        event = self._free.pop() if self._free else self._cuda.Event(enable_timing=True)
        event.record(self._cuda.current_stream(self._device))
        return event

    def passed(self, moment: torch.cuda.Event) -> bool:
        return moment.query()

    def wait(self, moment: torch.cuda.Event) -> None:
        moment.synchronize()

    def seconds(self, start: torch.cuda.Event, stop: torch.cuda.Event) -> float:
        return start.elapsed_time(stop) / 1e3

    def free(self, moments: Iterator[torch.cuda.Event]) -> None:
        self._free.extend(moments)
