"""A run that is stopped after its first step and gone on with, beside one that is not."""

from __future__ import annotations

import torch
from tiny import weights

from hypo_train.build import Run, prepare
from hypo_train.checkpoint.state import resume, save
from hypo_train.config import Config
from hypo_train.metrics.meter import Meter
from hypo_train.step import train_step


def resumed_like_whole(config: Config, *, steps: int = 3) -> tuple[Run, Run]:
    """The run that went on and the one that was not stopped, whose trained weights are equal to the bit."""
    whole, stopped = prepare(config), prepare(config)
    for step in range(steps):
        train_step(whole, step, Meter())
    train_step(stopped, 0, Meter())
    save(stopped, Meter(), 1)
    again = prepare(config.model_copy(update={"resume_from_checkpoint": "auto"}))
    for step in range(resume(again, Meter()), steps):
        train_step(again, step, Meter())
    expected, found = weights(whole.trained), weights(again.trained)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())
    return again, whole
