"""A folder that is on the disk with all that belongs in it, or not there at all; one of before stays until then."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError

from hypo_train.checkpoint.files import CheckpointError, flush, open_as_its_folder, set_aside


def put_whole(folder: Path, write: Callable[[Path], None], *, advice: str = "") -> Path:
    """``folder``, holding what ``write`` writes into the empty one that it is given.

    Raises:
        CheckpointError: it cannot be written, as on a full disk; the message ends with ``advice``.
    """
    unfinished, replaced = (folder.with_name(f"{folder.name}.{end}") for end in ("tmp", "old.tmp"))
    shutil.rmtree(unfinished, ignore_errors=True)  # what a killed one left behind
    try:
        unfinished.mkdir(parents=True)
        write(unfinished)
        for path in unfinished.iterdir():
            open_as_its_folder(path)
        for path in (*unfinished.iterdir(), unfinished):
            flush(path)
        if folder.exists():
            shutil.rmtree(replaced, ignore_errors=True)
            set_aside(folder)
        unfinished.rename(folder)
        flush(folder.parent)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot save {folder}: {error}{advice}") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    shutil.rmtree(replaced, ignore_errors=True)
    return folder
