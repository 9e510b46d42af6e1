"""The runs of a seed: each function skips a finished run and resumes a killed one."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.paper.small.arms import BATCH_SIZE, EPOCHS, LEARNING_RATE, Arm
from hypo_train.demo import world
from hypo_train.demo.stages import Sizes, configure, train_language_model, write_pairs, write_rows
from hypo_train.train import train
from hypo_train.utils.atomic import write_folder

REWARD_MODEL = "reward-model"  # its run's folder
REFERENCES = "references.jsonl"  # the reviewers' texts for the held-out prompts


@dataclass(frozen=True)
class Scale:
    """The sizes of the experiment; the defaults are those of the published tables."""

    sizes: Sizes = field(default_factory=Sizes)
    reward_model_steps: int = 300  # it hardly learns in the first 150
    epochs: int = EPOCHS


QUICK = Scale(Sizes(num_reviews=456, num_pairs=2 * BATCH_SIZE, num_held_out=8), reward_model_steps=2, epochs=1)


def make_material(folder: Path, seed: int, scale: Scale) -> None:
    """Create the language model, its pairs and the reviewers' texts for the held-out pairs, atomically."""
    if folder.exists():
        return
    write_folder(folder, lambda unfinished: _fill(unfinished, seed, scale))


def _fill(unfinished: Path, seed: int, scale: Scale) -> None:
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


def train_reward_model(folder: Path, seed: int, scale: Scale) -> None:
    """Train the reward model from the language model, on the pairs."""
    settings = {"learning_rate": 3e-4, "warmup_ratio": 0.1, "max_steps": scale.reward_model_steps}
    _train(folder, REWARD_MODEL, seed, scale, {"algorithm": "reward", "reward": None, **settings})


def train_arm(folder: Path, seed: int, scale: Scale, arm: Arm) -> None:
    """Train an arm from the language model, on the pairs; RLOO uses their prompts and the reward model."""
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
