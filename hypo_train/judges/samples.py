"""Read comparisons from files of samples.

A line of SAMPLES.jsonl is an object with ``prompt``, ``completion`` and, unless other samples are named, the
``reference`` response of its row, as an evaluation writes them; ``row`` (default: the line's number, from 0) and
``ended`` (default: true) are optional.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from hypo_train.judges.verdicts import Comparison, JudgeError

_TYPES: dict[str, type] = {"prompt": str, "completion": str, "row": int, "ended": bool}


def read_comparisons(path: Path, against: Path | None, limit: int | None) -> list[Comparison]:
    """Return comparisons of the first ``limit`` samples (None: all) with their references or with ``against``.

    Raises:
        JudgeError: a file or line cannot be read, a sample has no counterpart, or a counterpart with another prompt.
    """
    samples = _numbered(_read(path)[:limit])
    if against is None:
        return [_with_reference(path, key, sample) for key, sample in samples.items()]
    others = _numbered(_read(against))
    return [_with_other(against, key, sample, others.get(key)) for key, sample in samples.items()]


def _with_reference(path: Path, key: tuple[int, int], sample: dict[str, Any]) -> Comparison:
    reference = sample.get("reference")
    if not isinstance(reference, str):
        raise JudgeError(
            f"{path}: the sample of row {key[0]} has no 'reference' response to be compared with: name other samples "
            "with --against"
        )
    return Comparison(*key, sample["prompt"], sample["completion"], reference, ended=sample["ended"])


def _with_other(
    against: Path, key: tuple[int, int], sample: dict[str, Any], other: dict[str, Any] | None
) -> Comparison:
    row, number = key
    if other is None:
        raise JudgeError(
            f"{against} has no sample {number} of row {row}: both files must hold the same rows, with as many samples "
            "each (--num_comparisons judges the first alone)"
        )
    if other["prompt"] != sample["prompt"]:
        raise JudgeError(f"{against} has another prompt for row {row}: both files must be of the same data")
    ends = {"ended": sample["ended"], "other_ended": other["ended"]}
    return Comparison(*key, sample["prompt"], sample["completion"], other["completion"], **ends)


def _numbered(samples: list[dict[str, Any]]) -> dict[tuple[int, int], dict[str, Any]]:
    """Return {(row, number of the sample in the row): sample}."""
    seen: Counter[int] = Counter()
    numbered = {}
    for sample in samples:
        numbered[sample["row"], seen[sample["row"]]] = sample
        seen[sample["row"]] += 1
    return numbered


def _read(path: Path) -> list[dict[str, Any]]:
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise JudgeError(f"{path}: {getattr(error, 'strerror', None) or error}") from None
    samples = [_sample(path, number, line) for number, line in enumerate(lines) if line.strip()]
    if not samples:
        raise JudgeError(f"{path}: there are no samples")
    return samples


def _sample(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        sample = json.loads(line)
    except ValueError as error:
        raise JudgeError(f"{path}: line {number + 1} is not JSON: {error}") from None
    if not isinstance(sample, dict):
        raise JudgeError(f"{path}: line {number + 1} is not a JSON object")
    sample = {"row": number, "ended": True, **sample}
    for name, kind in _TYPES.items():
        if not isinstance(sample.get(name), kind):
            raise JudgeError(f"{path}: line {number + 1}: {name!r} should be {kind.__name__}, got {sample.get(name)!r}")
    return sample
