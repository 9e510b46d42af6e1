"""Write files and folders atomically: a killed process, a full disk or a power failure leaves no incomplete one.

Each is written under a temporary name in the same folder, flushed to the disk and renamed. Readers see the old
content or the new content.
"""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path

TEMPORARY = ".tmp"  # the ending of every temporary name


def write_file(path: Path, content: str | bytes, *, shared: bool = False) -> None:
    """Write ``content`` (text as UTF-8) to ``path``, atomically.

    Args:
        shared: other processes may write the same path at the same time, so each uses a random temporary name.
            Otherwise the temporary name is fixed, and the next write overwrites what a killed process left.

    Raises:
        OSError: the file cannot be written; ``path`` is unchanged.
    """
    token = f".{secrets.token_hex(8)}" if shared else ""
    temporary = path.with_name(f"{path.name}{token}{TEMPORARY}")
    try:
        with temporary.open("wb") as file:
            file.write(content if isinstance(content, bytes) else content.encode())
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_folder(folder: Path, write: Callable[[Path], None]) -> None:
    """Replace ``folder`` atomically by a new folder that ``write`` fills.

    ``write`` gets an empty folder with a temporary name. If ``folder`` is a link, the link is replaced and its target
    is unchanged. If ``write`` raises, ``folder`` is unchanged.

    Raises:
        OSError: the folder cannot be written; it is unchanged.
    """
    temporary, replaced = folder.with_name(folder.name + TEMPORARY), _replaced_name(folder)
    shutil.rmtree(temporary, ignore_errors=True)  # left by a killed process
    try:
        temporary.mkdir(parents=True)
        write(temporary)
        for path in temporary.iterdir():
            inherit_read_permission(path)
            fsync(path)
        fsync(temporary)
        if os.path.lexists(folder):
            shutil.rmtree(replaced, ignore_errors=True)
            _set_aside(folder)
        temporary.rename(folder)
        fsync(folder.parent)
    except (Exception, KeyboardInterrupt):
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    shutil.rmtree(replaced, ignore_errors=True)


def remove_folder(folder: Path) -> None:
    """Remove ``folder``. It is renamed first, so that a killed removal leaves no incomplete folder under its name.

    If ``folder`` is a link, the link is removed and its target is unchanged.
    """
    shutil.rmtree(_set_aside(folder))


def inherit_read_permission(path: Path) -> None:
    """Give the file ``path`` the read and write permissions of its folder. Does nothing if ``path`` is a folder.

    safetensors creates files that only their owner can read, so another user's inference server could not load them.
    """
    if path.is_file():
        path.chmod(path.parent.stat().st_mode & 0o666)


def fsync(path: Path) -> None:
    """Flush a file, or the directory entries of a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _replaced_name(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.old{TEMPORARY}")


def _set_aside(folder: Path) -> Path:
    aside = _replaced_name(folder)
    if not folder.is_symlink():
        return folder.rename(aside)
    aside.mkdir()
    folder.unlink()
    return aside
