"""Train the demo's language model and sample its preference pairs. The paper's experiments use these stages too."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hypo_train.config import Config
from hypo_train.demo import world
from hypo_train.sampling import GenerateSampler
from hypo_train.train import train

SAMPLES_SEED = 10_000  # differs from the seeds of the runs


@dataclass(frozen=True)
class Sizes:
    """Numbers of texts."""

    num_reviews: int = 6000  # that the language model learns from
    num_pairs: int = 1000
    num_held_out: int = 512  # pairs after them, for evaluations


def train_language_model(folder: Path, rng: random.Random, seed: int, sizes: Sizes) -> Path:
    """Train a model of reviews from scratch in ``folder`` and return the model's folder."""
    torch.manual_seed(seed)
    world.save_new_model(folder / "untrained")
    rows = [{"prompt": world.prompt(rng), "completion": f" {world.review(rng)}"} for _ in range(sizes.num_reviews)]
    write_rows(folder / "reviews.jsonl", rows)
    config = configure(
        folder / "sft",
        folder / "untrained",
        folder / "reviews.jsonl",
        seed,
        algorithm="sft",
        learning_rate=3e-3,
        per_device_train_batch_size=64,
        num_train_epochs=3,
        warmup_ratio=0.05,
        num_eval_rows=200,
    )
    return train(config).model_dir


def write_pairs(model_dir: Path, path: Path, rng: random.Random, seed: int, sizes: Sizes) -> dict[int, float]:
    """Sample Bradley–Terry pairs from the language model and write them to ``path``, held-out pairs last.

    Returns the true reward of one additional sample for each held-out row, the baseline for a policy's samples.
    """
    model = AutoModelForCausalLM.from_pretrained(model_dir, use_safetensors=True)
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    sampler = GenerateSampler(model, eos_token_ids=[tokenizer.eos_token_id], pad_token_id=tokenizer.pad_token_id)
    rows: list[dict[str, str]] = []
    batch, wanted = 0, sizes.num_pairs + sizes.num_held_out
    while len(rows) < wanted:
        prompts = [world.prompt(rng) for _ in range(min(512, wanted))]
        drawn = _sample(sampler, tokenizer, prompts, 4, seed=SAMPLES_SEED * (seed + 1) + batch)
        pairs = [_labelled(prompt, texts, rng) for prompt, texts in zip(prompts, drawn, strict=True)]
        rows += [pair for pair in pairs if pair is not None]
        batch += 1
        print(f"  {min(len(rows), wanted)} of {wanted} pairs", flush=True)
    rows = rows[:wanted]
    write_rows(path, rows)
    prompts = [row["prompt"] for row in rows[sizes.num_pairs :]]
    baseline = _sample(sampler, tokenizer, prompts, 1, seed=seed)
    return {
        sizes.num_pairs + i: world.reward(prompt, text)
        for i, (prompt, [text]) in enumerate(zip(prompts, baseline, strict=True))
    }


def _labelled(prompt: str, texts: Sequence[str], rng: random.Random) -> dict[str, str] | None:
    """Return a pair of covered texts, labelled by Bradley–Terry with the true reward; None for fewer than two texts."""
    covered = [text for text in dict.fromkeys(texts) if text and world.is_covered(text)]
    if len(covered) < 2:
        return None
    first, second = covered[:2]
    prefers_first = rng.random() < 1 / (1 + math.exp(world.reward(prompt, second) - world.reward(prompt, first)))
    chosen, rejected = (first, second) if prefers_first else (second, first)
    return {"prompt": prompt, "chosen": f" {chosen}", "rejected": f" {rejected}"}


def _sample(sampler: GenerateSampler, tokenizer: Any, prompts: Sequence[str], n: int, seed: int) -> list[list[str]]:
    """Return ``n`` sampled texts for each prompt."""
    ids = [tokenizer(prompt).input_ids for prompt in prompts]
    completions = sampler.sample(ids, n, world.MAX_COMPLETION_TOKENS, seed=seed).completions()
    texts = tokenizer.batch_decode(completions, skip_special_tokens=True)
    return [texts[i : i + n] for i in range(0, len(texts), n)]


def configure(output_dir: Path, model: Path, data: Path, seed: int, **settings: Any) -> Config:
    """Return a run's configuration; ``settings`` override the world's defaults."""
    defaults = {
        "reward": "hypo_train.demo.world:reward",
        "max_prompt_length": world.MAX_PROMPT_TOKENS,
        "max_completion_length": world.MAX_COMPLETION_TOKENS,
        "dataloader_drop_last": True,  # the published numbers are of full batches
    }
    paths = {"output_dir": str(output_dir), "model_name_or_path": str(model), "dataset_name": str(data)}
    return Config(**{**defaults, **paths, "seed": seed, **settings})


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write ``rows`` to ``path`` as JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
