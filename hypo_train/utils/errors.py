"""The exceptions that end a run. Each message is one line that says what to do."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any


class ConfigError(ValueError):
    """The configuration has a problem; the message names the field, its value and the fix."""


class CheckpointError(ValueError):
    """A checkpoint or model cannot be loaded or saved; the message says why."""


class HubError(ValueError):
    """A model cannot be uploaded to the Hugging Face Hub; the message says why."""


class RecordError(ValueError):
    """A run cannot write a record (metrics, samples, settings), for example because the disk is full."""


class NotFiniteError(ArithmeticError):
    """A step produced NaN or infinity; the message names the step and the file with its rows."""


class OtherProcessError(RuntimeError):
    """Another process of the run has failed and has reported its own error."""


class Stopped(Exception):
    """A signal stopped the run after it saved a checkpoint."""

    def __init__(self, number: int, checkpoint: Path) -> None:
        self.signal = signal.Signals(number)
        self.checkpoint = checkpoint
        super().__init__(
            f"stopped by {self.signal.name}, saved in {checkpoint}: --resume_from_checkpoint auto continues from there"
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return Stopped, (int(self.signal), self.checkpoint)


def is_users_mistake(error: ValueError) -> bool:
    """Return whether this project raised ``error``, so that its message is written for the user."""
    return type(error).__module__.split(".")[0] in ("hypo_train", "hypo_kernels")
