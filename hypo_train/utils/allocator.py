"""Let the C library keep the memory that tensors on a CPU free, for the tensors of the next step."""

from __future__ import annotations

import ctypes
import os
import platform

# Parameters of mallopt(3).
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4


def keep_freed_memory() -> bool:
    """Make glibc's malloc return no freed memory to the system, and return whether it does so now.

    By default glibc gives large tensors back as they are freed, and the system clears their pages anew in every step.
    Variables of the environment that begin with ``MALLOC_`` are a user's own settings, and change nothing here.
    """
    if platform.libc_ver()[0] != "glibc" or any(name.startswith("MALLOC_") for name in os.environ):
        return False
    mallopt = ctypes.CDLL(None).mallopt
    settings = {_M_MMAP_MAX: 0, _M_TRIM_THRESHOLD: -1, _M_TOP_PAD: 64 << 20}
    return all(mallopt(parameter, value) == 1 for parameter, value in settings.items())
