"""Compare the folders of two runs, without timings and memory."""

from __future__ import annotations

from pathlib import Path

from hypo_train.metrics.log import METRICS_FILE, read_metrics, without_costs


def differences(actual: Path, expected: Path) -> list[str]:
    """Return one line for each difference in metrics, samples and the final model's files."""
    return [
        *_metrics(actual / METRICS_FILE, expected / METRICS_FILE),
        *_files(actual / "samples", expected / "samples"),
        *_files(actual / "final", expected / "final"),
        *[f"{path.name} is left behind" for path in actual.glob("*.tmp") if path.name != f"{METRICS_FILE}.tmp"],
    ]


def _metrics(actual: Path, expected: Path) -> list[str]:
    lines = [[without_costs(line) for line in read_metrics(path)] for path in (actual, expected)]
    if len(lines[0]) != len(lines[1]):
        return [f"{METRICS_FILE} has {len(lines[0])} lines instead of {len(lines[1])}"]
    return [
        f"{METRICS_FILE}, step {theirs.get('step')}: {name} is {ours.get(name)!r} instead of {theirs.get(name)!r}"
        for ours, theirs in zip(*lines, strict=True)
        for name in {**ours, **theirs}
        if ours.get(name) != theirs.get(name)
    ]


def _files(actual: Path, expected: Path) -> list[str]:
    """Compare the files byte for byte."""
    listings = [
        folder.iterdir() if folder.is_dir() else () for folder in (actual, expected)
    ]  # some runs draw no samples
    contents = [{path.name: path.read_bytes() for path in files} for files in listings]
    return [
        f"{actual.name}/{name} differs"
        for name in sorted({*contents[0], *contents[1]})
        if contents[0].get(name) != contents[1].get(name)
    ]
