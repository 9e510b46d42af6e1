"""Short runs of tiny models, and recorders of what their steps draw and compute."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from hypo_train.metrics.log import read_metrics, without_costs
from hypo_train.metrics.meter import Meter
from hypo_train.prepare import prepare
from hypo_train.train import train, train_step

LORA = {"use_peft": True, "lora_r": 4, "lora_target_modules": "all-linear"}
LORA_HEAD = {**LORA, "lora_target_modules": ["q_proj", "v_proj", "lm_head"]}
LAST_LAYER = {"num_layers_unfrozen": 1}

# TRL's names, for its users' dashboards.
OF_PAIRS = {
    "loss",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/accuracies",
    "rewards/margins",
    "logps/chosen",
    "logps/rejected",
}
OF_SAMPLES = {"kl", "kl_se", "completions/mean_length", "num_online_samples"}
OF_STEPS = {"step", "grad_norm", "learning_rate", "epoch", "num_tokens"}

# Two passes of one model over the same rows need not have the same bits: a BLAS may add in another order where a buffer
# is aligned differently (MKL's AVX2 code does). Log-probs of these tiny runs are below 40 nats, so their fp32 rounding
# is below 40 * 2**-23, and the difference of two of them below twice that: 1e-5.
ROUNDING = 1e-5


def slow_unless(quick, cases):
    """Return ``cases`` for a parametrize, marked slow but for those in ``quick``."""
    return [case if case in quick else pytest.param(case, marks=pytest.mark.slow) for case in cases]


def metrics_of(config):
    return read_metrics(Path(config.output_dir) / "metrics.jsonl")


def without_timings(lines):
    return [without_costs(line) for line in lines]


def trained(config):
    """Train a run and return its metrics without timings."""
    train(config, progress=False)
    return without_timings(metrics_of(config))


class RecordedSampler:
    """A sampler that keeps its prompts, samples and seeds."""

    def __init__(self, sampler):
        self.sampler = sampler
        self.live, self.takes_prompt_kv = sampler.live, sampler.takes_prompt_kv
        self.prompts, self.drawn, self.seeds = [], [], []

    def sample(self, prompts, n, max_new_tokens, *, seed, prompt_kv=None, prompt_indices=None):
        samples = self.sampler.sample(prompts, n, max_new_tokens, seed=seed, prompt_kv=prompt_kv)
        self.prompts.append(prompts)
        self.drawn.append(samples)
        self.seeds.append(seed)
        return samples

    def weights_changed(self, step):
        self.sampler.weights_changed(step)

    def release(self):
        self.sampler.release()


class RecordedOptimizer:
    """An optimizer that keeps the gradients of each step."""

    def __init__(self, run):
        self.optimizer, self.policy, self.gradients = run.optimizer, run.policy, []

    def step(self):
        self.gradients.append(
            {name: p.grad.clone() for name, p in self.policy.trained_parameters().items() if p.grad is not None}
        )
        self.optimizer.step()

    def __getattr__(self, name):
        return getattr(self.optimizer, name)


def recorded(config):
    """Return a prepared run that keeps its samples and gradients."""
    run = prepare(config)
    run.model.train()
    return replace(run, sampler=RecordedSampler(run.sampler), optimizer=RecordedOptimizer(run))


def steps(run, count, first=0):
    meter = Meter()
    for step in range(first, first + count):
        train_step(run, step, meter)
    return meter.read()
