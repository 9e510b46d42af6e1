"""``python -m benchmarks.paper.small``: train every arm with every seed, then write the tables and pictures.

The same command resumes killed runs and skips finished ones; with more ``--seeds``, it trains only the new ones.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.paper.small import report
from benchmarks.paper.small.arms import arms
from benchmarks.paper.small.pool import Task, run_all, workers
from benchmarks.paper.small.stages import (
    QUICK,
    REWARD_MODEL,
    Scale,
    is_trained,
    make_material,
    train_arm,
    train_reward_model,
)

RESULTS = Path(__file__).parents[1] / "results"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.paper.small", description=__doc__)
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes of one thread each")
    parser.add_argument("--runs_dir", type=Path, default=Path("runs/paper"), help="default: %(default)s")
    parser.add_argument("--results_dir", type=Path, default=RESULTS, help="for the tables and pictures")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, only to test that it runs")
    options = parser.parse_args(argv)
    for name in ("seeds", "workers"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} {getattr(options, name)}: at least 1")
    if options.quick and options.results_dir == RESULTS:
        parser.error("--quick needs a --results_dir of its own: its numbers mean nothing")
    started = time.perf_counter()
    scale, runs = QUICK if options.quick else Scale(), options.runs_dir
    folders = {seed: runs / f"seed-{seed}" for seed in range(options.seeds)}
    with workers(options.workers) as pool:
        for stage in _stages(folders, scale, runs / "logs"):
            try:
                if not run_all(pool, stage):
                    return 1
            except KeyboardInterrupt:
                pool.shutdown(wait=False, cancel_futures=True)
                print("stopped: the same command continues from here", file=sys.stderr)
                return 130
    lines = report.write(folders, scale, options.results_dir)
    print("\n".join(lines))
    print(f"\n{options.results_dir / 'small.md'}, in {(time.perf_counter() - started) / 60:.0f} min")
    return 0


def _stages(folders: dict[int, Path], scale: Scale, logs: Path) -> list[list[Task]]:
    """Return the unfinished tasks; each stage needs the stages before it."""

    def task(seed: int, name: str, function: Callable[..., None], *more: Any) -> Task:
        arguments = (folders[seed], seed, scale, *more)
        return Task(f"seed {seed}: {name}", logs / f"seed-{seed}-{name}.txt", function, arguments)

    material: list[Task] = []
    first: list[Task] = []
    last: list[Task] = []
    for seed, folder in folders.items():
        if not folder.exists():
            material.append(task(seed, "material", make_material))
        if not is_trained(folder / REWARD_MODEL):
            first.append(task(seed, REWARD_MODEL, train_reward_model))
    for arm in arms():
        for seed, folder in folders.items():
            if not is_trained(folder / arm.name):
                (last if arm.algorithm == "rloo" else first).append(task(seed, arm.name, train_arm, arm))
    return [material, first, last]


if __name__ == "__main__":
    raise SystemExit(main())
