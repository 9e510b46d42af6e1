"""Lock an output_dir for one run: two runs would cut each other's metrics and remove each other's checkpoints.

The lock is a POSIX record lock on ``.lock``. The system releases it when the process ends, even if it is killed. It
also works between machines on network file systems. Child processes do not inherit it; the flock lock of the filelock
library would stay with a forked worker after its run was killed. On a file system without locks, nothing is locked.
"""

from __future__ import annotations

import errno
import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from hypo_train.utils.errors import ConfigError

LOCK_FILE = ".lock"
_HELD = (errno.EACCES, errno.EAGAIN)


@contextmanager
def locked(output_dir: Path) -> Iterator[None]:
    """Hold the lock of ``output_dir`` inside the ``with`` block; the folder is created if needed.

    Raises:
        ConfigError: another run holds the lock, or the folder cannot be written to.
    """
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        file = (output_dir / LOCK_FILE).open("a")
    except OSError as error:
        raise ConfigError(f"output_dir={str(output_dir)!r} cannot be written to: {error.strerror}") from error
    with file:
        _lock(file, output_dir)
        yield


def require_unlocked(output_dir: Path) -> None:
    """Raise ConfigError if another run holds the lock of ``output_dir``. Creates no file."""
    try:
        file = (output_dir / LOCK_FILE).open("r+")
    except OSError:  # no run used this folder; another check reports a folder that cannot be written to
        return
    with file:
        _lock(file, output_dir)


def _lock(file: IO[str], output_dir: Path) -> None:
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _HELD:
            raise ConfigError(
                f"output_dir={str(output_dir)!r}: another run is using it: wait until that run has ended, or choose "
                "another folder"
            ) from error
