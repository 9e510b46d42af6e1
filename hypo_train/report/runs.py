"""A run's folder, read as it is: finished, going on, killed, or broken in places."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from hypo_train.metrics.environment import read_attempts
from hypo_train.metrics.log import METRICS_FILE, readable_lines
from hypo_train.utils.errors import ConfigError
from hypo_train.utils.redact import redacted

CONFIG_FILE = "config.yaml"
_SAMPLES = re.compile(r"step-(\d+)\.jsonl")
_NOT_FINITE = re.compile(r"not-finite-step-(\d+)\.jsonl")


@dataclass(frozen=True)
class RecordedRun:
    """What a run has written so far."""

    folder: Path
    name: str  # no other run of the page has it
    config: dict[str, Any]  # as config.yaml has it, without credentials
    lines: list[dict[str, Any]]  # of metrics.jsonl
    attempts: list[dict[str, Any]]  # of environment.json, one for each start
    problems: list[str]  # what could not be read

    @cached_property
    def trained(self) -> list[dict[str, Any]]:
        """The lines of training."""
        return [line for line in self.lines if not _of_evaluation(line)]

    @cached_property
    def evaluated(self) -> list[dict[str, Any]]:
        """The lines of evaluations."""
        return [line for line in self.lines if _of_evaluation(line)]

    @property
    def last_step(self) -> int:
        return max((line["step"] for line in self.lines), default=0)

    @property
    def total_steps(self) -> int | None:
        """None: it is not known."""
        total = self.attempts[-1].get("total_steps") if self.attempts else None
        return total if isinstance(total, int) else None

    @property
    def ending(self) -> str | None:
        """How it ended; None: nothing says that it has."""
        if self.attempts:  # what else the folder has may be of an earlier one
            return str(self.attempts[-1]["ended"]) if self.attempts[-1].get("ended") else None
        if (self.folder / "final").is_dir():
            return "finished"
        return f"not finite in step {self.not_finite_step}" if self.not_finite_step is not None else None

    @property
    def not_finite_step(self) -> int | None:
        """The step whose rows were kept because of a NaN or infinity."""
        found = [int(match[1]) for match in map(_NOT_FINITE.fullmatch, _names(self.folder)) if match]
        return max(found, default=None)

    @property
    def last_written(self) -> datetime | None:
        path = self.folder / METRICS_FILE
        return datetime.fromtimestamp(path.stat().st_mtime, timezone.utc) if path.exists() else None

    @cached_property
    def samples(self) -> tuple[int, list[dict[str, Any]]] | None:
        """The step of the last evaluation that drew samples, and these."""
        steps = [int(match[1]) for match in map(_SAMPLES.fullmatch, _names(self.folder / "samples")) if match]
        if not steps:
            return None
        step = max(steps)
        lines, broken = readable_lines(self.folder / "samples" / f"step-{step}.jsonl")
        if broken:
            self.problems.append(f"samples/step-{step}.jsonl: {_broken(broken)}")
        return step, [line for line in lines if isinstance(line.get("completion"), str)]


def read_runs(folders: list[Path]) -> list[RecordedRun]:
    """The runs of these folders. Raises ConfigError: one of them is no run, or is named twice."""
    resolved = [folder.resolve() for folder in folders]
    for i, folder in enumerate(resolved):
        if folder in resolved[:i]:
            raise ConfigError(f"{str(folders[i])!r} is named twice: name each run once")
    return [_read(folder, name) for folder, name in zip(folders, _distinct_names(resolved), strict=True)]


def _read(folder: Path, name: str) -> RecordedRun:
    has_config, has_metrics = (folder / CONFIG_FILE).is_file(), (folder / METRICS_FILE).is_file()
    if not folder.is_dir():
        raise ConfigError(f"{str(folder)!r} is no run: there is no such folder")
    if not has_config and not has_metrics:
        raise ConfigError(
            f"{str(folder)!r} is no run: it has neither {CONFIG_FILE} nor {METRICS_FILE}; name a run's output_dir"
        )
    problems: list[str] = []
    config: dict[str, Any] = {}
    if has_config:
        config = _config(folder / CONFIG_FILE, problems)
    else:
        problems.append(f"{CONFIG_FILE} is missing")
    lines: list[dict[str, Any]] = []
    if has_metrics:
        found, broken = readable_lines(folder / METRICS_FILE)
        lines = [line for line in found if type(line.get("step")) is int and abs(line["step"]) < 2**53]
        if broken:
            problems.append(f"{METRICS_FILE}: {_broken(broken)}")
    attempts, problem = read_attempts(folder)
    problems += [problem] if problem else []
    return RecordedRun(folder, name, config, lines, attempts, problems)


def _config(path: Path, problems: list[str]) -> dict[str, Any]:
    """Not as a ``Config``: a run of an earlier version may have had other fields."""
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8", errors="replace"))
    except (yaml.YAMLError, ValueError) as error:
        problems.append(f"{CONFIG_FILE} is not valid YAML ({type(error).__name__})")
        return {}
    if not isinstance(found, dict):
        problems.append(f"{CONFIG_FILE} holds no settings")
        return {}
    return {str(name): redacted(value) for name, value in found.items()}


def _of_evaluation(line: dict[str, Any]) -> bool:
    return any(name.startswith("eval_") for name in line)


def _broken(numbers: list[int]) -> str:
    named = ", ".join(map(str, numbers[:5])) + (" …" if len(numbers) > 5 else "")
    return f"line {named} is no JSON object and is left out" if len(numbers) == 1 else f"lines {named} are left out"


def _names(folder: Path) -> Iterator[str]:
    return (path.name for path in folder.iterdir()) if folder.is_dir() else iter(())


def _distinct_names(folders: list[Path]) -> list[str]:
    """As much of the end of each path as it takes to tell them apart."""
    longest = max(len(folder.parts) for folder in folders)
    for parts in range(1, longest + 1):
        names = ["/".join(folder.parts[-parts:]) for folder in folders]
        if len(set(names)) == len(names):
            return names
    return [str(folder) for folder in folders]


def evaluation_afterwards(run: RecordedRun) -> dict[str, Any] | None:
    """What ``python -m hypo_train evaluate`` wrote into the run's folder, if it did."""
    path = run.folder / "evaluation" / "metrics.json"
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8", errors="replace"))
    except ValueError:
        found = None
    if isinstance(found, dict) and isinstance(found.get("metrics"), dict):
        return found
    run.problems.append("evaluation/metrics.json cannot be read")
    return None
