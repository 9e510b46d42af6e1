"""Read a run's folder for its report. The run may be finished, running or killed, and files may be damaged."""

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

from hypo_train.algorithms.registry import ALGORITHMS
from hypo_train.metrics.environment import read_attempts
from hypo_train.metrics.log import METRICS_FILE, readable_lines
from hypo_train.report.series import is_number
from hypo_train.report.text import first_of
from hypo_train.utils.errors import ConfigError
from hypo_train.utils.redact import redacted

CONFIG_FILE = "config.yaml"


@dataclass(frozen=True)
class RecordedRun:
    """The records of one run."""

    folder: Path
    name: str  # unique in a report
    config: dict[str, Any]  # settings in config.yaml, without credentials
    lines: list[dict[str, Any]]  # records of metrics.jsonl
    attempts: list[dict[str, Any]]  # records of environment.json, one for each start
    samples_step: int | None  # the step of the last evaluation that drew samples
    samples: list[dict[str, Any]]
    final_evaluation: dict[str, Any] | None  # metrics that ``python -m hypo_train evaluate`` wrote into the folder
    problems: list[str]  # files and lines that could not be read

    @property
    def algorithm(self) -> str:
        """The algorithm that config.yaml names; "A run" if it names none."""
        return str(self.config.get("algorithm", "A run"))

    @property
    def method(self) -> str:
        """The title of the algorithm, such as "HyPO"."""
        spec = ALGORITHMS.get(self.algorithm)
        title = spec.title.partition(" (")[0] if spec else self.algorithm
        return title[:1].upper() + title[1:]

    @property
    def loss_has_kl_term(self) -> bool:
        """True if the loss is a preference loss plus a KL term, which is the case for HyPO alone."""
        spec = ALGORITHMS.get(self.algorithm)
        return spec is not None and spec.is_hybrid

    @cached_property
    def trained(self) -> list[dict[str, Any]]:
        """The metrics of training steps."""
        return [line for line in self.lines if not _is_evaluation(line)]

    @cached_property
    def evaluated(self) -> list[dict[str, Any]]:
        """The metrics of evaluations."""
        return [line for line in self.lines if _is_evaluation(line)]

    @property
    def best_step(self) -> int | None:
        """The step of the weights in the final model, if the run chose the best of its checkpoints."""
        chooses = self.config.get("load_best_model_at_end") is True and self.evaluated
        step = self.evaluated[-1].get("best_global_step") if chooses else None
        return step if isinstance(step, int) else None

    @property
    def final_lines(self) -> list[dict[str, Any]]:
        """The evaluations up to that of the final model's weights."""
        best = self.best_step
        return self.evaluated if best is None else [line for line in self.evaluated if line["step"] <= best]

    @property
    def last_step(self) -> int:
        """The last step in metrics.jsonl, or 0."""
        return max((line["step"] for line in self.lines), default=0)

    @property
    def total_steps(self) -> int | None:
        """The planned number of steps, or None if it is not known."""
        total = self.attempts[-1].get("total_steps") if self.attempts else None
        return total if isinstance(total, int) else None

    @property
    def ending(self) -> str | None:
        """The outcome of the run; None if none is recorded."""
        if self.attempts:  # other files may belong to an earlier attempt
            return str(self.attempts[-1]["ended"]) if self.attempts[-1].get("ended") else None
        if (self.folder / "final").is_dir():
            return "finished"
        return "not finite" if self.not_finite_step is not None else None

    @property
    def not_finite_step(self) -> int | None:
        """The last step with a NaN or an infinity whose rows were saved, or None."""
        return max(_numbered(self.folder, r"not-finite-step-(\d+)\.jsonl"), default=None)

    @property
    def last_written(self) -> datetime | None:
        """The time of the last write to metrics.jsonl; None without the file."""
        path = self.folder / METRICS_FILE
        return datetime.fromtimestamp(path.stat().st_mtime, timezone.utc) if path.exists() else None


def read_runs(folders: list[Path]) -> list[RecordedRun]:
    """Return the runs of these folders. Raises ConfigError if one of them is not a run, or is named twice."""
    resolved = [folder.resolve() for folder in folders]
    for i, folder in enumerate(resolved):
        if folder in resolved[:i]:
            raise ConfigError(f"{str(folders[i])!r} is named twice: name each run once")
    return [_read(folder, name) for folder, name in zip(folders, _distinct_names(resolved), strict=True)]


