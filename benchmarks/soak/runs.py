"""Small runs of the demo's world to be killed: each algorithm, way to train and kind of state to restore."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import AutoTokenizer, GPTNeoXConfig, GPTNeoXForCausalLM

from hypo_train.demo import stages, world

NUM_ROWS = 28
# Checkpoints fall between two log lines, whose sums they must hold, and between two draws of samples.
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
    "hypo, GPT-NeoX": {"model_name_or_path": "gpt-neox"},  # its head has another name in the saved file
    "rloo": {"algorithm": "rloo", "rollout_steps": 3, "beta": 0.05},
    "dpo": {"algorithm": "dpo", "optim": "muon"},
    "sft": {"algorithm": "sft", "optim": "adafactor", "use_peft": True, "use_dora": True, "lora_r": 4},
    "reward": {"algorithm": "reward", "reward": None},
}


def make_world(folder: Path) -> None:
    """Save the demo's untrained model, one of another architecture, and reviews as preference pairs."""
    rng = random.Random(0)
    torch.manual_seed(0)
    world.save_new_model(folder / "model")
    _save_gpt_neox(folder / "gpt-neox", folder / "model")
    rows = []
    for _ in range(NUM_ROWS):
        prompt, *texts = world.prompt(rng), world.review(rng), world.review(rng)
        rejected, chosen = sorted(texts, key=lambda text: world.reward(prompt, text))
        rows.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    stages.write_rows(folder / "pairs.jsonl", rows)


def _save_gpt_neox(folder: Path, llama: Path) -> None:
    """Save a small GPT-NeoX with the tokenizer of ``llama``."""
    tokenizer = AutoTokenizer.from_pretrained(llama)
    config = GPTNeoXConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    GPTNeoXForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_recipe(world_folder: Path, folder: Path, settings: dict[str, Any]) -> Path:
    """Write the recipe of a run in ``folder``, with its own cache there, and return its path."""
    folder.mkdir(parents=True)
    own = dict(settings)
    model = own.pop("model_name_or_path", "model")
    config = stages.configure(
        folder / "run",
        world_folder / model,
        world_folder / "pairs.jsonl",
        seed=1,
        **{**INTERVALS, **SMALL, "ref_logps_cache_dir": str(folder / "cache"), **own},
    )
    recipe = folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(config.model_dump(exclude_defaults=True)), encoding="utf-8")
    return recipe
