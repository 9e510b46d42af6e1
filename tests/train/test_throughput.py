"""The logged costs of steps: time by phase, FLOPs and rates, memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch

from hypo_train.metrics.flops import ModelFlops, Rates, UncountedError
from hypo_train.metrics.log import read_metrics, without_costs
from hypo_train.metrics.memory import peak_memory
from hypo_train.metrics.throughput import Throughput
from hypo_train.train import train
from hypo_train.trees.pack import Batcher

FLOPS = ModelFlops(
    policy=Rates(10.0, {None: 1.0}, 100.0),
    backward=Rates(20.0, {None: 2.0}, 200.0),
    reference=Rates(7.0, {None: 0.0}, 70.0),
    above_trunk=Rates(3.0, {None: 0.0}, 70.0),
)
PROMPTS, COMPLETIONS = [[5, 20, 6]], [[7, 8, 1], [9, 1]]
TREE = Batcher(tiny.PAD).samples(PROMPTS, COMPLETIONS)  # 3 + 2 + 1 tokens, 6 + 9 + 4 pairs, 5 counted
FORWARD = 60.0 + 19.0 + 500.0


def test_rates_count_all_work_and_parts_are_means():
    throughput = Throughput(FLOPS, peak_flops=1e4)
    for _ in range(2):
        throughput.policy(TREE, num_rows=4)
        throughput.reference(TREE, trunk_known=False)
        throughput.sample(PROMPTS, COMPLETIONS, prompts_known=False)
    found = throughput.read(steps=2, seconds=4.0)
    parts = {"policy": 3 * FORWARD, "reference": 6 * 7.0 + 350.0, "sample": FORWARD}
    per_second = sum(parts.values()) * 2 / 4.0
    assert found == {
        "num_tokens": 12,
        "num_online_samples": 4,
        "tokens_per_second": 3.0,
        "train_samples_per_second": 2.0,
        **{f"flops/{part}": value for part, value in parts.items()},
        "tflops_per_second": pytest.approx(per_second / 1e12),
        "mfu": pytest.approx(per_second / 1e4),
    }


def test_work_of_another_pass_is_not_counted_again():
    throughput = Throughput(FLOPS, peak_flops=None)
    throughput.reference(TREE, trunk_known=True)
    throughput.sample(PROMPTS, COMPLETIONS, prompts_known=True)
    found = throughput.read(steps=1, seconds=1.0)
    assert found["flops/reference"] == 6 * 3.0 + 350.0
    assert found["flops/sample"] == FORWARD - (3 * 10.0 + 6.0)


def test_reading_resets_all_but_the_tokens_of_the_run():
    throughput = Throughput(FLOPS, peak_flops=None)
    throughput.policy(TREE, num_rows=1)
    throughput.read(steps=1, seconds=1.0)
    assert throughput.read(steps=1, seconds=1.0) == {
        "num_tokens": 6,
        "tokens_per_second": 0,
        "train_samples_per_second": 0,
        "tflops_per_second": 0,
    }


def test_unknown_flops_are_not_logged():
    throughput = Throughput(None, peak_flops=1e12)
    throughput.policy(TREE, num_rows=1)
    throughput.reference(TREE, trunk_known=False)
    throughput.sample(PROMPTS, COMPLETIONS, prompts_known=False)
    rates = {"tokens_per_second": 3.0, "train_samples_per_second": 0.5}
    assert throughput.read(steps=1, seconds=2.0) == {"num_tokens": 6, "num_online_samples": 2, **rates}


# In a run


RATES = {"tokens_per_second", "train_samples_per_second", "tflops_per_second", "flops/policy", "memory/peak_gb"}
PHASES = {f"time/{name}" for name in ("data", "forward", "loss", "backward", "optimizer", "other", "step")}


def costs_of(config):
    """Return the costs in each line of training."""
    train(config, progress=False)
    lines = [line for line in read_metrics(Path(config.output_dir) / "metrics.jsonl") if "loss" in line]
    return [{name: line[name] for name in line.keys() - without_costs(line).keys()} for line in lines]


@pytest.mark.parametrize(
    ("algorithm", "more"),
    [
        ("sft", set()),
        ("dpo", {"time/reference"}),
        ("hypo", {"time/reference", "time/sample", "flops/reference", "flops/sample"}),
    ],
)
def test_every_log_line_says_what_its_steps_cost(settings, algorithm, more):
    precomputed = True if algorithm == "dpo" else None
    device = {"memory/reserved_gb"} if torch.cuda.is_available() else set()
    for line in costs_of(settings(algorithm=algorithm, precompute_ref_log_probs=precomputed)):
        assert set(line) == RATES | PHASES | more | device
        phases = sum(value for name, value in line.items() if name.startswith("time/") and name != "time/step")
        assert phases == pytest.approx(line["time/step"])
        for name in RATES | PHASES - {"time/data", "time/other"}:
            assert line[name] > 0, name
        computed = sum(value for name, value in line.items() if name.startswith("flops/"))
        assert line["tflops_per_second"] == pytest.approx(computed / line["time/step"] / 1e12)
        assert line["train_samples_per_second"] == pytest.approx(4 / line["time/step"])


def test_utilisation_is_logged_where_the_peak_is_known(settings):
    for line in costs_of(settings(algorithm="dpo", peak_tflops=0.5)):
        assert line["mfu"] == pytest.approx(line["tflops_per_second"] / 0.5)


def test_evaluations_and_checkpoints_take_no_time_of_a_step(settings, monkeypatch):
    now = 0.0

    def slow(*_, **__):
        nonlocal now
        now += 1000.0

    monkeypatch.setattr("hypo_train.metrics.timing.time.perf_counter", lambda: now)
    monkeypatch.setattr("hypo_train.train._evaluate", slow)
    monkeypatch.setattr("hypo_train.train.save", slow)

    def step(run, number, meter):
        nonlocal now
        now += 2.0

    monkeypatch.setattr("hypo_train.train.train_step", step)
    config = settings(eval_steps=1, save_steps=1, num_eval_rows=4)
    train(config, progress=False)
    assert [line["time/step"] for line in read_metrics(Path(config.output_dir) / "metrics.jsonl")] == [2.0] * 3


def test_a_model_with_unknown_flops_trains_with_a_message(settings, monkeypatch, capsys):
    def unknown(policy):
        raise UncountedError("experts (4, 32, 48) is not the weight of a linear layer")

    monkeypatch.setattr("hypo_train.build.ModelFlops.of", unknown)
    for line in costs_of(settings(algorithm="dpo")):
        assert not any("flops" in name for name in line)
        assert line["tokens_per_second"] > 0
    assert "FLOPs are not logged: experts (4, 32, 48) is not the weight of a linear layer" in capsys.readouterr().out


# Memory


def test_peak_memory_on_a_cpu_is_the_processs():
    before = peak_memory(torch.device("cpu"))
    taken = torch.ones(2**28)  # 1 GiB
    after = peak_memory(torch.device("cpu"))
    del taken
    assert set(before) == {"memory/peak_gb"}
    assert 0.05 < before["memory/peak_gb"] < 64
    assert after["memory/peak_gb"] >= 1.0
    assert peak_memory(torch.device("cpu")) == after, "a peak stays"


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_peak_memory_on_a_gpu_is_since_the_last_call():
    device = torch.device("cuda", 0)
    peak_memory(device)
    base = torch.cuda.memory_allocated(device) / 2**30
    taken = torch.ones(2**28, device=device)
    del taken
    found = peak_memory(device)
    assert found["memory/peak_gb"] == pytest.approx(base + 1, rel=0.01)
    assert found["memory/reserved_gb"] >= found["memory/peak_gb"]
    assert peak_memory(device)["memory/peak_gb"] < base + 0.5
