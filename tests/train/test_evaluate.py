"""Held-out metrics against values worked out by hand, and what an evaluation leaves alone."""

from __future__ import annotations

import json
import math
import random
import statistics
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM

from hypo_train.evaluation.held_out import evaluate
from hypo_train.metrics.meter import Meter
from hypo_train.prepare import prepare
from hypo_train.rewards import FunctionReward
from hypo_train.sampling import Samples
from hypo_train.train import train, train_step

LORA = {"use_peft": True, "lora_r": 4, "lora_target_modules": "all-linear", "lora_dropout": 0.3}


def moved_run(config):
    """A prepared run whose policy has left the reference, and the two as plain models."""
    run = prepare(config)
    tiny.perturb(run.policy.trained_parameters().values())
    initial = AutoModelForCausalLM.from_pretrained(config.model_name_or_path).to(run.accelerator.device).eval()
    return run, initial


def log_ratio(run, initial, prompt, completion):
    policy = run.policy.eval().model
    return float(tiny.plain_logprob(policy, prompt, completion) - tiny.plain_logprob(initial, prompt, completion))


class Scripted:
    """A sampler that answers with given completions, in the order of the prompts."""

    live = True

    def __init__(self, completions, device):
        self.completions, self.device, self.calls = list(completions), device, []

    def sample(self, prompts, n, max_new_tokens, *, seed, prompt_kv=None, prompt_indices=None):
        self.calls.append((prompts, n, max_new_tokens))
        drawn = [self.completions.pop(0) for _ in range(len(prompts) * n)]
        width = max(map(len, drawn))
        tokens = torch.tensor([row + [tiny.PAD] * (width - len(row)) for row in drawn], device=self.device)
        mask = torch.tensor([[True] * len(row) + [False] * (width - len(row)) for row in drawn], device=self.device)
        ended = torch.tensor([row[-1] == tiny.EOS for row in drawn], device=self.device)
        return Samples(tokens, mask, None, ended, 0)

    def weights_changed(self, step):
        raise AssertionError("no weight changes in an evaluation")

    def release(self):
        pass


def ids(text):
    return [tiny.WORDS.index(word) for word in text.split()]


# Five held-out rows in batches of two: the last batch is a smaller one. The first three are sampled, twice each.
HELD_OUT = {"num_eval_rows": 5, "per_device_eval_batch_size": 2, "num_eval_prompts": 3, "num_eval_samples": 2}
COMPLETIONS = [
    ids("the film was good <eos>"),
    ids("bad <eos>"),
    ids("the book was very very great"),  # cut: no EOS
    ids("<eos>"),
    ids("a good good song <eos>"),
    ids("it was dull <eos>"),
]


def reward_of(run, function):
    return FunctionReward(function.__name__, function, run.tokenizer)


def kindness(prompt, completion):
    return float(sum(word in tiny.GOOD for word in completion.split()) - len(prompt.split()) / 100)


def error_over_prompts(values):
    """Of the mean of three prompts of two samples each: those of a prompt are not independent."""
    return statistics.stdev([statistics.fmean(values[i : i + 2]) for i in (0, 2, 4)]) / math.sqrt(3)


