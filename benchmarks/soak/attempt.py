"""Train in a forked process that a signal may end at a chosen moment.

Imports take longer than a small run, so they are done once and each attempt is a fork of this process.
"""

from __future__ import annotations

import json
import mmap
import os
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.soak.moments import watch
from hypo_train.cli import main

STALL_LIMIT = 120.0  # seconds without a new moment; then the attempt hangs
_LONGEST_NAME = 128


@dataclass(frozen=True)
class Death:
    """A signal to send when a moment is reached for the ``nth`` time, or after ``seconds``."""

    signal: signal.Signals = signal.SIGKILL
    moment: str = ""
    nth: int = 1
    seconds: float | None = None


@dataclass(frozen=True)
class Outcome:
    """How an attempt ended: exit status (minus the signal that ended it), last moment, output, duration."""

    status: int
    moment: str
    output: str
    seconds: float


def attempt(recipe: Path, death: Death | None = None, *, record: Path | None = None) -> Outcome:
    """Run ``python -m hypo_train --config recipe --resume`` in a fork of this process.

    ``record``: a file that gets the number of times that each moment was reached.
    """
    last, output = mmap.mmap(-1, _LONGEST_NAME), recipe.with_suffix(".out")  # memory that both processes share
    output.write_text("", encoding="utf-8")  # the child may die before it prints anything
    started = time.monotonic()
    child = os.fork()
    if child == 0:
        _run(recipe, output, _note(last, death, record))
    status = _wait(child, death, started, last)
    moment = last[:].rstrip(b"\0").decode()
    return Outcome(status, moment, output.read_text(encoding="utf-8", errors="replace"), time.monotonic() - started)


def _run(recipe: Path, output: Path, reached: Callable[..., None]) -> None:
    """Train in the child process and exit."""
    status = 1
    try:
        descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, sys.stdout.fileno())
        os.dup2(descriptor, sys.stderr.fileno())
        watch(reached)
        status = main(["--config", str(recipe), "--resume"])
        reached("end")
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _note(last: mmap.mmap, death: Death | None, record: Path | None) -> Callable[..., None]:
    """Return the function that is called at every moment."""
    counts: Counter[str] = Counter()

    def reached(moment: str, harm: Callable[[], None] | None = None) -> None:
        counts[moment] += 1
        last[:] = moment.encode()[:_LONGEST_NAME].ljust(_LONGEST_NAME, b"\0")
        if death is not None and moment == death.moment and counts[moment] == death.nth:
            if harm is not None and death.signal == signal.SIGKILL:
                harm()
            os.kill(os.getpid(), death.signal)
        if moment == "end" and record is not None:
            record.write_text(json.dumps(counts), encoding="utf-8")

    return reached


def _wait(child: int, death: Death | None, started: float, last: mmap.mmap) -> int:
    """Return the child's exit status; send it its signal on time, and kill it if it hangs."""
    due = None if death is None else death.seconds
    moment, reached_at = last[:], started
    while True:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        elapsed = time.monotonic() - started
        if death is not None and due is not None and elapsed >= due:
            os.kill(child, death.signal)
            due = None
        if last[:] != moment:
            moment, reached_at = last[:], time.monotonic()
        if time.monotonic() - reached_at > STALL_LIMIT:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            raise TimeoutError(f"an attempt with {death} has reached no new moment for {STALL_LIMIT:g} seconds")
        time.sleep(0.002)
