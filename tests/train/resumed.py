"""Kill runs, resume them, and compare them with uninterrupted runs, bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import weights

from hypo_train.build import Run
from hypo_train.checkpoint.state import resume, save
from hypo_train.config import Config
from hypo_train.metrics.log import read_metrics, without_costs
from hypo_train.metrics.meter import Meter
from hypo_train.prepare import prepare
from hypo_train.step import train_step
from hypo_train.train import train

# Checkpoints of 3 and 9 fall between two lines of metrics, that of 6 does not; an evaluation lies in between.
INTERVALS = {"max_steps": 12, "save_steps": 3, "logging_steps": 2, "eval_steps": 4, "num_eval_rows": 4}


class Killed(BaseException):
    """Stands for SIGKILL: no code of the package may catch it."""


def die(monkeypatch, owner, name, nth, *, afterwards=False):
    """Raise Killed in place of the nth call of ``owner.name``, or right after it."""
    original, calls = getattr(owner, name), 0

    def deadly(*arguments, **keywords):
        nonlocal calls
        calls += 1
        if calls == nth and not afterwards:
            raise Killed
        result = original(*arguments, **keywords)
        if calls == nth:
            raise Killed
        return result

    monkeypatch.setattr(owner, name, deadly)


def kill_run(config, owner, name, nth, *, afterwards=False):
    """Train until the nth call of ``owner.name`` kills the run."""
    with pytest.MonkeyPatch.context() as patch:
        die(patch, owner, name, nth, afterwards=afterwards)
        with pytest.raises(Killed):
            train(config, progress=False)
    return config


def resumed(config, **changes):
    """Train from the newest checkpoint on, with ``changes`` to the settings, and return the config."""
    config = config.model_copy(update={"resume_from_checkpoint": "auto", **changes})
    train(config, progress=False)
    return config


def metrics_of(config):
    """Return every line of metrics.jsonl without timings."""
    return [without_costs(line) for line in read_metrics(Path(config.output_dir) / "metrics.jsonl")]


def final_weights(config):
    [file] = (Path(config.output_dir) / "final").glob("*.safetensors")
    return load_file(file)


def assert_same_weights(run, expected):
    weights, expected_weights = final_weights(run), final_weights(expected)
    assert weights.keys() == expected_weights.keys()
    for name, weight in expected_weights.items():
        assert torch.equal(weights[name], weight), name


def assert_same_run(run, expected):
    """Compare metrics, samples and final weights of two runs with ``INTERVALS``, given by their configs."""
    assert metrics_of(run) == metrics_of(expected)
    assert_same_weights(run, expected)
    samples = sorted((Path(expected.output_dir) / "samples").iterdir())
    assert [path.name for path in samples] == [f"step-{step}.jsonl" for step in (0, 12, 4, 8)]
    for path in samples:
        assert (Path(run.output_dir) / "samples" / path.name).read_text() == path.read_text()


def assert_resumes_exactly(config: Config, *, steps: int = 3) -> tuple[Run, Run]:
    """Train a run that is resumed after its first step and one that is not; compare their weights and return both."""
    uninterrupted, stopped = prepare(config), prepare(config)
    for step in range(steps):
        train_step(uninterrupted, step, Meter())
    train_step(stopped, 0, Meter())
    save(stopped, Meter(), 1)
    continued = prepare(config.model_copy(update={"resume_from_checkpoint": "auto"}))
    for step in range(resume(continued, Meter()), steps):
        train_step(continued, step, Meter())
    expected, actual = weights(uninterrupted.trained), weights(continued.trained)
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], weight) for name, weight in expected.items())
    return continued, uninterrupted
