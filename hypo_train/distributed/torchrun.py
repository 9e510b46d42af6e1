"""Record the error of a failed process for torchrun, so that it reports the process that failed first.

PyTorch's own ``record`` writes a full traceback for every error. A user's mistake is one line here, so this module
writes the same file itself.
"""

from __future__ import annotations

import json
import os
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from functools import wraps
from pathlib import Path
from typing import ParamSpec, TypeVar

from hypo_train.utils.errors import NotFiniteError, OtherProcessError, Stopped, is_users_mistake

P = ParamSpec("P")
T = TypeVar("T")
_FILE_VARIABLE = "TORCHELASTIC_ERROR_FILE"  # set by torchrun: the file in which it looks for this process's error
_SECONDS = 15.0


def record_for_torchrun(function: Callable[P, T]) -> Callable[P, T]:
    """Return ``function`` with its errors recorded for torchrun: a traceback, or one line for a user's mistake."""

    @wraps(function)
    def recorded(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return function(*args, **kwargs)
        except Exception as error:
            if _FILE_VARIABLE in os.environ and not isinstance(error, OtherProcessError):
                _write(Path(os.environ[_FILE_VARIABLE]), error)
            raise

    return recorded


def _write(file: Path, error: Exception) -> None:
    needs_no_traceback = isinstance(error, (NotFiniteError, Stopped)) or (
        isinstance(error, ValueError) and is_users_mistake(error)
    )
    message = f"{type(error).__name__}: {error}" if needs_no_traceback else traceback.format_exc()
    # The format of torch.distributed.elastic's record(); torchrun prints the call stack.
    record = {"message": message, "extraInfo": {"py_callstack": message, "timestamp": str(int(time.time()))}}
    with suppress(OSError):  # for example a full disk: the error itself matters more
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps({"message": record}), encoding="utf-8")


def wait_for_torchrun() -> None:
    """Wait, so that the process that failed first also ends first.

    torchrun reports the process that ends first as the cause, and then stops this one.
    """
    if _FILE_VARIABLE in os.environ:
        time.sleep(_SECONDS)
