"""The random numbers that code of any origin may draw in a step: a reward function's too."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy
import torch


def seed_everything(seed: int) -> None:
    """Put the global generators of Python, NumPy and torch, on every device, where ``seed`` says, from 0 to 2**64 - 1.

    A step begins with it: what is drawn in it does not depend on what ran before, and is the same after a resume.
    """
    random.seed(seed)
    numpy.random.seed([seed % 2**32, seed // 2**32])  # takes 32 bits a number  # noqa: NPY002
    torch.manual_seed(seed)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """The same for a while: the generators are put back to where they were afterwards."""
    of_python, of_numpy = random.getstate(), numpy.random.get_state()  # noqa: NPY002
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with torch.random.fork_rng(devices=devices):
        seed_everything(seed)
        try:
            yield
        finally:
            random.setstate(of_python)
            numpy.random.set_state(of_numpy)  # noqa: NPY002
