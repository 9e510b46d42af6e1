"""Run the demo: train a language model, sample preference pairs from it, then train DPO and HyPO on them."""

from __future__ import annotations

import random
import shutil
import time
from pathlib import Path
from typing import Any

from hypo_train.demo import report
from hypo_train.demo.settings import DemoSettings
from hypo_train.demo.stages import Sizes, configure, train_language_model, write_pairs
from hypo_train.metrics.log import read_metrics
from hypo_train.report.page import REPORT_FILE, write_report
from hypo_train.train import train
from hypo_train.utils.quiet import quiet_libraries

SIZES = Sizes()
# Both methods share all settings but the algorithm and its kl_coef.
SETTINGS: dict[str, Any] = {
    "beta": 0.1,
    "learning_rate": 5e-4,
    "per_device_train_batch_size": 32,
    "num_train_epochs": 8,
}
METHODS: dict[str, dict[str, Any]] = {
    "dpo": {"algorithm": "dpo"},
    # Samples for 2 of a step's 32 prompts end at the KL and reward of samples for all (docs/cost.md), in half the time.
    "hypo": {"algorithm": "hypo", "kl_coef": 3e-3, "num_generations": 2, "online_fraction": 0.0625},
}


def run(settings: DemoSettings) -> int:
    """Train, compare, print the table and draw the curves. Returns the exit status 0."""
    quiet_libraries()
    started, output_dir = time.perf_counter(), settings.output_dir
    seeds = range(settings.seed, settings.seed + settings.seeds)
    outcomes = [run_seed(output_dir / f"seed-{seed}", seed) for seed in seeds]
    table = report.table(outcomes)
    (output_dir / "table.md").write_text(table, encoding="utf-8")
    picture = report.draw(outcomes, output_dir / "curves.png")
    page = output_dir / REPORT_FILE
    write_report([run for outcome in outcomes for run in outcome.runs.values()], page)
    minutes = (time.perf_counter() - started) / 60
    print(f"\n{table}\ncurves: {picture}\nsamples and settings: {page}\ntime: {minutes:.1f} minutes")
    return 0


def run_seed(folder: Path, seed: int) -> report.Outcome:
    """Run every stage with one seed in a new ``folder``, and print the results so far after each."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    rng, started = random.Random(seed), time.perf_counter()
    num_stages = 2 + len(METHODS)

    def announce(stage: int, text: str) -> None:
        print(f"\n[{stage}/{num_stages}] {text} (seed {seed}, {time.perf_counter() - started:.0f} s)", flush=True)

    announce(1, f"train a language model on {SIZES.num_reviews} reviews")
    sft = train_language_model(folder, rng, seed, SIZES)
    reward = read_metrics(folder / "sft" / "metrics.jsonl")[-1]["eval_reward"]
    print(f"\nfirst result: the true reward of the language model's reviews is {reward:.2f} on average")
    announce(2, f"sample {SIZES.num_pairs + SIZES.num_held_out} preference pairs from it")
    baseline = write_pairs(sft, folder / "pairs.jsonl", rng, seed, SIZES)
    runs: dict[str, Path] = {}
    seconds: dict[str, float] = {}
    for stage, (name, method) in enumerate(METHODS.items(), start=3):
        print(f"\n{report.table([report.Outcome(seed, runs, baseline, seconds)])}", flush=True)
        announce(stage, f"train with {report.LABELS[name]}")
        config = configure(
            folder / name,
            sft,
            folder / "pairs.jsonl",
            seed,
            num_eval_rows=SIZES.num_held_out,
            num_eval_prompts=SIZES.num_held_out,
            per_device_eval_batch_size=128,
            eval_steps=62,
            **SETTINGS,
            **method,
        )
        began = time.perf_counter()
        train(config)
        runs[name], seconds[name] = folder / name, time.perf_counter() - began
    return report.Outcome(seed, runs, baseline, seconds)
