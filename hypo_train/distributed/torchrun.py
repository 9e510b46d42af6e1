"""What torchrun learns of a process that fails: a run's end is to show the first one's error, and no other's."""

from __future__ import annotations

import json
import os
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import ParamSpec, TypeVar

from hypo_train.config import is_users_mistake
from hypo_train.utils.errors import NotFiniteError, OtherProcessError, Stopped

P = ParamSpec("P")
T = TypeVar("T")
_FILE = "TORCHELASTIC_ERROR_FILE"  # where torchrun, if it has started this process, reads what has gone wrong
_PATIENCE = 15.0  # seconds


def telling_torchrun(function: Callable[P, T]) -> Callable[P, T]:
    """``function``, whose error torchrun shows: its message alone where that is made for people."""

    def told(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return function(*args, **kwargs)
        except Exception as error:
            if _FILE in os.environ and not isinstance(error, OtherProcessError):
                _tell(Path(os.environ[_FILE]), error)
            raise

    return told


def _tell(file: Path, error: Exception) -> None:
    says_all = isinstance(error, (NotFiniteError, Stopped)) or (
        isinstance(error, ValueError) and is_users_mistake(error)
    )
    message = f"{type(error).__name__}: {error}" if says_all else traceback.format_exc()
    # In the form of torch.distributed.elastic's record(), of which torchrun shows the call stack.
    told = {"message": message, "extraInfo": {"py_callstack": message, "timestamp": str(int(time.time()))}}
    with suppress(OSError):  # of a full disk, for one: the error itself counts
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps({"message": told}), encoding="utf-8")


def leave_the_end_to_it() -> None:
    """In a process that ends because of another one: let that be the first to end, which torchrun takes for the cause.

    torchrun then stops this one.
    """
    if _FILE in os.environ:
        time.sleep(_PATIENCE)
