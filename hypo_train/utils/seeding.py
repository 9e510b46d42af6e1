"""Seed all global random generators, because a reward function may use any of them."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy
import torch


def seed_everything(seed: int) -> None:
    """Seed the global generators of Python, NumPy and torch (on every device). ``seed``: 0 to 2**64 - 1.

    Called at the start of every step, so that its random numbers do not depend on earlier code, also after a resume.
    """
    random.seed(seed)
    numpy.random.seed([seed % 2**32, seed // 2**32])  # NumPy takes 32 bits a number  # noqa: NPY002
    torch.manual_seed(seed)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed the global generators inside the ``with`` block; restore their states after it."""
    python_state, numpy_state = random.getstate(), numpy.random.get_state()  # noqa: NPY002
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with torch.random.fork_rng(devices=devices):
        seed_everything(seed)
        try:
            yield
        finally:
            random.setstate(python_state)
            numpy.random.set_state(numpy_state)  # noqa: NPY002
