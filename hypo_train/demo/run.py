"""The demo's stages, in order: a language model, its preference pairs, DPO and HyPO from the same start."""

from __future__ import annotations

import argparse
import json
import math
import random
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hypo_train.config import Config
from hypo_train.demo import report, world
from hypo_train.sampling import GenerateSampler
from hypo_train.train import train

NUM_REVIEWS = 6000
NUM_PAIRS = 1000
NUM_HELD_OUT = 512
SAMPLES_SEED = 10_000  # away from the seeds of the runs
# Both methods share everything but the algorithm and its λ.
SETTINGS: dict[str, Any] = {
    "beta": 0.1,
    "learning_rate": 5e-4,
    "per_device_train_batch_size": 32,
    "num_train_epochs": 8,
}
METHODS: dict[str, dict[str, Any]] = {
    "dpo": {"algorithm": "dpo"},
    "hypo": {"algorithm": "hypo", "kl_coef": 3e-3, "num_generations": 2},
}


def main(argv: Sequence[str]) -> int:
    """Train, compare, print the table and draw the curves."""
    parser = argparse.ArgumentParser(prog="python -m hypo_train demo", description=world.__doc__)
    parser.add_argument("--output_dir", default="runs/demo", help="folder for everything (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=1, help="how many seeds to average over (default: 1)")
    parser.add_argument("--seed", type=int, default=0, help="the first of them (default: 0)")
    options = parser.parse_args(argv)
    if options.seeds < 1:
        parser.error(f"--seeds {options.seeds}: at least 1")
    started = time.perf_counter()
    output_dir = Path(options.output_dir)
    outcomes = [run_seed(output_dir / f"seed-{s}", s) for s in range(options.seed, options.seed + options.seeds)]
    table = report.table(outcomes)
    (output_dir / "table.md").write_text(table, encoding="utf-8")
    picture = report.draw(outcomes, output_dir / "curves.png")
    print(f"\n{table}\ncurves: {picture}\ntime: {(time.perf_counter() - started) / 60:.1f} minutes")
    return 0


def run_seed(folder: Path, seed: int) -> report.Outcome:
    """Every stage with one seed, in a fresh ``folder``."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    rng = random.Random(seed)
    torch.manual_seed(seed)
    world.save_new_model(folder / "untrained")
    sft = _train_language_model(folder, rng, seed)
    baseline = _write_pairs(sft, folder / "pairs.jsonl", rng, seed)
    runs = {}
    for name, method in METHODS.items():
        print(f"\n{name.upper()}, seed {seed}")
        config = _config(
            folder / name,
            sft,
            folder / "pairs.jsonl",
            seed,
            num_eval_rows=NUM_HELD_OUT,
            num_eval_prompts=NUM_HELD_OUT,
            per_device_eval_batch_size=128,
            eval_steps=62,
            **SETTINGS,
            **method,
        )
        train(config)
        runs[name] = folder / name
    return report.Outcome(seed, runs, baseline)


def _train_language_model(folder: Path, rng: random.Random, seed: int) -> Path:
    print(f"language model, seed {seed}")
    rows = [{"prompt": world.prompt(rng), "completion": world.review(rng)} for _ in range(NUM_REVIEWS)]
    _write_rows(folder / "reviews.jsonl", rows)
    config = _config(
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


def _write_pairs(model_dir: Path, path: Path, rng: random.Random, seed: int) -> dict[int, float]:
    """Bradley–Terry pairs sampled from the language model, the held-out ones last.

    Returns the true reward of one more sample for each held-out row: what a policy's samples are held against.
    """
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    sampler = GenerateSampler(model, eos_token_ids=[tokenizer.eos_token_id], pad_token_id=tokenizer.pad_token_id)
    rows: list[dict[str, str]] = []
    batch = 0
    while len(rows) < NUM_PAIRS + NUM_HELD_OUT:
        prompts = [world.prompt(rng) for _ in range(512)]
        drawn = _sample(sampler, tokenizer, prompts, 4, seed=SAMPLES_SEED * (seed + 1) + batch)
        pairs = [_labelled(prompt, texts, rng) for prompt, texts in zip(prompts, drawn, strict=True)]
        rows += [pair for pair in pairs if pair is not None]
        batch += 1
    rows = rows[: NUM_PAIRS + NUM_HELD_OUT]
    _write_rows(path, rows)
    prompts = [row["prompt"] for row in rows[NUM_PAIRS:]]
    baseline = _sample(sampler, tokenizer, prompts, 1, seed=seed)
    return {
        NUM_PAIRS + i: world.reward(prompt, text)
        for i, (prompt, [text]) in enumerate(zip(prompts, baseline, strict=True))
    }


def _labelled(prompt: str, texts: Sequence[str], rng: random.Random) -> dict[str, str] | None:
    """Two covered texts, labelled by a Bradley–Terry judge of the true reward; None if there are no two."""
    covered = [text for text in dict.fromkeys(texts) if text and world.is_covered(text)]
    if len(covered) < 2:
        return None
    first, second = covered[:2]
    prefers_first = rng.random() < 1 / (1 + math.exp(world.reward(prompt, second) - world.reward(prompt, first)))
    chosen, rejected = (first, second) if prefers_first else (second, first)
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def _sample(sampler: GenerateSampler, tokenizer: Any, prompts: Sequence[str], n: int, seed: int) -> list[list[str]]:
    """``n`` texts for each prompt."""
    ids = [tokenizer(prompt).input_ids for prompt in prompts]
    completions = sampler.sample(ids, n, world.MAX_COMPLETION_TOKENS, seed=seed).completions()
    texts = tokenizer.batch_decode(completions, skip_special_tokens=True)
    return [texts[i : i + n] for i in range(0, len(texts), n)]


def _config(output_dir: Path, model: Path, data: Path, seed: int, **settings: Any) -> Config:
    return Config(
        output_dir=str(output_dir),
        model_name_or_path=str(model),
        dataset_name=str(data),
        seed=seed,
        reward="hypo_train.demo.world:reward",
        max_prompt_length=world.MAX_PROMPT_TOKENS,
        max_completion_length=world.MAX_COMPLETION_TOKENS,
        **settings,
    )


def _write_rows(path: Path, rows: Sequence[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
