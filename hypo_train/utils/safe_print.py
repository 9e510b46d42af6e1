"""Print without failing if the pipe or the terminal was closed, or the disk is full."""

from __future__ import annotations

import errno
import os
import sys
from typing import TextIO

_READER_GONE = {errno.EPIPE, errno.EIO}  # a closed pipe, a closed terminal


def safe_print(text: str, stream: TextIO | None = None) -> None:
    """Print a line to ``stream`` (default: stdout) and flush it. A line that cannot be written is dropped."""
    stream = stream or sys.stdout
    try:
        print(text, file=stream, flush=True)
    except OSError as error:
        if error.errno in _READER_GONE:
            _redirect_to_devnull(stream)


def _redirect_to_devnull(stream: TextIO) -> None:
    """Keep the buffered text from failing again when the interpreter flushes the stream at exit."""
    try:
        descriptor = stream.fileno()
    except OSError:
        return
    devnull = os.open(os.devnull, os.O_WRONLY)
    os.dup2(devnull, descriptor)
    os.close(devnull)
