"""One attempt to train, in a forked process, and how it ends: by itself, or by a signal at a chosen moment.

Importing takes seconds and a small run one: so the imports are done once, and each attempt is a fork of them.
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

TIME_LIMIT = 120.0  # seconds of an attempt; one that takes longer hangs
_LONGEST_NAME = 128


@dataclass(frozen=True)
class Death:
    """A signal, at the ``nth`` time that a moment is reached, or after ``seconds``."""

    signal: signal.Signals = signal.SIGKILL
    moment: str = ""
    nth: int = 1
    seconds: float | None = None


@dataclass(frozen=True)
class Outcome:
    """How an attempt ended: its exit status (minus the signal that ended it), the last moment it reached, its words."""

    status: int
    moment: str
    words: str
    seconds: float


def attempt(recipe: Path, death: Death | None = None, *, record: Path | None = None) -> Outcome:
    """``python -m hypo_train --config recipe --resume`` in a fork of this process.

    ``record``: a file for the number of times that each moment was reached.
    """
    last, words = mmap.mmap(-1, _LONGEST_NAME), recipe.with_suffix(".out")  # memory that both processes see
    words.write_text("", encoding="utf-8")  # a child may die before it says a word
    started = time.monotonic()
    child = os.fork()
    if child == 0:
        _run(recipe, words, _note(last, death, record))
    status = _wait(child, death, started)
    moment = last[:].rstrip(b"\0").decode()
    return Outcome(status, moment, words.read_text(encoding="utf-8", errors="replace"), time.monotonic() - started)


def _run(recipe: Path, words: Path, reached: Callable[..., None]) -> None:
    """The child's life."""
    status = 1
    try:
        descriptor = os.open(words, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
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
    """What is done at every moment."""
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


def _wait(child: int, death: Death | None, started: float) -> int:
    """The child's exit status; it is sent its signal in time, and killed where it hangs."""
    due = None if death is None else death.seconds
    while True:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        elapsed = time.monotonic() - started
        if death is not None and due is not None and elapsed >= due:
            os.kill(child, death.signal)
            due = None
        if elapsed > TIME_LIMIT:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            raise TimeoutError(f"an attempt with {death} has not ended after {TIME_LIMIT:g} seconds")
        time.sleep(0.002)
