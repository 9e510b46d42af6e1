"""How many online samples are enough on a real model: SmolLM2-135M-Instruct learns to summarise posts, with LoRA.

``python -m benchmarks.paper.smollm2_online_fraction`` trains every arm on the same pairs in the same order, and writes
the table and all its numbers. The same command resumes killed runs and skips finished ones. ``make smollm2`` fetches
the model.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.paper.small.pool import Task, run_all, workers
from hypo_train.config import load_config
from hypo_train.metrics.log import read_metrics
from hypo_train.train import train

RESULTS = Path(__file__).parent / "results"
NAME = "smollm2_online_fraction"
RECIPE = "hypo_train/recipes/smollm2-lora.yaml"
# The λ of the recipe hardly acts in so few steps: this one is ten times as large. With a precomputed reference the
# FLOPs of a step hold nothing but what every step needs, DPO's too.
SETTINGS = {
    "kl_coef": 1e-2,
    "max_completion_length": 48,  # as long as the longest response of the pairs
    "learning_rate": 5e-4,
    "gradient_accumulation_steps": 1,
    "precompute_ref_log_probs": True,
    "eval_steps": 0,  # an evaluation at the end alone: it takes as long as several steps
    "num_eval_samples": 2,
    "save_steps": 2,
    "save_total_limit": 1,
}
PAIRS_A_RUN = 64
FRACTIONS = (1.0, 1 / 2, 1 / 4, 1 / 8, 1 / 16)


def arm(num_pairs: int, online_fraction: float | None) -> dict[str, Any]:
    """Return the settings of an arm: ``num_pairs`` a step, and the fraction of HyPO or None for DPO."""
    sizes = {"per_device_train_batch_size": num_pairs, "max_steps": PAIRS_A_RUN // num_pairs}
    return sizes | ({"algorithm": "dpo"} if online_fraction is None else {"online_fraction": online_fraction})


DPO = "4 pairs a step, DPO"
ARMS = {
    DPO: arm(4, None),
    **{f"4 pairs a step, HyPO, {fraction:g}": arm(4, fraction) for fraction in FRACTIONS},
}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.paper.{NAME}", description=__doc__)
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each (default: %(default)s)")
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS), help="default: all; DPO is needed")
    parser.add_argument("--runs_dir", type=Path, default=Path("runs") / NAME, help="default: %(default)s")
    parser.add_argument("--results_dir", type=Path, default=RESULTS, help="for the table and its numbers")
    options = parser.parse_args(argv)
    if options.workers < 1:
        parser.error(f"--workers {options.workers}: at least 1")
    if DPO not in options.arms:
        parser.error(f"--arms without {DPO!r}: the table compares with it")
    runs = {name: options.runs_dir / name.replace(", ", "-").replace(" ", "-") for name in ARMS if name in options.arms}
    tasks = [
        Task(name, options.runs_dir / "logs" / f"{run.name}.txt", train_arm, (run, ARMS[name]))
        for name, run in runs.items()
        if not (run / "final").exists()
    ]
    with workers(options.workers) as pool:
        if not run_all(pool, tasks):
            return 1
    found = {name: outcome(run) for name, run in runs.items()}
    lines = [
        f"`python -m benchmarks.paper.{NAME}`; one seed; LoRA, {PAIRS_A_RUN} pairs a run, β 0.1, "
        f"λ {SETTINGS['kl_coef']:g}, 2 samples of at most 48 tokens a prompt; 16 held-out prompts, 2 samples each; "
        "± the standard error over these samples.",
        "",
        *table(found),
    ]
    options.results_dir.mkdir(parents=True, exist_ok=True)
    (options.results_dir / f"{NAME}.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    (options.results_dir / f"{NAME}.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))
    return 0


def train_arm(run: Path, settings: dict[str, Any]) -> None:
    """Train one arm in the folder ``run``, or go on with its killed run."""
    paths = {"output_dir": run, "ref_logps_cache_dir": run.parent / "reference_logps"}
    values = {**SETTINGS, **settings, **paths, "resume_from_checkpoint": "auto"}
    flags = [text for name, value in values.items() for text in (f"--{name}", str(value))]
    train(load_config(["--config", RECIPE, *flags]))


def outcome(run: Path) -> dict[str, Any]:
    """Return a run's evaluation at the end, and what a step costs: means over its steps, and its median seconds."""
    lines = read_metrics(run / "metrics.jsonl")
    steps = [line for line in lines if "time/step" in line]
    return {
        "evaluation": {name: lines[-1][f"eval_{key}"] for name, key in _EVALUATED.items()},
        "kl_of_samples": [line["kl"] for line in steps if "kl" in line],
        "per_step": {
            "flops": statistics.fmean(sum(line[name] for name in line if name.startswith("flops/")) for line in steps),
            "online_samples": max(line.get("num_online_samples", 0) for line in steps) / steps[-1]["step"],
            "seconds": statistics.median(line["time/step"] for line in steps),
        },
    }


_EVALUATED = {"kl": "kl", "kl_se": "kl_se", "accuracy": "rewards/accuracies", "margin": "rewards/margins"}


def table(found: dict[str, dict[str, Any]]) -> list[str]:
    """Return the lines of the table: KL, accuracy and margin on the held-out pairs at the end, and the model FLOPs."""
    lines = [
        "| | samples a step | reverse KL | reward accuracy | reward margin | model FLOPs, of DPO's |",
        "|---|---|---|---|---|---|",
    ]
    for name, run in found.items():
        end, dpo = run["evaluation"], found[DPO]
        lines.append(
            f"| {name} | {run['per_step']['online_samples']:.3g} | {end['kl']:.2f} ± {end['kl_se']:.2f} | "
            f"{end['accuracy']:.2f} | {end['margin']:.2f} | {run['per_step']['flops'] / dpo['per_step']['flops']:.2f} |"
        )
    return lines


if __name__ == "__main__":
    sys.exit(main())
