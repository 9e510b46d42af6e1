"""`environment.json`: on what a run ran, and how each of its attempts ended. It is the run's own record, sent nowhere.

Nothing in it tells who ran it or where: no environment variables, no host or user name, no paths, no command line. A
command line of a program that calls ``train`` may hold anything; what ours can say stands in ``config.yaml``.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import TracebackType
from typing import Any

from hypo_train.utils.records import written
from hypo_train.utils.safe_print import say
from hypo_train.utils.signals import NotFiniteError, Stopped

ENVIRONMENT_FILE = "environment.json"
PACKAGES = (
    "hypo-kernels",
    "torch",
    "triton",
    "transformers",
    "peft",
    "accelerate",
    "datasets",
    "liger-kernel",
    "flash-attn",
    "vllm",
)


class Attempt:
    """One start of a run, from ``first_step``: on the disk when it begins, and how it ended when it has.

    ``device``: its name, as ``hypo_train.metrics.device_name.device_name`` gives it.
    """

    def __init__(self, output_dir: Path, *, first_step: int, total_steps: int, device: str) -> None:
        self._path = output_dir / ENVIRONMENT_FILE
        self._first_step = first_step
        self._total_steps = total_steps
        self._device = device

    def __enter__(self) -> Attempt:
        self._began = time.monotonic()
        self._earlier = read_attempts(self._path.parent)[0]
        self._record: dict[str, Any] = {
            "started": _now(),
            "first_step": self._first_step,
            "total_steps": self._total_steps,
            "ended": None,
            "seconds": None,
            **describe(self._device),
        }
        with written(self._path):
            self._write()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._record |= {"ended": _ending(error), "seconds": round(time.monotonic() - self._began, 1)}
        try:
            self._write()
        except OSError as failed:  # how it ended is worth more than the record of it, and no error hides it
            say(f"{self._path} does not say how the run ended: {failed}", sys.stderr)

    def _write(self) -> None:
        temporary = self._path.with_name(self._path.name + ".tmp")
        text = json.dumps({"attempts": [*self._earlier, self._record]}, indent=2)
        temporary.write_text(text + "\n", encoding="utf-8")
        os.replace(temporary, self._path)


def read_attempts(output_dir: Path) -> tuple[list[dict[str, Any]], str | None]:
    """The attempts that a run's folder tells of, the first one first, and what is wrong with the file, if it is."""
    path = output_dir / ENVIRONMENT_FILE
    if not path.is_file():
        return [], None
    try:
        attempts = json.loads(path.read_text(encoding="utf-8", errors="replace"))["attempts"]
        if isinstance(attempts, list) and all(isinstance(attempt, dict) for attempt in attempts):
            return attempts, None
    except (ValueError, KeyError, TypeError):
        pass
    return [], f"{ENVIRONMENT_FILE} cannot be read"


def describe(device: str) -> dict[str, Any]:
    """Versions, machine and commit."""
    return {
        "device": device,
        "cpus": os.cpu_count(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        **versions(),
        "commit": _commit(),
    }


def versions() -> dict[str, str]:
    """Of the packages that are installed of those that a run computes with."""
    return {name: found for name in PACKAGES if (found := _version(name)) is not None}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """Of the checkout that the code runs from, with ``-dirty`` where files differ from it; None: it is installed."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip() or None


def _ending(error: BaseException | None) -> str:
    """Never an error's message: it may quote data."""
    if error is None:
        return "finished"
    if isinstance(error, Stopped):
        return f"stopped by {error.signal.name}"
    return "not finite" if isinstance(error, NotFiniteError) else f"failed: {type(error).__name__}"


def _now() -> str:
    return datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M:%S UTC")
