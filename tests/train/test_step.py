"""Every saving of a step gives what the step gives without it: the same samples, loss and gradients."""

import pytest
import tiny
import torch
from short_runs import recorded, slow_unless
from torch.testing import assert_close

from hypo_train.build import precompute_ref_logps
from hypo_train.metrics.meter import Meter
from hypo_train.prepare import prepare
from hypo_train.train import train_step

OFF = {
    "trees": {"attn_implementation": "sdpa"},
    "cached reference": {"precompute_ref_log_probs": False},
    "shared trunk": {"share_trunk": False},
    "prompt keys and values": {"reuse_prompt_kv": False},
}
ALL_OFF = {name: value for one in OFF.values() for name, value in one.items()}
WAYS = {
    "full": {},
    "lora": {"use_peft": True, "lora_r": 4, "lora_target_modules": "all-linear"},
    "last layer": {"num_layers_unfrozen": 1},
    "checkpointed": {"gradient_checkpointing": True},
    "checkpointed in part": {"gradient_checkpointing": "selective"},
    "of three micro-batches": {"gradient_accumulation_steps": 3, "per_device_train_batch_size": 2},
    "exact": {"kl_estimator": "exact"},
    "of two prompts online": {"online_fraction": 0.5},
    "of an online prompt, exact": {"online_fraction": 0.25, "kl_estimator": "exact"},
}


@pytest.fixture
def step_of(settings):
    """``step_of(**changes)``: the second step's samples, metrics and gradients, on weights that left the reference."""

    def make(**changes):
        run = prepare(settings(**changes))
        precompute_ref_logps(run, progress=False)
        tiny.perturb(run.policy.trained_parameters().values(), size=0.02)
        run.model.train()
        gradients = {}

        def keep():  # before the optimizer's own
            gradients.update({name: p.grad.clone() for name, p in run.policy.trained_parameters().items()})

        run.optimizer.step = keep
        meter = Meter()
        draws = []
        draw = run.sampler.sample
        run.sampler.sample = lambda *a, **k: draws.append(draw(*a, **k)) or draws[-1]
        train_step(run, 1, meter)
        return [d.completions() for d in draws], meter.read(), gradients

    return make


# All savings off, in every way to train, and each one off alone where a frozen trunk makes all four possible.
@pytest.mark.parametrize(
    ("way", "off"),
    [
        pytest.param(way, off, marks=() if off == "all" or way == "last layer" else pytest.mark.slow)
        for way in WAYS
        for off in [*OFF, "all"]
    ],
)
def test_a_step_without_a_saving_is_the_step_with_all(step_of, way, off):
    exact = WAYS[way].get("kl_estimator") == "exact"
    changes = {**WAYS[way], "precompute_ref_log_probs": None if exact else True}
    samples, metrics, gradients = step_of(**changes)
    others = step_of(**{**changes, **(ALL_OFF if off == "all" else OFF[off])})
    assert others[0] == samples
    for name, value in metrics.items():
        assert others[1][name] == pytest.approx(value, abs=1e-5, rel=1e-5, nan_ok=True), name
    assert gradients.keys() == others[2].keys()
    for name, gradient in gradients.items():
        scale = max(1.0, gradient.abs().max().item())
        assert_close(others[2][name], gradient, atol=1e-5 * scale, rtol=0, msg=name)


@pytest.mark.parametrize("algorithm", slow_unless(["hypo"], ["hypo", "dpo", "sft"]))
@pytest.mark.parametrize("budget", [1, 60, 100_000], ids=["a row each", "several", "one"])
def test_a_budget_of_tokens_cuts_the_step_without_changing_it(settings, algorithm, budget):
    results, cuts = [], []
    for changes in ({}, {"max_tokens_per_micro_batch": budget}):
        run = prepare(settings(algorithm=algorithm, per_device_train_batch_size=8, **changes))
        run.optimizer.step = lambda: None
        run.optimizer.zero_grad = lambda: None
        run.model.train()
        trees, count = [], run.throughput.policy
        run.throughput.policy = lambda tree, rows, trees=trees, count=count: trees.append(tree) or count(tree, rows)
        train_step(run, 0, Meter())
        cuts.append([tree.num_tokens for tree in trees])
        results.append({name: p.grad for name, p in run.policy.trained_parameters().items()})
    assert len(cuts[0]) == 1
    if budget == 60:
        assert 1 < len(cuts[1]) < 8
        assert max(cuts[1]) <= budget
    else:
        assert len(cuts[1]) == {1: 8, 100_000: 1}[budget]
    for name, gradient in results[0].items():
        assert_close(results[1][name], gradient, atol=1e-5, rtol=1e-5)


def test_prompts_run_first_where_every_step_fits_the_budget(settings):
    assert prepare(settings(max_tokens_per_micro_batch=10_000, gradient_accumulation_steps=2)).prompts_run_first
    assert not prepare(settings(max_tokens_per_micro_batch=60)).prompts_run_first


@pytest.mark.parametrize("algorithm", ["dpo", "hypo"])
def test_a_step_computes_prompts_and_reference_only_once(settings, algorithm):
    run = prepare(settings(algorithm=algorithm, precompute_ref_log_probs=True))
    precompute_ref_logps(run, progress=False)
    tokens = []
    run.policy.base.get_decoder().register_forward_pre_hook(
        lambda module, args, kwargs: tokens.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    run.model.train()
    train_step(run, 0, Meter())
    seen = run.throughput.read(steps=1, seconds=1)["tokens_per_second"]
    rows = [run.plan.train_rows[i] for i in run.plan.rows_of_step(0)]
    prompts = sum(len(row.prompt) for row in rows)
    if algorithm == "dpo":
        assert tokens == [seen]
    else:
        first, *decoded, reference, branches = tokens
        assert first == prompts
        assert first + branches == seen
        assert prompts < reference < seen
        assert len(decoded) <= run.rollouts.max_new_tokens  # the prompts are not run again to sample


@pytest.mark.parametrize(
    "changes",
    [
        {"gradient_accumulation_steps": 2},
        {"attn_implementation": "sdpa"},
        {"sampler": "generate"},
        {"rollout_steps": 2},
        {"use_peft": True, "lora_dropout": 0.1},
        {"reuse_prompt_kv": False},
        {"algorithm": "dpo"},
    ],
    ids=str,
)
def test_prompts_run_first_only_where_that_is_exact_and_fits(settings, changes):
    assert prepare(settings()).prompts_run_first
    assert not prepare(settings(**changes)).prompts_run_first


def test_samples_of_an_earlier_policy_are_corrected_and_reported(settings):
    run = recorded(settings(rollout_steps=2, learning_rate=1e-2))
    run.model.train()
    ratios = []
    for step in range(3):
        meter = Meter()
        train_step(run, step, meter)
        ratios.append(meter.read())
    name = "sampling/importance_sampling_ratio/mean"
    assert ratios[0][name] == pytest.approx(1, abs=1e-5)  # drawn in this step
    assert ratios[1][name] != pytest.approx(1, abs=1e-3)  # the weights have moved since
    assert ratios[2][name] == pytest.approx(1, abs=1e-5)
    assert ratios[1]["sampling/effective_sample_size"] < 1 - 1e-4
    assert len(run.sampler.drawn) == 2
    assert torch.isfinite(torch.tensor(list(ratios[1].values()))).all()
