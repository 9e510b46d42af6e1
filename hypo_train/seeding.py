"""The random numbers that code of any origin may draw in a step: a reward function's too."""

from __future__ import annotations

import random

import numpy
import torch


def seed_everything(seed: int) -> None:
    """Put the global generators of Python, NumPy and torch, on every device, where ``seed`` says, from 0 to 2**64 - 1.

    A step and an evaluation begin with it, so that what they draw does not depend on what ran before: after a resume it
    is the same.
    """
    random.seed(seed)
    numpy.random.seed([seed % 2**32, seed // 2**32])  # takes 32 bits a number  # noqa: NPY002
    torch.manual_seed(seed)
