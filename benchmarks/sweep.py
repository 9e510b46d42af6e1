"""Measure time and memory of the trained head over the number of tokens and over the vocabulary; draw pictures.

    python -m benchmarks.sweep [--quick] --results PATH

Numbers go to ``plots/<device>-<date>/sweep.json`` beside PATH, after every point, pictures beside them
(``plots.py``), and links to both to the end of PATH.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import re
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import report
from benchmarks.providers import BY_NAME, GEMMS, OURS
from benchmarks.session import Measured, Result, Session
from benchmarks.workloads import LLAMA, Group, Workload

MODE = "trained"
NUMBERS = "sweep.json"
# The best-known peers; the grid has the others.
PEERS = {
    "cuda": ("full logits", "TRL ChunkedLogProb", "Cut Cross-Entropy", "Liger scaled CE", "Liger FLCE"),
    "cpu": ("full logits", "TRL ChunkedLogProb", "Liger scaled CE"),
}
AXES = {"tokens": "rows", "vocabulary": "vocab"}  # axis -> the field of a workload that varies


def workloads(device: torch.device, *, quick: bool) -> dict[str, list[Workload]]:
    """Return the points of each axis, smallest first."""
    if device.type == "cuda":
        tokens = [1024, 4096, 16384] if quick else [1024, 2048, 4096, 8192, 16384, 32768]
        vocabulary = [32768, 128256] if quick else [32768, 65536, 128256, 262144]
        base = LLAMA
    elif quick:
        tokens, vocabulary = [128, 512], [1024, 4096]
        base = Workload("hypo", 128, 1024, 64, torch.float32, sequence_length=16)
    else:
        tokens, vocabulary = [256, 512, 1024, 2048, 4096], [4096, 8192, 16384, 32768]
        base = Workload("hypo", 512, 8192, 256, torch.float32, sequence_length=64)
    return {
        "tokens": [replace(base, rows=rows) for rows in tokens],
        "vocabulary": [replace(base, vocab=vocab) for vocab in vocabulary],
    }


def folder_beside(results: Path, device: torch.device, *, quick: bool) -> Path:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    return results.parent / "plots" / f"{slug}-{datetime.date.today().isoformat()}{'-quick' if quick else ''}"


def measure(device: torch.device, folder: Path, *, quick: bool) -> Path:
    """Measure every point and return the file of numbers, which is written after each point."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / NUMBERS
    found: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "hardware": report.hardware(device),
        "versions": report.versions(),
        "commit": report.commit(),
        "state at the start": report.state(device),
        "mode": MODE,
        "ours": OURS[device.type],
        "axes": {},
    }
    # A sweep on a CPU must end within minutes; a few rounds are enough for a picture.
    session = Session(device, few_rounds=quick or device.type == "cpu", on_measured=_say)
    names = [name for name in PEERS[device.type] if not (BY_NAME[name].compiles and device.type == "cpu")]
    for axis, points in workloads(device, quick=quick).items():
        curve: list[dict[str, Any]] = []
        found["axes"][axis] = {"fixed": _fixed(points[0], axis), "points": curve}
        for workload in points:
            measured = session.measure(Group(workload, MODE), names)
            curve.append({axis: getattr(workload, AXES[axis]), "providers": _numbers(measured)})
            found["state at the end"] = report.state(device)
            path.write_text(json.dumps(found, indent=1) + "\n")
    return path


def _fixed(workload: Workload, axis: str) -> dict[str, int | str]:
    """Return the sizes that are constant along an axis."""
    sizes = {name: getattr(workload, name) for name in ("rows", "vocab", "width") if name != AXES[axis]}
    return {**sizes, "dtype": str(workload.dtype).removeprefix("torch.")}


def _say(measured: Measured, seconds: float) -> None:
    print(f"measured {measured.group} in {seconds:.0f} s", flush=True)


def _numbers(measured: Measured) -> dict[str, dict[str, Any]]:
    return {name: _of(measured, result) for name, result in measured.results.items()}


def _of(measured: Measured, result: Result) -> dict[str, Any]:
    """Return the numbers of one provider at one point, or why it did not run."""
    if not result.samples:
        return {"failed": result.failed} if result.failed else {"skipped": result.skipped}
    times = measured.times(result, GEMMS)
    return {
        "ms": result.median * 1e3,
        "IQR ms": result.spread * 1e3,
        "hot ms": None if result.hot_median is None else result.hot_median * 1e3,
        "peak MiB": result.peak_bytes / 2**20,
        "gradient MiB": result.gradient_bytes / 2**20,
        "share of the GEMM rate": None if times is None else 1 / times,
        "TFLOP/s": measured.flop / result.median / 1e12,
        "errors": result.errors,
        "wrong": result.wrong,
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sweep", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer and, on a CPU, smaller points")
    parser.add_argument("--results", type=Path, required=True, help="the pictures go to plots/ beside this file")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    start = time.perf_counter()
    folder = folder_beside(args.results, device, quick=args.quick)
    numbers = folder / NUMBERS
    numbers.unlink(missing_ok=True)
    try:
        measure(device, folder, quick=args.quick)
    finally:  # draw the measured points even after an error
        if numbers.exists():
            publish(numbers, args.results)
    print(f"{len(AXES)} axes in {time.perf_counter() - start:.0f} s: {numbers.relative_to(args.results.parent)}")


def publish(numbers: Path, results: Path) -> None:
    """Draw the pictures, and append links to them and to the numbers to ``results``."""
    where = numbers.parent.relative_to(results.parent)
    links = [f"Trained head over tokens and vocabulary: [numbers]({where / numbers.name})."]
    if importlib.util.find_spec("matplotlib") is None:
        print("no plots: matplotlib is not installed (pip install matplotlib)")
    else:
        from benchmarks import plots

        links += [f"![{title}]({where / picture.name})" for title, picture in plots.draw(numbers)]
    report.append(results, *(line for link in links for line in (link, "")))


if __name__ == "__main__":
    main()
