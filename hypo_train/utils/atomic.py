"""Write files and folders so that a killed process, a full disk or a power failure never leaves half of one.

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
        shared: other processes may write the same path at the same time, so each needs its own temporary name.
            Without it, the temporary file that a killed process left is overwritten by the next write.

    Raises:
        OSError: the file cannot be written; ``path`` is as it was.
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
    """Replace ``folder`` by the one that ``write`` fills, atomically.

    ``write`` gets an empty folder with a temporary name. If ``folder`` is a link, the link is replaced and its target
    is left alone.

    Raises:
        OSError: the folder cannot be written. It is as it was, and so it is if ``write`` raises.
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
    """Remove ``folder``, renaming it first, so that a removal that is killed leaves no half folder under its name.

    If ``folder`` is a link, the link is removed and its target is left alone.
    """
    shutil.rmtree(_set_aside(folder))


def inherit_read_permission(path: Path) -> None:
    """Let everyone read (or write) the file ``path`` who may read (or write) its folder. Folders are left alone.

    safetensors creates files that only their owner can read, so another user's inference server could not load them.
    """
    if path.is_file():
        path.chmod(path.parent.stat().st_mode & 0o666)


def fsync(path: Path) -> None:
    """Flush a file, or a folder's list of names, to the disk."""
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