def _read(folder: Path, name: str) -> RecordedRun:
    if not folder.is_dir():
        raise ConfigError(f"{str(folder)!r} is not a run: there is no such folder")
    if not (folder / CONFIG_FILE).is_file() and not (folder / METRICS_FILE).is_file():
        raise ConfigError(
            f"{str(folder)!r} is not a run: it has neither {CONFIG_FILE} nor {METRICS_FILE}; name a run's output_dir"
        )
    problems: list[str] = []
    config = _config(folder / CONFIG_FILE, problems)
    lines = [
        _without_undefined_accuracy(line)
        for line in _lines(folder, METRICS_FILE, problems)
        if type(line.get("step")) is int and abs(line["step"]) < 2**53
    ]
    attempts, problem = read_attempts(folder)
    problems += [problem] if problem else []
    step = max(_numbered(folder / "samples", r"step-(\d+)\.jsonl"), default=None)
    samples = [] if step is None else _lines(folder, f"samples/step-{step}.jsonl", problems)
    samples = [sample for sample in samples if isinstance(sample.get("completion"), str)]
    evaluation = _final_evaluation(folder, problems)
    return RecordedRun(folder, name, config, lines, attempts, step, samples, evaluation, problems)


def _lines(folder: Path, name: str, problems: list[str]) -> list[dict[str, Any]]:
    if not (folder / name).is_file():
        return []
    lines, broken = readable_lines(folder / name)
    if len(broken) == 1:
        problems.append(f"{name}: line {broken[0]} is not a JSON object and is left out")
    elif broken:
        problems.append(f"{name}: lines {first_of(broken)} are left out")
    return lines


def _config(path: Path, problems: list[str]) -> dict[str, Any]:
    """Return the settings as a dict. They may not fit ``Config``, because other versions have other fields."""
    if not path.is_file():
        problems.append(f"{CONFIG_FILE} is missing")
        return {}
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8", errors="replace"))
    except (yaml.YAMLError, ValueError) as error:
        problems.append(f"{CONFIG_FILE} is not valid YAML ({type(error).__name__})")
        return {}
    if not isinstance(settings, dict):
        problems.append(f"{CONFIG_FILE} holds no settings")
        return {}
    return {str(name): redacted(value) for name, value in settings.items()}


def _final_evaluation(folder: Path, problems: list[str]) -> dict[str, Any] | None:
    path = folder / "evaluation" / "metrics.json"
    if not path.is_file():
        return None
    try:
        metrics = json.loads(path.read_text(encoding="utf-8", errors="replace"))["metrics"]
    except (ValueError, KeyError, TypeError):
        metrics = None
    if isinstance(metrics, dict):
        return metrics
    problems.append("evaluation/metrics.json cannot be read")
    return None


def _without_undefined_accuracy(line: dict[str, Any]) -> dict[str, Any]:
    """Drop the reward accuracy while the policy equals its reference: all margins are 0 up to rounding."""
    margins = {kind: line.get(f"{kind}rewards/margins") for kind in ("", "eval_")}
    undefined = {f"{kind}rewards/accuracies" for kind, m in margins.items() if is_number(m) and abs(m) < 1e-5}
    return {name: value for name, value in line.items() if name not in undefined}


def _is_evaluation(line: dict[str, Any]) -> bool:
    return any(name.startswith("eval_") for name in line)


def _numbered(folder: Path, pattern: str) -> Iterator[int]:
    """Yield the number in the name of each file of ``folder`` that matches ``pattern``."""
    names = (path.name for path in folder.iterdir()) if folder.is_dir() else iter(())
    return (int(match[1]) for name in names if (match := re.fullmatch(pattern, name)))


def _distinct_names(folders: list[Path]) -> list[str]:
    """Return the shortest ends of the paths that are all different."""
    longest = max(len(folder.parts) for folder in folders)
    names = (["/".join(folder.parts[-parts:]) for folder in folders] for parts in range(1, longest + 1))
    return next(some for some in names if len(set(some)) == len(some))
