"""Measure the seconds that a step spends in named functions, with hooks around them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import Any, NamedTuple

import torch

REST = "rest"  # time outside of all hooks


class Hook(NamedTuple):
    """A hook: time inside ``owner.attribute(...)`` counts as ``phase``."""

    phase: str
    owner: Any
    attribute: str


Clock = Callable[[], float]


@contextmanager
def timed_phases(hooks: Sequence[Hook], device: torch.device) -> Iterator[dict[str, float]]:
    """Yield the seconds of each phase of the block, and of ``REST``; complete when the block has ended.

    A phase inside another one counts as the outer one. On CUDA the boundaries are events on the stream; the host waits
    for them only at the end.
    """
    marks: list[tuple[str, Any, Any]] = []
    active = False

    def wrapped(phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal active
            if active:
                return function(*args, **kwargs)
            active, start = True, _mark(device)
            try:
                return function(*args, **kwargs)
            finally:
                active = False
                marks.append((phase, start, _mark(device)))

        return call

    undo = [
        _replace(hook.owner, hook.attribute, wrapped(hook.phase, getattr(hook.owner, hook.attribute))) for hook in hooks
    ]
    seconds: dict[str, float] = {}
    start = _mark(device)
    try:
        yield seconds
    finally:
        end = _mark(device)
        for restore in reversed(undo):
            restore()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        for phase, first, last in marks:
            seconds[phase] = seconds.get(phase, 0.0) + _between(first, last)
        seconds[REST] = _between(start, end) - sum(seconds.values())


def _replace(owner: Any, attribute: str, function: Callable[..., Any]) -> Callable[[], None]:
    """Set an instance attribute and return a function that restores the instance."""
    own = vars(owner).get(attribute)
    setattr(owner, attribute, function)
    return (lambda: delattr(owner, attribute)) if own is None else (lambda: setattr(owner, attribute, own))


def _mark(device: torch.device) -> Any:
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _between(first: Any, last: Any) -> float:
    return last - first if isinstance(first, float) else first.elapsed_time(last) / 1e3
