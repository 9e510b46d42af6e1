"""What ends a run before its time: numbers that are not finite, another process's end, or SIGTERM, SIGINT and
SIGHUP, which a terminal that is closed sends.

At a signal a run ends its step, saves and leaves; a second one stops it where it is.
"""

from __future__ import annotations

import signal
import sys
import threading
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from hypo_train.utils.safe_print import say

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class Stopped(Exception):
    """A run has saved and ended because it was told to; ``signal`` is what told it."""

    def __init__(self, number: int, checkpoint: Path) -> None:
        self.signal = signal.Signals(number)
        self.checkpoint = checkpoint
        super().__init__(
            f"stopped by {self.signal.name}, saved in {checkpoint}: --resume_from_checkpoint auto goes on from there"
        )

    def __reduce__(self) -> tuple[Any, ...]:
        """Between processes."""
        return Stopped, (int(self.signal), self.checkpoint)


class NotFiniteError(ArithmeticError):
    """NaN or infinity came out of a step; the message says which, and where its rows are."""


class ElsewhereError(RuntimeError):
    """Another process of the run has failed, and has said why itself."""


class StopRequest:
    """Whether a signal has asked the run in the ``with`` block to stop.

    Only a main thread is sent signals: in any other one nothing is ever requested. A signal that is ignored stays so: a
    script's background jobs have no part in a Ctrl-C.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            heard = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
            self._before = {number: signal.signal(number, self._request) for number in heard}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._restore()

    def _request(self, number: int, frame: FrameType | None) -> None:
        self.number = number
        self._restore()
        name = signal.Signals(number).name
        say(f"\n{name}: ending the step, then saving; once more to stop at once", sys.stderr)

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
