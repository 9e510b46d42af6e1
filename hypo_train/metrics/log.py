"""The log of a run: `metrics.jsonl`, trackers, a progress bar.

`metrics.jsonl` is the record. Each log call is one line, `{"step": 10, "loss": 0.69, ...}`. A run that was killed and
resumed leaves the same file as an uninterrupted one.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from tqdm import tqdm

from hypo_train.metrics.trackers import Trackers
from hypo_train.utils.atomic import write_file
from hypo_train.utils.records import record_errors
from hypo_train.utils.safe_print import safe_print

METRICS_FILE = "metrics.jsonl"
SHOWN = {  # metric -> its label in the progress bar
    "loss": "loss",
    "kl": "kl",
    "reward": "reward",
    "accuracy": "accuracy",
    "rewards/margins": "margin",
    "time/step": "s/step",
    "time/sample": "s/sampling",
    "tokens_per_second": "tokens/s",
}


class SilentLog:
    """A log that writes nothing, for processes other than the main one."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record the metrics of a step."""

    def flush(self) -> None:
        """Write what was logged to the disk."""

    def advance(self, step: int) -> None:
        """Show that ``step`` steps are done."""

    def message(self, text: str) -> None:
        """Print a line."""

    def close(self) -> None:
        """Close files, trackers and the bar."""

    def __enter__(self) -> SilentLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class RunLog(SilentLog):
    """The log of one run; a context manager that closes it.

    Args:
        output_dir: the folder of `metrics.jsonl`; created if it does not exist.
        total_steps: the number of steps of the run, to estimate the time left.
        trackers: these receive the metrics too, and are closed with the log.
        resume_step: the step of the checkpoint that the run resumes from, or 0 for a new run. Lines of later steps
            are dropped from an existing file. Log a step before saving its checkpoint: otherwise its line is lost if
            the run is killed in between.
        progress: show a bar on a terminal, or a line for each log call elsewhere.
    """

    def __init__(
        self,
        output_dir: Path | str,
        total_steps: int,
        *,
        trackers: Trackers | None = None,
        resume_step: int = 0,
        progress: bool,
    ) -> None:
        self._path = path = Path(output_dir) / METRICS_FILE
        self.total_steps = total_steps
        self._progress = progress
        self._first_step = resume_step
        self._started = time.monotonic()
        self._shown: dict[str, str] = {}
        self._trackers = trackers
        with record_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            _cut(path, resume_step)
            self._file = path.open("a", encoding="utf-8")
        self._bar = None
        if progress and sys.stderr.isatty():
            # smoothing=0: estimate the time left from the mean of all steps; recent steps may contain an evaluation.
            self._bar = tqdm(total=total_steps, initial=resume_step, unit="step", dynamic_ncols=True, smoothing=0)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record the metrics of a step; they survive if the process is killed afterwards."""
        line = {"step": step, **{name: _to_json(value) for name, value in metrics.items()}}
        with record_errors(self._path):
            self._file.write(json.dumps(line, allow_nan=False) + "\n")
            self._file.flush()
        if self._trackers is not None:
            self._trackers.log(step, metrics)
        self._show(step, metrics)
        if step == self._first_step:  # keeps an evaluation before the first step out of the time of a step
            self._started = time.monotonic()
            if self._bar is not None:
                self._bar.unpause()

    def flush(self) -> None:
        """Write what was logged to the disk, so that it survives a power failure; call it before a checkpoint."""
        with record_errors(self._path):
            os.fsync(self._file.fileno())

    def advance(self, step: int) -> None:
        """Move the bar to `step` steps."""
        if self._bar is not None:
            self._bar.update(step - self._bar.n)

    def message(self, text: str) -> None:
        """Print a line, above the bar if there is one."""
        with tqdm.external_write_mode():
            safe_print(text)

    def close(self) -> None:
        """Close the files and the bar; closing twice does nothing."""
        if self._trackers is not None:
            self._trackers.close()
        if self._bar is not None:
            self._bar.close()
        with record_errors(self._path):
            self._file.close()

    def __enter__(self) -> RunLog:
        return self

    def _show(self, step: int, metrics: Mapping[str, float]) -> None:
        if not self._progress:
            return
        trained = _formatted(metrics, "")
        if self._bar is not None and trained:
            self._shown |= trained
            self._bar.set_postfix(self._shown)
        else:  # no terminal, or values of an evaluation, which should stay visible
            values = "  ".join(f"{label} {value}" for label, value in (trained | _formatted(metrics, "eval_")).items())
            self.message(f"step {step}/{self.total_steps}{self._time_left(step)}  {values}")

    def _time_left(self, step: int) -> str:
        done = step - self._first_step
        if self._bar is not None or done < 1 or step >= self.total_steps:
            return ""
        seconds = (time.monotonic() - self._started) / done * (self.total_steps - step)
        return f"  {tqdm.format_interval(seconds)} left"


def read_metrics(path: Path | str) -> list[dict[str, Any]]:
    """Return the lines of a `metrics.jsonl`, NaN and infinities as floats, without an unfinished last line.

    Raises:
        ValueError: a line is not a JSON object.
    """
    lines, broken = readable_lines(Path(path))
    if broken:
        line = Path(path).read_bytes().split(b"\n")[broken[0] - 1].decode("utf-8", errors="replace")
        raise ValueError(f"{path}, line {broken[0]} is not a JSON object: {line[:80]!r}")
    return lines


def logged_evaluations(output_dir: Path) -> list[dict[str, Any]]:
    """Return the lines of the evaluations in a run's `metrics.jsonl`; none if there is no such file."""
    path = output_dir / METRICS_FILE
    lines = read_metrics(path) if path.is_file() else []
    return [line for line in lines if any(name.startswith("eval_") for name in line)]


