"""Where the time of a step goes, phase by phase, without making the host wait for the device."""

from __future__ import annotations

import time
from collections import defaultdict, deque
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, NamedTuple, Protocol

import torch

from hypo_train.metrics.phases import OTHER, PHASES


class PhaseTimer:
    """Mean seconds that a step spends in each phase.

    ``with timer.step():`` surrounds a step, ``with timer.phase("forward"):`` a part of it. Times are exclusive: a
    phase entered inside another one pauses it. Outside of a step nothing is timed, so an evaluation may pass
    through the same code.

    On CUDA the moments are events in the device's stream: a phase has the time from its first kernel to the next
    phase's, in which the device may have waited for the host. Work that the host does while the device is busy
    with an earlier phase costs nothing, and is shown as that.
    """

    def __init__(self, device: torch.device) -> None:
        self._clock: _Clock = _CudaClock(device) if device.type == "cuda" else _HostClock()
        self._open: list[str] = []  # of the step that runs: OTHER, then its phases, the innermost last
        self._marks: list[_Mark] = []  # of that step
        self._ended: deque[list[_Mark]] = deque()  # steps that the device may not have finished
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._steps = 0

    @contextmanager
    def step(self) -> Iterator[None]:
        """One optimizer step."""
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
        """One of ``PHASES``, as often in a step as need be."""
        if name not in PHASES:
            raise ValueError(f"{name!r} is no phase of a step: it must be one of {', '.join(PHASES)}")
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
        """The innermost phase that runs, ``OTHER`` between two of them; None outside of a step."""
        return self._open[-1] if self._open else None

    @property
    def steps(self) -> int:
        """How many steps have ended since the last reading."""
        return self._steps + len(self._ended)

    def read(self) -> dict[str, float]:
        """Mean seconds a step: ``time/step`` in all, ``time/<phase>`` of the phases that ran, ``time/other`` of the
        rest. Waits for the last step to finish; the timer starts anew. Empty where no step has ended."""
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
    """A moment, and what runs from then on."""

    name: str
    moment: Any


class _Clock(Protocol):
    """Moments, and the seconds between two of them."""

    def now(self) -> Any: ...

    def passed(self, moment: Any) -> bool:
        """Whether ``seconds`` up to this moment are known without a wait."""

    def wait(self, moment: Any) -> None: ...

    def seconds(self, start: Any, stop: Any) -> float: ...

    def free(self, moments: Iterator[Any]) -> None:
        """These are asked for no more."""


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
    """Events of the device's current stream. They are reused: those in flight are a step's or two."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._free: list[torch.cuda.Event] = []

    def now(self) -> torch.cuda.Event:
        event = self._free.pop() if self._free else torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def passed(self, moment: torch.cuda.Event) -> bool:
        return moment.query()

    def wait(self, moment: torch.cuda.Event) -> None:
        moment.synchronize()

    def seconds(self, start: torch.cuda.Event, stop: torch.cuda.Event) -> float:
        return start.elapsed_time(stop) / 1e3

    def free(self, moments: Iterator[torch.cuda.Event]) -> None:
        self._free.extend(moments)
