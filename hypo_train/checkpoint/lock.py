"""One run at a time in an output_dir: two would cut each other's metrics and remove each other's checkpoints.

The lock is the system's on ``.lock``, which a process holds until it ends, however it ends: a kill leaves none. It is a
POSIX record lock, which network file systems pass on to other machines and no child process inherits. A file system
that has no locks leaves the run without one.
"""

from __future__ import annotations

import errno
import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from hypo_train.config import ConfigError

LOCK_FILE = ".lock"
_HELD = (errno.EACCES, errno.EAGAIN)


@contextmanager
def locked(output_dir: Path) -> Iterator[None]:
    """Keep other runs out of ``output_dir``, made if need be.

    Raises:
        ConfigError: one is at work there, or no file can be made.
    """
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        file = (output_dir / LOCK_FILE).open("a")
    except OSError as error:
        raise ConfigError(f"output_dir={str(output_dir)!r} cannot be written to: {error.strerror}") from error
    with file:
        _take(file, output_dir)
        yield


def require_unlocked(output_dir: Path) -> None:
    """Raises ConfigError: a run is at work in ``output_dir``. Makes nothing."""
    try:
        file = (output_dir / LOCK_FILE).open("r+")
    except OSError:  # there has been no run, or the folder cannot be written, which is somebody else's to say
        return
    with file:
        _take(file, output_dir)


def _take(file: IO[str], output_dir: Path) -> None:
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _HELD:
            raise ConfigError(
                f"output_dir={str(output_dir)!r}: another run is at work there: wait until it has ended, or choose "
                "another folder"
            ) from error
