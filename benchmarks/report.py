"""Format a session's results as text for a terminal and as a section for RESULTS.md."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

import hypo_kernels
from benchmarks import targets
from benchmarks.providers import GEMMS, OURS, PROVIDERS
from benchmarks.session import Measured, Result

COLUMNS = ("provider", "ms", "IQR", "hot ms", "x ours", "x GEMMs", "rate", "peak MiB", "err logp", "err dX", "err dW")
MIB = 2**20


def tables(measured: Iterable[Measured], device: torch.device) -> str:
    """Return every group's table, at most 120 columns wide, and the targets that were met or missed."""
    found = list(measured)
    parts = ["\n".join(_table(group, device)) for group in found]
    return "\n\n".join([*parts, "\n".join(targets.lines(found, device))]).rstrip()


def _table(measured: Measured, device: torch.device) -> list[str]:
    """Return the table, fastest first; wrong, failed and skipped providers come last, without a rank."""
    done = sorted((r for r in measured.results.values() if r.samples), key=lambda result: result.median)
    ranked = [result for result in done if not result.wrong]
    rows = [_cells(measured, result, device) for result in ranked]
    lines = [_title(measured, device), *aligned([_header(device), *rows])]
    lines += [f"  WRONG    {r.provider.name}: {r.wrong} ({r.median * 1e3:.4g} ms)" for r in done if r.wrong]
    if measured.rounded:
        errors = ", ".join(f"err {'dX' if name == 'hidden' else 'dW'} {e:.1e}" for name, e in measured.rounded.items())
        lines.append(f"  exact but for d-logits in {_dtype(measured)}: {errors}")
    rest = [result for result in measured.results.values() if not result.samples]
    lines += [f"  FAILED   {r.provider.name}: {r.failed}" for r in rest if r.failed]
    lines += [f"  skipped  {r.provider.name}: {r.skipped}" for r in rest if r.skipped]
    return [line if len(line) <= 120 else line[:117] + "..." for line in lines]


def _title(measured: Measured, device: torch.device) -> str:
    workload = measured.group.workload
    ignored = workload.rows - measured.counted_rows
    ours = measured.results.get(OURS[device.type])
    gradients = f", gradients {ours.gradient_bytes / MIB:.0f} MiB" if ours and ours.gradient_bytes else ""
    return (
        f"{workload.title} {measured.group.mode}: {measured.counted_rows} counted rows"
        f"{f' (+{ignored} ignored)' if ignored else ''} x V={workload.vocab} x D={workload.width}, "
        f"{_dtype(measured)}{gradients}"
    )


def _dtype(measured: Measured) -> str:
    return str(measured.group.workload.dtype).removeprefix("torch.")


def _header(device: torch.device) -> tuple[str, ...]:
    """Return the column titles; the hot cache is measured on CUDA only."""
    if device.type == "cuda":
        return tuple("TFLOP/s" if name == "rate" else name for name in COLUMNS)
    return tuple("GFLOP/s" if name == "rate" else name for name in COLUMNS if name != "hot ms")


def _cells(measured: Measured, result: Result, device: torch.device) -> tuple[str, ...]:
    unit = 1e12 if device.type == "cuda" else 1e9
    errors = [result.errors.get(quantity) for quantity in ("logps", "hidden", "weight")]
    return (
        result.provider.name,
        f"{result.median * 1e3:.4g}",
        f"{result.spread * 1e3:.2g}",
        *(() if result.hot_median is None else (f"{result.hot_median * 1e3:.4g}",)),
        ratio(measured.times(result, OURS[device.type])),
        ratio(measured.times(result, GEMMS)),
        f"{measured.flop / result.median / unit:.0f}",
        "-" if result.provider.name == GEMMS else f"{result.peak_bytes / MIB:.0f}",
        *("-" if error is None else f"{error:.1e}" for error in errors),
    )


def ratio(times: float | None) -> str:
    return "-" if times is None else f"{times:.2f}"


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *rest in rows:
        cells = [cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True)]
        lines.append("  ".join(["  " + first.ljust(widths[0]), *cells]))
    return [lines[0], "  " + "-" * (len(lines[0]) - 2), *lines[1:]]


def open_section(path: Path, device: torch.device, command: str) -> None:
    """Append the head of a dated section to ``path``: machine, versions and command."""
    append(
        path,
        "",
        f"## {datetime.date.today().isoformat()}, {hardware(device)}",
        "",
        f"- Software: {versions()}; commit {commit()}.",
        f"- Command: `{command}`.",
        f"- Machine at the start: {state(device)}.",
        "",
    )


def append_group(path: Path, measured: Measured, device: torch.device) -> None:
    """Append a group's table as soon as it is measured, because a later group may fail."""
    title, *table = _table(measured, device)
    append(path, f"**{title}**", "", "```text", *table, "```", "")


def close_section(path: Path, measured: Sequence[Measured], device: torch.device) -> None:
    """Append the targets, the number of rounds and the machine's state."""
    found = list(targets.lines(measured, device))
    rounds = _rounds(measured)
    cold = " with a cold L2 cache, hot ms with a hot one" if device.type == "cuda" else ""
    append(
        path,
        *(["```text", *found, "```", ""] if found else []),
        f"- Providers take turns within every round; ms is the median{cold}; IQR is the interquartile range of "
        f"{min(rounds)} to {max(rounds)} rounds.",
        f"- Machine at the end: {state(device)}.",
        "",
    )


def append(path: Path, *lines: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write("\n".join([*lines, ""]))


def _rounds(measured: Sequence[Measured]) -> list[int]:
    return [len(result.samples) for group in measured for result in group.results.values() if result.samples] or [0]


def hardware(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{torch.get_num_threads()} of {os.cpu_count()} CPU cores ({_cpu_name()}), no GPU"


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def versions() -> str:
    found = {"Python": platform.python_version(), "hypo-kernels": hypo_kernels.__version__}
    for package in ("triton", *dict.fromkeys(provider.package for provider in PROVIDERS)):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return ", ".join(f"{name} {version}" for name, version in found.items())


def commit() -> str:
    """Return the repository's commit, marked if files differ from it; "unknown" outside a repository."""
    try:
        return _output("git", "describe", "--always", "--dirty", "--exclude=*")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def state(device: torch.device) -> str:
    """Return the load of the host and, if nvidia-smi is installed, the clocks of the GPU."""
    load = f"load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores"
    if device.type != "cuda":
        return load
    query = "clocks.sm,clocks.max.sm,power.draw,temperature.gpu"
    try:
        return f"{load}; {query}: {_output('nvidia-smi', f'--query-gpu={query}', '--format=csv,noheader')}"
    except (OSError, subprocess.CalledProcessError):
        return load


def _output(*command: str) -> str:
    folder = Path(__file__).parent
    return subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout.strip()
