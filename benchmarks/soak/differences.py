"""What two folders of runs differ in, costs aside: nothing, if the one was killed and resumed as it should be."""

from __future__ import annotations

from pathlib import Path

from hypo_train.metrics.log import METRICS_FILE, read_metrics, without_costs


def differences(found: Path, expected: Path) -> list[str]:
    """One line for each thing that is not the same: lines of metrics, samples, the final model's files."""
    return [
        *_metrics(found / METRICS_FILE, expected / METRICS_FILE),
        *_files(found / "samples", expected / "samples"),
        *_files(found / "final", expected / "final"),
        *[f"{path.name} is left behind" for path in found.glob("*.tmp") if path.name != f"{METRICS_FILE}.tmp"],
    ]


def _metrics(found: Path, expected: Path) -> list[str]:
    lines = [[without_costs(line) for line in read_metrics(path)] for path in (found, expected)]
    if len(lines[0]) != len(lines[1]):
        return [f"{METRICS_FILE} has {len(lines[0])} lines instead of {len(lines[1])}"]
    return [
        f"{METRICS_FILE}, step {theirs.get('step')}: {name} is {ours.get(name)!r} instead of {theirs.get(name)!r}"
        for ours, theirs in zip(*lines, strict=True)
        for name in {**ours, **theirs}
        if ours.get(name) != theirs.get(name)
    ]


def _files(found: Path, expected: Path) -> list[str]:
    """Byte for byte."""
    of_each = [folder.iterdir() if folder.is_dir() else () for folder in (found, expected)]  # not all runs draw samples
    contents = [{path.name: path.read_bytes() for path in files} for files in of_each]
    return [
        f"{found.name}/{name} differs"
        for name in sorted({*contents[0], *contents[1]})
        if contents[0].get(name) != contents[1].get(name)
    ]