def readable_lines(path: Path) -> tuple[list[dict[str, Any]], list[int]]:
    """Return the JSON objects of a file's lines, and the numbers of the lines that are not JSON objects.

    NaN and infinities are floats. An unfinished last line is in neither list.
    """
    parsed = [_parse(line) for line in path.read_bytes().split(b"\n")[:-1]]
    broken = [number for number, line in enumerate(parsed, start=1) if line is None]
    return [line for line in parsed if line is not None], broken


# Prefixes of the metrics that measure time, work and memory of a step.
COSTS = ("time/", "flops/", "memory/", "tokens_per_second", "train_samples_per_second", "tflops_per_second", "mfu")


def without_costs(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``metrics`` without time, work and memory, which differ between machines and after a resume."""
    return {name: value for name, value in metrics.items() if not name.startswith(COSTS)}


def _cut(path: Path, resume_step: int) -> None:
    """Atomically drop the lines of steps after `resume_step` and an unfinished last line."""
    if not path.exists():
        return
    lines = path.read_bytes().split(b"\n")[:-1] if resume_step > 0 else []
    kept = [line for line in lines if _is_kept(line, resume_step)]
    write_file(path, b"".join(line + b"\n" for line in kept))


def _is_kept(line: bytes, resume_step: int) -> bool:
    metrics = _parse(line)
    return metrics is not None and isinstance(metrics.get("step"), int) and metrics["step"] <= resume_step


def _parse(line: str | bytes) -> dict[str, Any] | None:
    try:
        metrics = json.loads(line)
    except ValueError:
        return None
    if not isinstance(metrics, dict):
        return None
    return {name: _NUMBERS.get(value, value) if isinstance(value, str) else value for name, value in metrics.items()}


# JSON has no NaN or infinities, and null would not distinguish them.
_NUMBERS = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def _to_json(value: float) -> float | str:
    if isinstance(value, int):
        return value
    value = float(value)
    if math.isnan(value):
        return "NaN"
    return value if math.isfinite(value) else ("Infinity" if value > 0 else "-Infinity")


def _formatted(metrics: Mapping[str, float], prefix: str) -> dict[str, str]:
    """Return {label: value as text} of the metrics in ``SHOWN``."""
    shown = {label: metrics[prefix + name] for name, label in SHOWN.items() if prefix + name in metrics}
    return {prefix + label: f"{value:,.0f}" if value >= 1000 else f"{value:.4g}" for label, value in shown.items()}
