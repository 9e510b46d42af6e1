"""Optimizer groups, and the learning rate over a run."""

import json

import pytest
import torch
from torch import nn
from transformers import get_scheduler

from hypo_train.checkpoint.tensors import load_optimizer_state, optimizer_state
from hypo_train.config import Config, ConfigError
from hypo_train.optim import build_optimizer, build_scheduler, lr_at, require_schedule

SCHEDULES = ("linear", "cosine", "constant")


def small_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(7, 4), nn.LayerNorm(4), nn.Linear(4, 3))


def build(model, **options):
    settings = {"learning_rate": 1e-2, "weight_decay": 0.1, "betas": (0.9, 0.95), "eps": 1e-6, **options}
    return build_optimizer(model.named_parameters(), **settings)


def rates(kind, warmup_steps, total_steps):
    return [lr_at(s, kind=kind, warmup_steps=warmup_steps, total_steps=total_steps) for s in range(total_steps + 1)]


def test_weight_decay_is_for_matrices_alone():
    model = small_model()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = build(model)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)  # without a gradient, only the decay moves a parameter
    optimizer.step()
    for name, parameter in model.named_parameters():
        decay = 1 - 1e-2 * 0.1 if parameter.ndim >= 2 else 1
        torch.testing.assert_close(parameter.detach(), before[name] * decay)


def test_settings_reach_adamw():
    for group in build(small_model()).param_groups:
        assert (group["lr"], group["betas"], group["eps"]) == (1e-2, (0.9, 0.95), 1e-6)


def test_frozen_parameters_are_left_out():
    model = small_model()
    model[0].weight.requires_grad_(False)
    optimized = {id(p) for group in build(model).param_groups for p in group["params"]}
    assert optimized == {id(p) for p in model.parameters() if p.requires_grad}


def test_a_model_without_matrices_can_be_trained():
    optimizer = build(nn.LayerNorm(4))
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.0]


@pytest.mark.parametrize("parameters", [[], [("weight", nn.Parameter(torch.ones(2), requires_grad=False))]])
def test_no_trained_parameter_is_an_error(parameters):
    with pytest.raises(ValueError, match="nothing to train"):
        build_optimizer(parameters, learning_rate=1e-3)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_adamw_is_fused_on_cuda():
    assert all(group["fused"] for group in build(small_model().cuda()).param_groups)


@pytest.mark.parametrize("kind", SCHEDULES)
def test_the_rate_starts_at_zero_and_ends_as_documented(kind):
    curve = rates(kind, warmup_steps=4, total_steps=20)
    assert curve[:5] == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert curve[-1] == (1.0 if kind == "constant" else pytest.approx(0.0, abs=1e-12))
    assert curve[4:] == sorted(curve[4:], reverse=True)


@pytest.mark.parametrize("kind", SCHEDULES)
def test_without_warm_up_the_first_rate_is_the_peak(kind):
    assert rates(kind, warmup_steps=0, total_steps=5)[0] == 1.0


def test_the_rate_halfway_through_the_decay():
    assert rates("linear", 2, 10)[6] == 0.5
    assert rates("cosine", 2, 10)[6] == pytest.approx(0.5)
    assert rates("cosine", 2, 10)[4] == pytest.approx(0.5 + 0.5**1.5)


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_the_rate_stays_zero_after_the_last_step(kind):
    assert lr_at(25, kind=kind, warmup_steps=2, total_steps=20) == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("kind", SCHEDULES)
def test_a_warm_up_as_long_as_the_run(kind):
    assert rates(kind, warmup_steps=4, total_steps=4)[:4] == [0.0, 0.25, 0.5, 0.75]


