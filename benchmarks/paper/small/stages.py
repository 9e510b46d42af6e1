"""A seed's runs, each a function that leaves what is finished alone and continues what was killed."""

from __future__ import annotations

import json
import random
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.paper.small.arms import BATCH_SIZE, EPOCHS, LEARNING_RATE, Arm
from hypo_train.demo import world
from hypo_train.demo.stages import Sizes, configure, train_language_model, write_pairs, write_rows
from hypo_train.train import train

REWARD_MODEL = "reward-model"  # its run's folder
REFERENCES = "references.jsonl"  # what reviewers wrote for the held-out prompts


@dataclass(frozen=True)
class Scale:
    """How much there is of everything; the defaults are the experiment's."""

    sizes: Sizes = field(default_factory=Sizes)
    reward_model_steps: int = 300  # in the first 150 it hardly learns
    epochs: int = EPOCHS


QUICK = Scale(Sizes(num_reviews=456, num_pairs=2 * BATCH_SIZE, num_held_out=8), reward_model_steps=2, epochs=1)


def make_material(folder: Path, seed: int, scale: Scale) -> None:
    """The language model, its pairs and, for the held-out ones, what a reviewer wrote: all of them or none."""
    if folder.exists():
        return
    unfinished = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    rng = random.Random(seed)
    sft = train_language_model(unfinished, rng, seed, scale.sizes)
    pairs = unfinished / "pairs.jsonl"
    write_pairs(sft, pairs, rng, seed, scale.sizes)
    writer = random.Random(f"references {seed}")
    held_out = [json.loads(line) for line in pairs.read_text(encoding="utf-8").splitlines()][scale.sizes.num_pairs :]
    rows: list[dict[str, Any]] = []
    for i, row in enumerate(held_out, start=scale.sizes.num_pairs):
        review = world.review(writer)
        reward = world.reward(row["prompt"], review)
        rows.append({"row": i, "prompt": row["prompt"], "completion": review, "reward": reward})
    write_rows(unfinished / REFERENCES, rows)
    unfinished.rename(folder)


def train_reward_model(folder: Path, seed: int, scale: Scale) -> None:
    """From the language model, on the pairs."""
    settings = {"learning_rate": 3e-4, "warmup_ratio": 0.1, "max_steps": scale.reward_model_steps}
    _train(folder, REWARD_MODEL, seed, scale, {"algorithm": "reward", "reward": None, **settings})


def train_arm(folder: Path, seed: int, scale: Scale, arm: Arm) -> None:
    """From the language model, on the pairs; RLOO on their prompts, with the reward model."""
    settings = {"learning_rate": LEARNING_RATE, "num_train_epochs": scale.epochs, **arm.settings}
    if arm.algorithm == "rloo":
        settings |= {"reward": None, "reward_model_path": str(folder / REWARD_MODEL / "final")}
    _train(folder, arm.name, seed, scale, settings)


def is_trained(run: Path) -> bool:
    return (run / "final").exists()


def _train(folder: Path, name: str, seed: int, scale: Scale, settings: dict[str, Any]) -> None:
    if is_trained(folder / name):
        return
    epoch = scale.sizes.num_pairs // BATCH_SIZE
    config = configure(
        folder / name,
        folder / "sft" / "final",
        folder / "pairs.jsonl",
        seed,
        per_device_train_batch_size=BATCH_SIZE,
        num_eval_rows=scale.sizes.num_held_out,
        num_eval_prompts=scale.sizes.num_held_out,
        per_device_eval_batch_size=128,
        eval_steps=epoch,
        save_steps=epoch,
        save_total_limit=1,
        resume_from_checkpoint="auto",
        report_to=[],
        ref_logps_cache_dir=str(folder / "reference_logps"),
        **settings,
    )
    train(config, progress=False)
