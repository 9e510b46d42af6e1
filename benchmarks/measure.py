"""Measure time, taking turns, and peak memory."""

from __future__ import annotations

import gc
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch

R = TypeVar("R")
Step = Callable[[], Any]
FLUSH_BYTES = 2**28  # several times the L2 cache of any GPU
BUSY_CYCLES = 200_000  # about 0.1 ms of GPU time


def interleaved(
    steps: Mapping[str, Step],
    device: torch.device,
    *,
    before: Callable[[], None],
    seconds: float,
    min_rounds: int,
    max_rounds: int,
    warm_up_rounds: int = 0,
) -> dict[str, tuple[list[float], ...]]:
    """Return the seconds of every step: one sample of each step per round.

    On CUDA the time is the device's, and every step has two lists of samples: with a cold L2 cache, flushed
    before the sample, then with a hot one, straight after the step's own last run. On a CPU it has one.

    Clocks, heat and neighbours change from second to second; taking turns makes every step see the same
    machine. Each round starts with another step, and every other round runs backwards, so that no step
    always follows the same one. Rounds go on for ``seconds`` but stay within their limits. ``before`` runs
    outside the clock.
    """
    timers = _cuda_timers(device) if device.type == "cuda" else (_seconds,)
    names = list(steps)
    samples: dict[str, tuple[list[float], ...]] = {name: tuple([] for _ in timers) for name in names}
    start = time.perf_counter()
    gc.collect()
    gc.disable()
    try:
        for turn in range(-warm_up_rounds, max_rounds):
            if turn >= min_rounds and time.perf_counter() - start > seconds:
                break
            order = names[turn % len(names) :] + names[: turn % len(names)]
            for name in order if turn % 2 == 0 else reversed(order):
                for timed, kept in zip(timers, samples[name], strict=True):
                    before()
                    sample = timed(steps[name])
                    if turn >= 0:
                        kept.append(sample)
    finally:
        gc.enable()
    return samples


def _seconds(step: Step) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def _cuda_timers(device: torch.device) -> tuple[Callable[[Step], float], ...]:
    """Return timers for a cold and a hot cache. Both keep the device busy while the step is launched."""
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device)
    return _cuda_timer(flush.zero_), _cuda_timer(lambda: torch.cuda._sleep(BUSY_CYCLES))


def _cuda_timer(occupy: Callable[[], Any]) -> Callable[[Step], float]:
    def timed(step: Step) -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        occupy()
        start.record()
        step()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    return timed


def peak_extra_bytes(step: Callable[[], R], device: torch.device) -> tuple[R, int]:
    """Return the result of ``step`` and the peak memory in bytes beyond what was held before it."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        held = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        result = step()
        torch.cuda.synchronize(device)
        return result, torch.cuda.max_memory_allocated(device) - held
    return _cpu_peak(step)


def _cpu_peak(step: Callable[[], R]) -> tuple[R, int]:
    """Compute the peak from the profiler's record of every block that torch's CPU allocator allocates and frees.

    The record includes library operators and compiled code, unlike a dispatch mode, and excludes the allocator's
    caches, unlike the resident set size.
    """
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        result = step()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        profile.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    changes = [(event["ts"], event["args"]["Bytes"]) for event in events if event.get("name") == "[memory]"]
    held = peak = 0
    for _, change in sorted(changes, key=lambda entry: entry[0]):
        held += change
        peak = max(peak, held)
    return result, peak


def median(samples: list[float]) -> float:
    return statistics.median(samples)


def spread(samples: list[float]) -> float:
    """Return the interquartile range."""
    if len(samples) < 2:
        return 0.0
    low, _, high = statistics.quantiles(samples, n=4, method="inclusive")
    return high - low