@pytest.mark.parametrize("algorithm", ["hypo", "dpo", "ipo"])
def test_kl_and_reward_are_means_over_the_samples(settings, algorithm):
    run, initial = moved_run(settings(algorithm=algorithm, **HELD_OUT))
    prompts = [list(row.prompt) for row in run.eval_rows[:3]]
    sampler = Scripted(COMPLETIONS, run.accelerator.device)
    found = evaluate(replace(run, sampler=sampler, reward=reward_of(run, kindness))).metrics
    assert sampler.calls == [(prompts[:2], 2, 8), (prompts[2:], 2, 8)]

    ratios = [log_ratio(run, initial, prompts[i // 2], y) for i, y in enumerate(COMPLETIONS)]
    assert statistics.stdev(ratios) > 0.1
    assert found["eval_kl"] == pytest.approx(sum(ratios) / 6, abs=1e-4)
    assert found["eval_kl_se"] == pytest.approx(error_over_prompts(ratios), abs=1e-4)
    texts = [run.tokenizer.decode(prompt).split() for prompt in prompts]
    rewards = [kind - len(texts[i // 2]) / 100 for i, kind in enumerate([1, 0, 1, 0, 2, 0])]
    assert found["eval_reward"] == pytest.approx(sum(rewards) / 6)
    assert found["eval_reward_se"] == pytest.approx(error_over_prompts(rewards))
    assert found["eval_completions/mean_length"] == pytest.approx((5 + 2 + 6 + 1 + 5 + 4) / 6)
    assert found["eval_completions/clipped_ratio"] == pytest.approx(1 / 6)


@pytest.mark.parametrize("algorithm", ["hypo", "dpo", "ipo"])
def test_accuracy_margin_and_loss_are_means_over_pairs(settings, algorithm):
    beta, smoothing = 0.5, 0.0 if algorithm == "ipo" else 0.1
    rows = tiny.pair_rows()
    rows[1::2] = [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in rows[1::2]]
    shape = {"beta": beta, "label_smoothing": smoothing, "rows": rows, **HELD_OUT}
    run, initial = moved_run(settings(algorithm=algorithm, **shape))
    found = evaluate(run).metrics
    assert [row.row for row in run.eval_rows] == [19, 20, 21, 22, 23]
    chosen = [log_ratio(run, initial, row.prompt, row.chosen) for row in run.eval_rows]
    rejected = [log_ratio(run, initial, row.prompt, row.rejected) for row in run.eval_rows]
    margins = [beta * (a - b) for a, b in zip(chosen, rejected, strict=True)]
    assert 0 < sum(margin > 0 for margin in margins) < 5, "some right, some wrong"
    if algorithm == "ipo":
        losses = [(margin / beta - 1 / (2 * beta)) ** 2 for margin in margins]
    else:
        losses = [0.9 * math.log1p(math.exp(-m)) + 0.1 * math.log1p(math.exp(m)) for m in margins]
    policy = run.policy.eval().model
    expected = {
        "eval_loss": statistics.fmean(losses),
        "eval_rewards/chosen": beta * statistics.fmean(chosen),
        "eval_rewards/rejected": beta * statistics.fmean(rejected),
        "eval_rewards/margins": statistics.fmean(margins),
        "eval_rewards/accuracies": sum(margin > 0 for margin in margins) / 5,
        "eval_logps/chosen": statistics.fmean(
            float(tiny.plain_logprob(policy, row.prompt, row.chosen)) for row in run.eval_rows
        ),
        "eval_logps/rejected": statistics.fmean(
            float(tiny.plain_logprob(policy, row.prompt, row.rejected)) for row in run.eval_rows
        ),
    }
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, abs=1e-4), name


def test_the_loss_of_an_sft_evaluation_is_the_mean_over_tokens(settings):
    run, _ = moved_run(settings(algorithm="sft", **HELD_OUT))
    evaluation = evaluate(replace(run, reward=reward_of(run, kindness)))
    policy = run.policy.eval().model
    total = sum(float(tiny.plain_logprob(policy, row.prompt, row.completion)) for row in run.eval_rows)
    tokens = sum(len(row.completion) for row in run.eval_rows)
    assert len({len(row.completion) for row in run.eval_rows}) > 1, "a mean over rows would differ"
    assert evaluation.metrics["eval_loss"] == pytest.approx(-total / tokens, abs=1e-5)
    assert set(evaluation.metrics) == {
        "eval_loss",
        "eval_reward",
        "eval_reward_se",
        "eval_completions/mean_length",
        "eval_completions/clipped_ratio",
    }
    assert all(sample["kl"] is None for sample in evaluation.samples)


def test_samples_are_kept_with_their_metrics(settings):
    run, initial = moved_run(settings(**HELD_OUT))
    run = replace(run, sampler=Scripted(COMPLETIONS, run.accelerator.device), reward=reward_of(run, kindness))
    samples = evaluate(run).samples
    assert [sample["row"] for sample in samples] == [19, 19, 20, 20, 21, 21]
    first, second, cut, empty = samples[:4]
    prompt = run.tokenizer.decode(run.eval_rows[0].prompt)
    assert (first["prompt"], first["completion"]) == (prompt, "the film was good")
    assert (second["completion"], empty["completion"]) == ("bad", "")
    assert (first["length"], first["ended"], cut["length"], cut["ended"]) == (5, True, 6, False)
    assert first["reward"] == kindness(prompt, "the film was good")
    assert first["kl"] == pytest.approx(log_ratio(run, initial, run.eval_rows[0].prompt, COMPLETIONS[0]), abs=1e-4)
    json.dumps(samples)


@pytest.mark.parametrize("num_eval_samples", [1, 3])
def test_one_prompt_has_no_standard_error(settings, num_eval_samples):
    run, _ = moved_run(settings(num_eval_rows=4, num_eval_prompts=1, num_eval_samples=num_eval_samples))
    metrics = evaluate(run).metrics
    assert math.isfinite(metrics["eval_kl"])
    assert math.isnan(metrics["eval_kl_se"])


def test_the_kl_of_the_untrained_policy_is_zero(settings):
    metrics = evaluate(prepare(settings(num_eval_rows=4))).metrics
    assert metrics["eval_kl"] == metrics["eval_kl_se"] == metrics["eval_rewards/margins"] == 0


def test_the_sampled_kl_estimates_the_true_kl(settings, saved_model):
    # Two tokens at most of a vocabulary of 37: the sum over all of them is the truth.
    many = {"num_eval_rows": 1, "num_eval_prompts": 1, "num_eval_samples": 4096, "max_new_tokens": 2}
    run, initial = moved_run(settings(**many))
    prompt = list(run.eval_rows[0].prompt)
    policy = run.policy.eval().model

    def next_logps(tokens):
        return [tiny.plain_logits(model, tokens)[-1].double().log_softmax(-1) for model in (policy, initial)]

    first, reference = next_logps(prompt)
    exact = float((first.exp() * (first - reference)).sum())
    for token in set(range(len(tiny.WORDS))) - {tiny.EOS}:
        second, reference = next_logps([*prompt, token])
        exact += float(first[token].exp() * (second.exp() * (second - reference)).sum())
    evaluation = evaluate(run)
    error = statistics.stdev(sample["kl"] for sample in evaluation.samples) / math.sqrt(4096)  # given the prompt
    assert exact > 0.1
    assert abs(evaluation.metrics["eval_kl"] - exact) < 4 * error < 0.2 * exact


# What an evaluation leaves alone


def test_an_evaluation_twice_is_the_same(settings):
    run, _ = moved_run(settings(num_eval_rows=6, num_eval_samples=2))
    first = evaluate(run)
    torch.manual_seed(99)
    random.seed(99)
    assert evaluate(run) == first
    assert len({sample["completion"] for sample in first.samples}) > 6, "the samples differ from one another"


def test_a_later_evaluation_samples_from_the_current_weights(settings):
    run, _ = moved_run(settings(num_eval_rows=6))
    before = evaluate(run)
    tiny.perturb(run.policy.trained_parameters().values(), seed=1)
    after = evaluate(run)
    assert after.metrics["eval_kl"] != before.metrics["eval_kl"]
    assert [s["completion"] for s in after.samples] != [s["completion"] for s in before.samples]


@pytest.mark.parametrize("training", [True, False], ids=["training", "not training"])
@pytest.mark.parametrize("way", [{}, LORA, {"num_layers_unfrozen": 1}], ids=["full", "lora", "last layer"])
def test_an_evaluation_leaves_the_training_as_it_was(settings, way, training):
    run = prepare(settings(num_eval_rows=6, **way))
    run.policy.train()
    train_step(run, 0, Meter())
    for parameter in run.policy.trained_parameters().values():
        parameter.grad = torch.ones_like(parameter)
    run.policy.train(training)

    def state():
        return {
            "weights": {name: p.detach().clone() for name, p in run.policy.named_parameters()},
            "gradients": {name: p.grad.clone() for name, p in run.policy.trained_parameters().items()},
            "requires_grad": {name: p.requires_grad for name, p in run.policy.named_parameters()},
            "train flags": {name: module.training for name, module in run.policy.named_modules()},
            "moments": {i: dict(s) for i, s in run.optimizer.state_dict()["state"].items()},
            "rate": run.scheduler.state_dict(),
            "torch": torch.get_rng_state(),
            "python": random.getstate(),
        }

    before = state()
    evaluate(run)
    torch.testing.assert_close(state(), before, rtol=0, atol=0)


def test_a_failing_evaluation_goes_back_to_training(settings):
    run = prepare(settings(num_eval_rows=4))
    run.policy.train()

    def fail(prompt, completion):
        raise RuntimeError("no reward")

    with pytest.raises(RuntimeError, match="no reward"):
        evaluate(replace(run, reward=reward_of(run, fail)))
    assert run.policy.training


def test_evaluating_in_between_does_not_change_what_is_trained(settings):
    weights = []
    for eval_steps in (0, 1):
        folder = f"{settings().output_dir}-{eval_steps}"
        result = train(settings(num_eval_rows=4, eval_steps=eval_steps, output_dir=folder, **LORA), progress=False)
        weights.append((result.model_dir / "adapter_model.safetensors").read_bytes())
    assert weights[0] == weights[1]


def test_samples_are_written_at_each_evaluation(settings):
    config = settings(num_eval_rows=4, eval_steps=2, reward="tiny:reward_of_length")
    train(config, progress=False)
    folder = Path(config.output_dir) / "samples"
    assert sorted(path.name for path in folder.iterdir()) == ["step-0.jsonl", "step-2.jsonl", "step-3.jsonl"]
    for path in folder.iterdir():
        for line in path.read_text(encoding="utf-8").splitlines():
            sample = json.loads(line)
            assert set(sample) == {"row", "prompt", "completion", "reference", "length", "ended", "kl", "reward"}
            assert sample["reward"] == tiny.reward_of_length(sample["prompt"], sample["completion"])


@pytest.mark.parametrize("keep", [False, True], ids=["released", "kept"])
def test_an_evaluation_releases_the_samplers_memory(settings, monkeypatch, keep):
    run = prepare(settings(algorithm="dpo", num_eval_rows=4, keep_sampling_memory=keep))
    released = []
    monkeypatch.setattr(type(run.sampler), "release", lambda _: released.append(True))
    evaluate(run)
    assert bool(released) is not keep
