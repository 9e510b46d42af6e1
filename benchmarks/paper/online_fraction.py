"""How many online samples are enough: HyPO with samples for some of a step's prompts, in the demo's world.

``python -m benchmarks.paper.online_fraction`` trains every arm with every seed from the seed's language model, on the
same pairs, and writes the table and all its numbers. The same command resumes killed runs and skips finished ones.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.paper.small.arms import BETA, EPOCHS, KL_COEF, Arm, dpo
from benchmarks.paper.small.pool import Task, run_all, workers
from benchmarks.paper.small.stages import QUICK, Scale, is_trained, make_material, train_arm
from hypo_train.metrics.log import read_metrics

RESULTS = Path(__file__).parent / "results"
FRACTIONS = (1.0, 1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 64)  # of 32 prompts a step; 1 / 64 is one in every second step
DRAWN_AHEAD = ((1 / 4, 4), (1 / 8, 8), (1 / 16, 16))  # (online_fraction, rollout_steps): as many samples in a draw


def hypo(online_fraction: float, rollout_steps: int = 1) -> Arm:
    settings = {"algorithm": "hypo", "beta": BETA, "kl_coef": KL_COEF, "num_generations": 2}
    settings |= {"online_fraction": online_fraction, "rollout_steps": rollout_steps}
    ahead = f"-ahead-{rollout_steps}" if rollout_steps > 1 else ""
    return Arm(f"hypo-online-{online_fraction:g}{ahead}", settings)


ARMS = {
    "DPO": dpo(BETA),
    **{f"HyPO, {fraction:g}": hypo(fraction) for fraction in FRACTIONS},
    **{f"HyPO, {fraction:g}, a draw for {steps} steps": hypo(fraction, steps) for fraction, steps in DRAWN_AHEAD},
}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.paper.online_fraction", description=__doc__)
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each (default: %(default)s)")
    parser.add_argument("--runs_dir", type=Path, default=Path("runs/online_fraction"), help="default: %(default)s")
    parser.add_argument("--results_dir", type=Path, default=RESULTS, help="for the table and its numbers")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, only to test that it runs")
    options = parser.parse_args(argv)
    for name in ("seeds", "workers"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} {getattr(options, name)}: at least 1")
    if options.quick and options.results_dir == RESULTS:
        parser.error("--quick needs a --results_dir of its own: its numbers mean nothing")
    scale, runs = QUICK if options.quick else Scale(epochs=EPOCHS), options.runs_dir
    folders = {seed: runs / f"seed-{seed}" for seed in range(options.seeds)}
    with workers(options.workers) as pool:
        for stage in _stages(folders, scale, runs / "logs"):
            if not run_all(pool, stage):
                return 1
    found = {name: [outcome(folder / arm.name) for folder in folders.values()] for name, arm in ARMS.items()}
    lines = [
        f"`python -m benchmarks.paper.online_fraction --seeds {len(folders)}`; mean ± standard error over the seeds; "
    ]
    lines[0] += (
        f"{scale.epochs} epochs of {scale.sizes.num_pairs:,} pairs, {scale.sizes.num_held_out} held-out prompts; "
    )
    lines[0] += f"β {BETA:g}, λ {KL_COEF:g}, 2 samples a prompt."
    lines += ["", *table(found)]
    options.results_dir.mkdir(parents=True, exist_ok=True)
    (options.results_dir / "online_fraction.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    (options.results_dir / "online_fraction.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))
    return 0


def _stages(folders: dict[int, Path], scale: Scale, logs: Path) -> list[list[Task]]:
    """Return the unfinished tasks; the second stage needs the first."""
    material = [
        Task(f"seed {seed}: material", logs / f"seed-{seed}-material.txt", make_material, (folder, seed, scale))
        for seed, folder in folders.items()
        if not folder.exists()
    ]
    runs = [
        Task(f"seed {seed}: {arm.name}", logs / f"seed-{seed}-{arm.name}.txt", train_arm, (folder, seed, scale, arm))
        for seed, folder in folders.items()
        for arm in ARMS.values()
        if not is_trained(folder / arm.name)
    ]
    return [material, runs]


def outcome(run: Path) -> dict[str, Any]:
    """Return a run's evaluations, and what a step costs."""
    lines = read_metrics(run / "metrics.jsonl")
    steps = [line for line in lines if "time/step" in line]
    of_steps = {
        "flops": statistics.fmean(
            sum(value for name, value in line.items() if name.startswith("flops/")) for line in steps
        ),
        "online_samples": max((line.get("num_online_samples", 0) for line in steps), default=0) / steps[-1]["step"],
    }
    evaluations = [
        {"step": line["step"], "kl": line["eval_kl"], "reward": line["eval_reward"]}
        for line in lines
        if "eval_kl" in line
    ]
    return {"evaluations": evaluations, "per_step": of_steps}


def table(found: dict[str, list[dict[str, Any]]]) -> list[str]:
    """Return the lines of the table: reward and KL at the end, the largest KL on the way, and the model FLOPs."""
    lines = [
        "| online_fraction | true reward | reverse KL | largest KL of an evaluation | samples a step | "
        "model FLOPs, of DPO's |",
        "|---|---|---|---|---|---|",
    ]
    for name, seeds in found.items():
        last = [seed["evaluations"][-1] for seed in seeds]
        largest = [max(evaluation["kl"] for evaluation in seed["evaluations"]) for seed in seeds]
        flops = statistics.fmean(
            seed["per_step"]["flops"] / base["per_step"]["flops"]
            for seed, base in zip(seeds, found["DPO"], strict=True)
        )
        samples = statistics.fmean(seed["per_step"]["online_samples"] for seed in seeds)
        lines.append(
            f"| {name} | {_mean([e['reward'] for e in last])} | {_mean([e['kl'] for e in last])} | {_mean(largest)} | "
            f"{samples:.3g} | {flops:.2f} |"
        )
    return lines


def _mean(values: Sequence[float]) -> str:
    """Return the mean ± its standard error."""
    if len(values) < 2:
        return f"{values[0]:.2f}"
    return f"{statistics.fmean(values):.2f} ± {statistics.stdev(values) / len(values) ** 0.5:.2f}"


if __name__ == "__main__":
    sys.exit(main())