OF_TRANSFORMERS = {
    "constant_with_warmup": {},
    "cosine_with_restarts": {"num_cycles": 2},
    "polynomial": {"power": 2.0, "lr_end": 1e-4},
    "inverse_sqrt": {"timescale": 3},
    "cosine_with_min_lr": {"min_lr": 1e-3},
    "cosine_warmup_with_min_lr": {"min_lr_rate": 0.1, "warmup_lr_rate": 0.2},
    "warmup_stable_decay": {"num_decay_steps": 2, "min_lr_ratio": 0.1},
}


@pytest.mark.parametrize(("warmup_steps", "total_steps"), [(0, 7), (1, 7), (3, 10)])
@pytest.mark.parametrize("kind", [*SCHEDULES, *OF_TRANSFORMERS])
def test_schedules_are_those_of_transformers(kind, warmup_steps, total_steps):
    kwargs = OF_TRANSFORMERS.get(kind, {})

    def curve(build_schedule):
        optimizer = build(small_model())
        scheduler = build_schedule(optimizer)
        rates = []
        for _ in range(total_steps + 1):
            rates.append([group["lr"] for group in optimizer.param_groups])
            optimizer.step()
            scheduler.step()
        return rates

    name = "constant_with_warmup" if kind == "constant" else kind
    ours = curve(lambda optimizer: build_scheduler(optimizer, kind, warmup_steps, total_steps, kwargs))
    theirs = curve(lambda optimizer: get_scheduler(name, optimizer, warmup_steps, total_steps, kwargs))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def test_a_schedule_of_transformers_serves_muon_and_resumes():
    def new():
        model = nn.Linear(4, 3)
        optimizer = build_optimizer(model.named_parameters(), learning_rate=1e-2, optim="muon")
        return optimizer, build_scheduler(optimizer, "cosine_with_min_lr", 1, 6, {"min_lr": 1e-3})

    def advance(optimizer, scheduler, steps):
        for _ in range(steps):
            optimizer.step()
            scheduler.step()
        return [group["lr"] for group in optimizer.param_groups]

    whole, (stopped, its_schedule), (resumed, schedule) = new(), new(), new()
    advance(stopped, its_schedule, 3)
    load_optimizer_state(resumed, *optimizer_state(stopped, keep=True))
    schedule.load_state_dict(json.loads(json.dumps(its_schedule.state_dict())))
    assert advance(resumed, schedule, 2) == advance(*whole, 5)
    assert advance(resumed, schedule, 1) == pytest.approx([1e-3] * len(resumed.param_groups))


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        ({"warmup_ratio": 0.25}, 2),
        ({"warmup_steps": 3}, 3),
        ({"warmup_steps": 0.3}, 3),
        ({"warmup_steps": 5, "warmup_ratio": 0.1}, 5),
    ],
    ids=["a ratio", "steps", "a fraction is rounded up", "steps override the ratio"],
)
def test_the_length_of_the_warm_up(settings, steps):
    assert Config(model_name_or_path="m", dataset_name="d", **settings).num_warmup_steps(10) == steps


@pytest.mark.parametrize(
    ("kind", "kwargs", "problem"),
    [
        ("cosine", {"cycles": 2}, "there is no argument cycles (it takes: num_cycles)"),
        ("linear", {"power": 2}, "there is no argument power (it takes: none)"),
        ("cosine_with_min_lr", None, "One of min_lr or min_lr_rate should be set"),
        ("polynomial", {"lr_end": 1.0}, "lr_end (1.0) must be smaller than initial lr"),
        ("warmup_stable_decay", {"num_stable_steps": 2}, "'num_decay_steps'"),
        ("polynomial", {"power": "much"}, "(it takes: lr_end, power)"),
    ],
)
def test_wrong_arguments_of_a_schedule_are_refused(kind, kwargs, problem):
    config = Config(model_name_or_path="m", dataset_name="d", lr_scheduler_type=kind, lr_scheduler_kwargs=kwargs)
    with pytest.raises(ConfigError, match=r"lr_scheduler_kwargs=.* with lr_scheduler_type=") as error:
        require_schedule(config)
    assert problem in str(error.value)
