"""Lines for whoever watches a run, who may have left: a closed pipe, a lost terminal or a full disk costs no run."""

from __future__ import annotations

import errno
import os
import sys
from typing import TextIO

_GONE = {errno.EPIPE, errno.EIO}  # a reader has left, a terminal has hung up: neither comes back


def say(text: str, stream: TextIO | None = None) -> None:
    """Print a line at once, to ``stream`` or stdout; one that nobody can be told is dropped."""
    stream = stream or sys.stdout
    try:
        print(text, file=stream, flush=True)
    except OSError as error:
        if error.errno in _GONE:
            _to_nowhere(stream)


def _to_nowhere(stream: TextIO) -> None:
    """What still waits to be written would fail again at the interpreter's end."""
    try:
        descriptor = stream.fileno()
    except OSError:
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, descriptor)
    os.close(nowhere)
