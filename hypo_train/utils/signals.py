"""Stop a run at a signal: SIGTERM, SIGINT (Ctrl-C) or SIGHUP (the terminal was closed).

At the first signal a run ends its step, saves a checkpoint and exits. A second one stops it at once.
"""

from __future__ import annotations

import signal
import sys
import threading
from types import FrameType
from typing import Any

from hypo_train.utils.safe_print import safe_print

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class StopRequest:
    """Context manager that stores the first signal in ``number`` (None before) instead of ending the process.

    Python delivers signals to the main thread only; in other threads this does nothing. Signals that are ignored stay
    ignored: Ctrl-C must not stop a script's background jobs.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self._previous_handlers: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            numbers = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
            self._previous_handlers = {number: signal.signal(number, self._handle) for number in numbers}
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.number = number
        self._restore()
        name = signal.Signals(number).name
        safe_print(f"\n{name}: finishing the step and saving; send it again to stop at once", sys.stderr)

    def _restore(self) -> None:
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)
        self._previous_handlers = {}
