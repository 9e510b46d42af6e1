"""This project's trainer, built from a configuration as ``hypo-train`` does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.step.cases import Case
from benchmarks.step.contender import LEARNING_RATE, Contender
from benchmarks.step.material import SEED, Ids, Material
from benchmarks.step.phases import REST
from benchmarks.step.variants import Variant
from hypo_train.build import precompute_ref_logps
from hypo_train.config import Config
from hypo_train.metrics.meter import Meter
from hypo_train.metrics.timing import OTHER
from hypo_train.prepare import prepare
from hypo_train.sampling import Samples
from hypo_train.step import train_step

BETA, KL_COEF = 0.1, 1.0  # so that both terms matter in the compared gradients


class Ours(Contender):
    def __init__(self, variant: Variant, material: Material, output_dir: Path) -> None:
        super().__init__(material)
        self.run = prepare(config(variant, material, output_dir))
        precompute_ref_logps(self.run, progress=False)
        self.run.model.train()
        self.optimizer = self.run.optimizer
        self._steps = 0
        sampler: Any = self.run.sampler
        sampler.eos_token_ids = []  # no token ends a sample
        self._sample = sampler.sample
        sampler.sample = self._tapped

    def step(self) -> float | None:
        meter = Meter()
        train_step(self.run, self._steps, meter)
        self._steps += 1
        return meter.read()["loss"] if self.run.config.algorithm == "dpo" else None

    def timed_step(self) -> dict[str, float]:
        timer = self.run.timer
        with timer.step():
            self.step()
        phases = {name.removeprefix("time/"): seconds for name, seconds in timer.read().items()}
        del phases["step"]
        rest = phases.pop(OTHER) + phases.pop("data")
        return {**phases, REST: rest}

    def flop(self) -> float | None:
        counts = self.run.throughput.read(steps=1, seconds=1.0)
        return sum(count for name, count in counts.items() if name.startswith("flops/")) or None

    def parameters(self) -> dict[str, torch.nn.Parameter]:
        return {name.removeprefix("model."): p for name, p in self.run.policy.named_parameters()}

    def references(self) -> dict[str, Tensor]:
        return {name.removeprefix("model."): p for name, p in self.run.policy.reference_parameters.items()}

    def seen_pairs(self) -> set[tuple[Ids, Ids, Ids]]:
        rows: Any = self.run.plan.train_rows
        return {(pair.prompt, pair.chosen, pair.rejected) for pair in rows}

    def _tapped(self, prompts: list[list[int]], n: int, *args: Any, **kwargs: Any) -> Samples:
        repeated = [prompt for prompt in prompts for _ in range(n)]
        if self.tap.given is None:
            samples = self._sample(prompts, n, *args, **kwargs)
        else:
            tokens = torch.tensor(self.tap.answer(repeated), device=self.run.accelerator.device)
            ended = torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)
            logps = self._given_logps(repeated, tokens) if self.run.config.rollout_steps > 1 else None
            samples = Samples(tokens, torch.ones_like(tokens, dtype=torch.bool), logps, ended, version=0)
        self.tap.note(repeated, samples.completions())
        return samples

    @torch.no_grad()
    def _given_logps(self, prompts: list[list[int]], tokens: Tensor) -> Tensor:
        """Return the policy's log-probs (N, L) of given completions, by the plain forward pass of transformers."""
        model: Any = self.run.sampler.model  # type: ignore[union-attr]
        device, length = tokens.device, tokens.shape[1]
        sequences = [(*prompt, *completion) for prompt, completion in zip(prompts, tokens.tolist(), strict=True)]
        found: dict[tuple[int, ...], Tensor] = {}
        for ids in set(sequences):
            row = torch.tensor([ids], device=device)
            logps = model(row).logits[0, -length - 1 : -1].float().log_softmax(-1)
            found[ids] = logps.gather(1, row[0, -length:, None])[:, 0]
        return torch.stack([found[ids] for ids in sequences])


def config(variant: Variant, material: Material, output_dir: Path) -> Config:
    """Return the configuration of a case, with the variant's settings on top."""
    case = material.case
    settings: dict[str, Any] = {
        "algorithm": variant.algorithm,
        "output_dir": str(output_dir),
        "seed": SEED,
        "model_name_or_path": str(material.folder),
        "dataset_name": str(material.data),
        "dtype": case.frozen_dtype,
        "bf16": case.autocast,
        "max_prompt_length": case.prompt.high,
        "max_completion_length": max(case.response.high, case.new_tokens),
        "max_new_tokens": case.new_tokens,
        "num_generations": case.num_generations,
        "beta": BETA,
        "kl_coef": KL_COEF,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "max_steps": 1_000_000,
        "precompute_ref_log_probs": True,
        "ref_logps_cache_dir": str(output_dir / "reference"),
        "per_device_train_batch_size": case.micro_pairs,
        "gradient_accumulation_steps": case.pairs // case.micro_pairs,
        **tuning_settings(case),
    }
    return Config(**{**settings, **variant.settings})


def tuning_settings(case: Case) -> dict[str, Any]:
    """Return the Config fields that select the trained weights."""
    settings: dict[str, dict[str, Any]] = {
        "full": {},
        "LoRA": {"use_peft": True, "lora_r": 16, "lora_alpha": 32, "lora_target_modules": "all-linear"},
        "last-k": {"num_layers_unfrozen": case.last_layers},
    }
    return settings[case.tuning]
