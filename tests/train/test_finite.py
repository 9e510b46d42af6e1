"""A run with NaN or infinity stops, names the step, keeps its rows and saves nothing from that step on."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

import hypo_train.step as one_step
from hypo_train.algorithms import preference
from hypo_train.cli import main
from hypo_train.metrics.meter import FiniteWatch
from hypo_train.prepare import prepare
from hypo_train.train import train
from hypo_train.utils.errors import NotFiniteError


def poisoned(patch, nth, value=math.nan):
    """Multiply the loss of the ``nth`` micro-batch by ``value``."""
    micro_batch_loss, count = preference.micro_batch_loss, 0

    def loss(*arguments):
        nonlocal count
        count += 1
        return micro_batch_loss(*arguments) * (value if count == nth else 1.0)

    patch.setattr(preference, "micro_batch_loss", loss)


@pytest.fixture
def long_run(settings):
    return lambda **changes: settings(**{"max_steps": 12, "save_steps": 4, "logging_steps": 5, **changes})


@pytest.mark.parametrize("value", [math.nan, pytest.param(math.inf, marks=pytest.mark.slow)], ids=str)
def test_a_bad_step_is_named_kept_and_not_saved(long_run, monkeypatch, value):
    config = long_run(algorithm="dpo")
    with monkeypatch.context() as patch:
        poisoned(patch, 7, value)
        with pytest.raises(NotFiniteError, match=r"step 7: the loss or its gradient is not finite") as caught:
            train(config, progress=False)
    folder = Path(config.output_dir)
    assert f"{folder}/checkpoint-4 was saved before that step: --resume repeats it with the same rows" in str(
        caught.value
    )
    assert [path.name for path in folder.glob("checkpoint-*")] == ["checkpoint-4"]
    assert not (folder / "final").exists()
    run = prepare(config)
    records = [json.loads(line) for line in (folder / "not-finite-step-7.jsonl").read_text().splitlines()]
    assert [record["ids"]["chosen"] for record in records] == [
        list(run.plan.train_rows[i].chosen) for i in run.plan.rows_of_step(6)
    ]
    assert all(record["chosen"] == run.tokenizer.decode(record["ids"]["chosen"]) for record in records)
    again = config.model_copy(update={"resume_from_checkpoint": "auto"})
    kept = (folder / "not-finite-step-7.jsonl").read_bytes()
    with monkeypatch.context() as patch:
        poisoned(patch, 3, value)  # counted from the checkpoint
        with pytest.raises(NotFiniteError, match=r"step 7: the loss or its gradient is not finite"):
            train(again, progress=False)
    assert (folder / "not-finite-step-7.jsonl").read_bytes() == kept
    # Without the poison, the run continues from the checkpoint.
    assert train(again, progress=False).model_dir.is_dir()


def test_broken_weights_of_the_last_update_are_not_saved(long_run, monkeypatch):
    """No later loss would show them."""
    config = long_run(algorithm="dpo", max_steps=3, save_steps=0)
    update, steps = one_step._update, []

    def breaks(run):
        norm = update(run)
        steps.append(norm)
        if len(steps) == 3:
            next(iter(run.trained.trained_parameters().values())).data[0] = math.nan
        return norm

    monkeypatch.setattr(one_step, "_update", breaks)
    with pytest.raises(NotFiniteError, match="step 3: the weights after its update are not finite; its rows are in"):
        train(config, progress=False)
    assert not [*Path(config.output_dir).glob("checkpoint-*"), *Path(config.output_dir).glob("final")]


def test_samples_are_kept_and_a_replay_draws_the_same(long_run, monkeypatch):
    config = long_run(algorithm="hypo", num_generations=2)
    drawn = []
    draw = one_step._samples
    monkeypatch.setattr(one_step, "_samples", lambda *arguments: drawn.append(draw(*arguments)) or drawn[-1])
    kept = Path(config.output_dir) / "not-finite-step-7.jsonl"
    with monkeypatch.context() as patch:
        poisoned(patch, 7)
        with pytest.raises(NotFiniteError, match="checkpoint-4 was saved before that step: --resume repeats it with"):
            train(config, progress=False)
    found = kept.read_text()
    records = [json.loads(line) for line in found.splitlines()]
    assert [sample for record in records for sample in record["ids"]["samples"]] == drawn[6].completions
    run = prepare(config)
    assert all(
        record["samples"] == [run.tokenizer.decode(sample) for sample in record["ids"]["samples"]] for record in records
    )
    kept.unlink()
    with monkeypatch.context() as patch:
        poisoned(patch, 3)
        with pytest.raises(NotFiniteError, match="step 7"):
            train(config.model_copy(update={"resume_from_checkpoint": "auto", "logging_steps": 1}), progress=False)
    assert kept.read_text() == found


@pytest.mark.parametrize("sampler", ["decode", pytest.param("generate", marks=pytest.mark.slow)])
def test_a_sampler_error_from_bad_weights_is_explained(long_run, monkeypatch, sampler):
    with monkeypatch.context() as patch:
        poisoned(patch, 1, math.inf)
        with pytest.raises(NotFiniteError, match=r"step [123]: .* There is no checkpoint yet"):
            train(long_run(sampler=sampler, max_grad_norm=0), progress=False)
    monkeypatch.setattr(one_step, "_samples", lambda *_: {}["a fault"])
    again = long_run(output_dir=f"{long_run().output_dir}-again")
    with pytest.raises(KeyError, match="a fault"):
        train(again, progress=False)


def test_a_far_too_high_learning_rate_gets_advice(long_run):
    with pytest.raises(NotFiniteError, match=r"step [23]: .* In a new run, a lower learning_rate"):
        train(long_run(learning_rate=1e30, lr_scheduler_type="constant", max_grad_norm=0), progress=False)


def test_the_command_line_exits_with_1(long_run, tmp_path, monkeypatch, capfd):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(long_run(algorithm="dpo").to_yaml(), encoding="utf-8")
    poisoned(monkeypatch, 3)
    assert main(["--config", str(recipe)]) == 1
    assert capfd.readouterr().err.count("hypo_train: step 3: the loss or its gradient is not finite") == 1


def test_the_first_bad_step_is_named():
    watch = FiniteWatch(torch.device("cpu"))
    assert watch.first_bad() is None
    for step, value in enumerate([1.0, math.inf, 2.0, math.nan]):
        watch.see(step, torch.tensor(value))
    assert watch.first_bad() == 1
