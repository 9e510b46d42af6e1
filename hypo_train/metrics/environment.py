"""Write `environment.json`: versions, device and outcome of each attempt of a run. The file is never sent anywhere.

It identifies neither user nor machine: no environment variables, no host or user name, no paths, no command line (that
of a program that calls ``train`` may hold anything; the settings of a run are in ``config.yaml``).
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

from hypo_train.utils.errors import NotFiniteError, Stopped
from hypo_train.utils.records import record_errors, write_json
from hypo_train.utils.safe_print import safe_print

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
    """Context manager that records the start and the end of one attempt of a run, from ``first_step``.

    ``device``: the device's name, from :func:`hypo_train.metrics.devices.device_name`.
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
        with record_errors(self._path):
            self._write()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._record |= {"ended": _ending(error), "seconds": round(time.monotonic() - self._began, 1)}
        try:
            self._write()
        except OSError as failed:  # do not hide the error that ended the run
            safe_print(f"{self._path} does not say how the run ended: {failed}", sys.stderr)

    def _write(self) -> None:
        write_json(self._path, {"attempts": [*self._earlier, self._record]})


def read_attempts(output_dir: Path) -> tuple[list[dict[str, Any]], str | None]:
    """Return the recorded attempts of a run, oldest first, and a message if the file is broken."""
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
    """Return the versions, the machine and the commit to record for a run."""
    return {
        "device": device,
        "cpus": os.cpu_count(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        **versions(),
        "commit": _commit(),
    }


def versions() -> dict[str, str]:
    """Return the versions of those ``PACKAGES`` that are installed."""
    return {name: found for name in PACKAGES if (found := _version(name)) is not None}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """Return the commit of the checkout, with ``-dirty`` if files differ; None if the package is installed."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
    try:
        git = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return git.stdout.strip() or None


def _ending(error: BaseException | None) -> str:
    # The message of an error is not recorded: it may quote data.
    if error is None:
        return "finished"
    if isinstance(error, Stopped):
        return f"stopped by {error.signal.name}"
    return "not finite" if isinstance(error, NotFiniteError) else f"failed: {type(error).__name__}"


def _now() -> str:
    return datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M:%S UTC")
