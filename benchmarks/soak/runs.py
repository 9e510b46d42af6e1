"""The runs that are killed: small ones in the demo's world, one for each way to train and each state to bring back."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
import yaml

from hypo_train.demo import stages, world

NUM_ROWS = 28
# Saves fall between two lines, whose means they have to hold, and between two draws of rollouts.
INTERVALS: dict[str, Any] = {
    "max_steps": 7,
    "save_steps": 2,
    "save_total_limit": 2,
    "eval_steps": 3,
    "logging_steps": 3,
    "num_eval_rows": 4,
    "num_eval_prompts": 4,
}
SMALL: dict[str, Any] = {
    "per_device_train_batch_size": 3,
    "per_device_eval_batch_size": 4,
    "max_completion_length": 24,
    "max_new_tokens": 6,
    "learning_rate": 1e-3,
    "warmup_ratio": 0.3,
    "weight_decay": 0.1,
    "kl_coef": 0.05,
    "bf16": False,
    "report_to": [],
}
RUNS: dict[str, dict[str, Any]] = {
    "hypo": {"precompute_ref_log_probs": True, "gradient_accumulation_steps": 2, "report_to": ["tensorboard"]},
    "hypo, LoRA": {"use_peft": True, "lora_r": 4, "lora_dropout": 0.2, "lora_target_modules": "all-linear"},
    "hypo, last layers": {"num_layers_unfrozen": 2, "rollout_steps": 3},
    "rloo": {"algorithm": "rloo", "rollout_steps": 3, "beta": 0.05},
}


def make_world(folder: Path) -> None:
    """The demo's model, untrained, and reviews of its world as preference pairs."""
    rng = random.Random(0)
    torch.manual_seed(0)
    world.save_new_model(folder / "model")
    rows = []
    for _ in range(NUM_ROWS):
        prompt, *texts = world.prompt(rng), world.review(rng), world.review(rng)
        rejected, chosen = sorted(texts, key=lambda text: world.reward(prompt, text))
        rows.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    stages.write_rows(folder / "pairs.jsonl", rows)


def write_recipe(world_folder: Path, folder: Path, settings: dict[str, Any]) -> Path:
    """A run of its own in ``folder``, all that it keeps for others included; its recipe."""
    folder.mkdir(parents=True)
    config = stages.configure(
        folder / "run",
        world_folder / "model",
        world_folder / "pairs.jsonl",
        seed=1,
        **{**INTERVALS, **SMALL, "ref_logps_cache_dir": str(folder / "cache"), **settings},
    )
    recipe = folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(config.model_dump(exclude_defaults=True)), encoding="utf-8")
    return recipe
