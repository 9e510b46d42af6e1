"""Time the tile sizes of the GEMM kernels on this GPU, beside the bare GEMM, and print the best ones.

    python -m benchmarks.tune_tiles                       # a record into benchmarks/tiles/<device>.json
    python -m benchmarks.tune_tiles --shapes 8192x128256x4096 --seconds 20

Nothing is tuned on a user's machine: a developer runs this and copies the printed lines into
``hypo_kernels/kernels/tiles.py``. Candidates take turns with the bare GEMM; wrong log-sum-exps rule a candidate out.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.measure import Step, interleaved, median
from hypo_kernels.head import LMHead
from hypo_kernels.kernels.tiles import GemmTile, gemm_candidates

SHAPES = ["8192x128256x4096", "4096x50304x2048", "1024x50304x2048"]  # rows x vocabulary x features
CHECKED_ROWS = 32
# Sums in another order have other errors; this many times the median candidate's error means a wrong result.
SUSPICIOUS = 10
GEMM = "bare GEMM"


@dataclass
class Timed:
    """A candidate on one shape; ``failed`` says why it has no time."""

    kernel: str
    tile: GemmTile
    shape: str
    error: float = float("nan")  # the largest error of log-sum-exps
    seconds: float = float("nan")  # median
    times_gemm: float = float("nan")
    failed: str = ""


def problem(shape: str, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor, LMHead]:
    """Return (x, weight, targets, head) whose logits are spread like a model's."""
    rows, vocab, width = map(int, shape.split("x"))
    gen = torch.Generator(device).manual_seed(0)
    x = torch.randn(rows, width, generator=gen, device=device, dtype=dtype)
    weight = torch.randn(vocab, width, generator=gen, device=device, dtype=dtype) * (2.0 / width**0.5)
    targets = torch.randint(vocab, (rows,), generator=gen, device=device)
    return x, weight, targets, LMHead(weight)


def time_shape(kernel: str, shape: str, dtype: torch.dtype, device: torch.device, seconds: float) -> list[Timed]:
    """Time every candidate that compiles and is right, in turns with the bare GEMM."""
    x, weight, targets, head = problem(shape, dtype, device)
    exact = (x[:CHECKED_ROWS].double() @ weight.double().t()).logsumexp(1)
    out = torch.empty(len(x), len(weight), dtype=dtype, device=device)
    run = _runner(kernel, x, weight, targets, head, out)
    candidates = gemm_candidates(
        torch.cuda.get_device_capability(device), x.element_size(), out.element_size() * (kernel == "exponentials")
    )
    timed = [Timed(kernel, tile, shape) for tile in candidates]
    for one in timed:
        try:
            norms = run(one.tile)[:CHECKED_ROWS].double()
            one.error = float((norms[:, 0] + norms[:, 1].log() - exact).abs().max())
        except Exception as error:  # a compiler may fail on a tile in many ways
            one.failed = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"
    ran = [one for one in timed if not one.failed]
    usual = median([one.error for one in ran])
    for one in ran:
        if not one.error <= SUSPICIOUS * usual:
            one.failed = f"log-sum-exps off by {one.error:.2g}, where others are by {usual:.2g}"
    steps: dict[str, Step] = {str(one.tile): _bound(run, one.tile) for one in ran if not one.failed}
    steps[GEMM] = lambda: torch.mm(x, weight.t(), out=out)
    samples = interleaved(
        steps,
        device,
        before=lambda: None,
        seconds=seconds,
        min_rounds=5,
        max_rounds=100,
        warm_up_rounds=2,
    )
    floor = median(samples[GEMM][0])  # with a cold cache
    for one in ran:
        if not one.failed:
            one.seconds = median(samples[str(one.tile)][0])
            one.times_gemm = one.seconds / floor
    return timed


def _runner(
    kernel: str, x: Tensor, weight: Tensor, targets: Tensor, head: LMHead, out: Tensor
) -> Callable[[GemmTile], Tensor]:
    from hypo_kernels.kernels import exponentials as exponentials_kernels
    from hypo_kernels.kernels import statistics as statistics_kernels

    if kernel == "statistics":
        return lambda tile: statistics_kernels.statistics(x, weight, targets, head, tile=tile)[0]
    return lambda tile: exponentials_kernels.exponentials(x, weight, targets, head, out, tile=tile)[1]


def _bound(run: Callable[[GemmTile], Tensor], tile: GemmTile) -> Step:
    return lambda: run(tile)


def best(timed: list[Timed]) -> tuple[GemmTile, float]:
    """Return the tile with the least geometric mean of times over all shapes, and that mean relative to the GEMM."""
    shapes = {one.shape for one in timed}
    ratios: dict[GemmTile, list[float]] = {}
    for one in timed:
        if not one.failed:
            ratios.setdefault(one.tile, []).append(one.times_gemm)
    complete = {tile: each for tile, each in ratios.items() if len(each) == len(shapes)}
    if not complete:
        raise ValueError("no candidate ran on every shape")
    means = {tile: float(torch.tensor(each).log().mean().exp()) for tile, each in complete.items()}
    tile = min(means, key=lambda tile: means[tile])
    return tile, means[tile]


def frozen_line(kernel: str, capability: tuple[int, int], operand_bytes: int, tile: GemmTile) -> str:
    """Return the entry for ``GEMM_TILES``."""
    return f'("{kernel}", {capability}, {operand_bytes}): {tile},'


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=SHAPES, metavar="ROWSxVOCABxWIDTH")
    parser.add_argument("--seconds", type=float, default=10.0, help="of each kernel on each shape")
    parser.add_argument("--output", type=Path, help="of the record; benchmarks/tiles/<device>.json")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("tune_tiles times kernels on a CUDA device, and torch sees none here", file=sys.stderr)
        return 2
    import triton

    device, dtype = torch.device("cuda", torch.cuda.current_device()), torch.bfloat16
    capability = torch.cuda.get_device_capability(device)
    name = torch.cuda.get_device_name(device)
    record: dict[str, Any] = {
        "device": name,
        "capability": capability,
        "dtype": str(dtype),
        "versions": {"torch": torch.__version__, "triton": triton.__version__, "python": platform.python_version()},
        "cuda": torch.version.cuda,
        "candidates": [],
    }
    for kernel in ("statistics", "exponentials"):
        timed = [one for shape in args.shapes for one in time_shape(kernel, shape, dtype, device, args.seconds)]
        record["candidates"] += [asdict(one) for one in timed]
        for one in sorted(timed, key=lambda one: (one.shape, bool(one.failed), one.seconds)):
            figures = one.failed or f"{1e3 * one.seconds:9.3f} ms {one.times_gemm:6.3f} x the bare GEMM"
            print(f"{kernel} {one.shape} {figures}  {one.tile}")
        tile, ratio = best(timed)
        line = frozen_line(kernel, capability, dtype.itemsize, tile)
        record[f"best {kernel}"] = {"tile": asdict(tile), "times_gemm": ratio, "line": line}
        print(f"\n{line}  # {ratio:.3f} x the bare GEMM on {name}\n")
    output = args.output or Path(__file__).with_name("tiles") / f"{name.replace(' ', '-')}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(record, indent=1), encoding="utf-8")
    print(f"written to {output}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
