"""RLHF by RLOO: its gradient is that of reward − beta · KL, on separate plain rows; a run earns more reward."""

from __future__ import annotations

from dataclasses import replace

import pytest
import tiny
import torch
from short_runs import recorded, steps, trained
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from hypo_train.config import ConfigError
from hypo_train.data.errors import DataError
from hypo_train.data.rows import Prompt
from hypo_train.data.tokens import tokenize
from hypo_train.model.tree_model import ModelError
from hypo_train.prepare import prepare
from hypo_train.rewards import FunctionReward
from hypo_train.train import train


def kindness(prompt, completion):
    """A reward that a config can name: kind words less unkind ones."""
    words = completion.split()
    return float(sum(w in tiny.GOOD for w in words) - sum(w in tiny.BAD for w in words))


def nothing(prompt, completion):
    return None


RLOO = {"algorithm": "rloo", "reward": "test_rloo:kindness", "beta": 0.05}


@pytest.fixture
def rloo(settings):
    return lambda **changes: settings(**{**RLOO, **changes})


@pytest.mark.parametrize("way", [{}, {"gradient_accumulation_steps": 2}, {"attn_implementation": "sdpa"}])
def test_the_gradient_of_a_step_is_rloos_on_reward_less_kl(rloo, saved_model, way):
    k, beta, gamma, penalty = 3, 0.3, 0.1, 2.0
    config = rloo(
        num_generations=k, beta=beta, length_penalty=gamma, missing_eos_penalty=penalty, max_grad_norm=0,
        learning_rate=1e-2, max_new_tokens=6, **way,
    )  # fmt: skip
    run = recorded(config)
    steps(run, 2)  # away from the reference, where all ratios are 0
    device = run.accelerator.device
    model = AutoModelForCausalLM.from_pretrained(saved_model()).to(device).eval()
    initial = AutoModelForCausalLM.from_pretrained(saved_model()).to(device).eval()
    model.load_state_dict({name: value.clone() for name, value in run.policy.model.state_dict().items()})
    metrics = steps(run, 1, first=2)

    rows = [run.plan.train_rows[i] for i in run.plan.rows_of_step(2)]
    samples = run.sampler.drawn[2].completions()
    assert {sample[-1] == tiny.EOS for sample in samples} == {True, False}, "some samples end and some are cut"
    total, costs, ratios = 0, [], []
    for i, row in enumerate(rows):
        of_prompt = samples[i * k : (i + 1) * k]
        logps = torch.stack([_logprob(model, row.prompt, sample) for sample in of_prompt])
        ratio = logps.detach() - torch.stack([tiny.plain_logprob(initial, row.prompt, sample) for sample in of_prompt])
        rewards = torch.tensor([_reward(run, sample, penalty) for sample in of_prompt], device=device)
        cost = beta * (ratio + gamma * torch.tensor([len(s) for s in of_prompt], device=device)) - rewards
        baseline = (cost.sum() - cost) / (k - 1)
        total = total + ((cost - baseline) * logps).sum() / (len(rows) * k)
        costs.append(cost)
        ratios.append(ratio)
    total.backward()
    expected = {name: p.grad for name, p in model.named_parameters()}
    found = run.optimizer.gradients[2]
    assert {name.removeprefix("model.") for name in found} <= set(expected)
    for name, gradient in found.items():
        assert_close(gradient, expected[name.removeprefix("model.")], atol=1e-5, rtol=1e-4, msg=name)
    assert max(gradient.abs().max() for gradient in found.values()) > 1e-3
    assert metrics["loss"] == pytest.approx(float(torch.cat(costs).mean()), abs=1e-4)
    assert metrics["kl"] == pytest.approx(float(torch.cat(ratios).mean()), abs=1e-4)


def _logprob(model, prompt, completion):
    """() with its gradient, from a plain row."""
    ids = torch.tensor([[*prompt, *completion]], device=model.device)
    logps = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1].float().log_softmax(-1)
    return logps.gather(1, ids[0, len(prompt) :, None]).sum()


def _reward(run, completion, penalty):
    text = run.tokenizer.decode(completion, skip_special_tokens=True)
    return kindness("", text) - penalty * (completion[-1] != tiny.EOS)


def test_training_earns_more_reward(rloo):
    config = rloo(max_steps=40, per_device_train_batch_size=8, num_generations=4, learning_rate=1e-2, num_eval_rows=4)
    lines = trained(config)
    rewards = [line["reward"] for line in lines if "reward" in line]
    assert sum(rewards[-5:]) / 5 > sum(rewards[:5]) / 5 + 1
    evaluation = lines[-1]
    assert {"eval_reward", "eval_reward_se", "eval_kl", "eval_kl_se"} <= set(evaluation)
    assert "eval_loss" not in evaluation


def test_a_higher_beta_keeps_the_policy_nearer_to_its_reference(rloo, tmp_path):
    kls = []
    for beta in (0.01, 3.0):
        config = rloo(
            beta=beta, max_steps=25, learning_rate=1e-2, num_generations=4, output_dir=str(tmp_path / f"{beta}")
        )
        kls.append([line["kl"] for line in trained(config)][-1])
    assert kls[1] < 0.5 * kls[0]


def test_an_interrupted_run_goes_on_with_the_same_numbers(rloo, tmp_path):
    changes = {"max_steps": 6, "rollout_steps": 3}
    whole = trained(rloo(save_steps=2, save_total_limit=3, output_dir=str(tmp_path / "whole"), **changes))
    checkpoint = str(tmp_path / "whole" / "checkpoint-4")
    part = rloo(output_dir=str(tmp_path / "part"), resume_from_checkpoint=checkpoint, **changes)
    assert trained(part) == whole[4:]


def test_a_run_with_another_reward_is_no_continuation(rloo):
    train(rloo(), progress=False)
    other = rloo(reward="tiny:reward_of_length", resume_from_checkpoint="auto")
    with pytest.raises(ConfigError, match="reward was 'test_rloo:kindness' and is 'tiny:reward_of_length'"):
        train(other, progress=False)


def test_a_reward_that_is_no_number_is_named_with_its_text(rloo):
    with pytest.raises(
        ValueError, match=r"reward='test_rloo:nothing' gave None for '.*': it must give a finite number"
    ):
        train(rloo(reward="test_rloo:nothing"), progress=False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reward": None}, "algorithm=rloo without a reward: set reward"),
        ({"num_generations": 1}, "num_generations=1: rloo compares the samples of a prompt"),
        ({"reward_model_path": "rm"}, "choose one"),
        ({"kl_estimator": "exact"}, "only hypo has this estimator"),
        ({"precompute_ref_log_probs": True}, "precompute_ref_log_probs=true with algorithm=rloo"),
    ],
)
def test_settings_that_do_not_fit_are_refused(rloo, changes, message):
    with pytest.raises(ValueError, match=message):
        rloo(**changes)


# Prompts


LIMITS = {"max_prompt_length": 16, "max_completion_length": 8, "eos_token_ids": [tiny.EOS]}


def test_prompts_are_those_of_the_pairs():
    rows = tiny.pair_rows()
    alone, _ = tokenize(Prompt, [{"prompt": row["prompt"]} for row in rows], tiny.word_tokenizer(), **LIMITS)
    of_pairs, _ = tokenize(Prompt, rows, tiny.word_tokenizer(), **LIMITS)
    assert [row.prompt for row in alone] == [row.prompt for row in of_pairs]
    assert [row.num_tokens for row in alone] == [len(row.prompt) for row in alone]


def test_chat_prompts_end_where_the_assistant_begins():
    tokenizer = tiny.word_tokenizer(chat=True)
    messages = [{"role": "user", "content": "tell me about the film"}]
    (row,), _ = tokenize(Prompt, [{"prompt": messages}], tokenizer, **LIMITS)
    assert tokenizer.decode(row.prompt).replace("\n", " ").split()[-2:] == ["<|im_start|>", "assistant"]


def test_data_without_prompts_is_refused():
    with pytest.raises(DataError, match="prompts are the column 'prompt', or the common beginning"):
        tokenize(Prompt, [{"text": "a"}], tiny.word_tokenizer(), **LIMITS)


def test_an_evaluation_scores_the_texts_of_its_samples(rloo):
    run = prepare(rloo(num_eval_rows=2))
    function = FunctionReward("length", tiny.reward_of_length, run.tokenizer)
    prompts, completions = [[5, 6], [7]], [[8, 9, tiny.EOS], [8, tiny.EOS], [9, 9, 9], [tiny.EOS]]
    assert replace(run, reward=function).reward(prompts, completions).tolist() == [2.0, 1.0, 3.0, 0.0]


def test_a_missing_reward_model_is_named(rloo):
    with pytest.raises(ModelError, match=r"reward_model_path: there is no folder './nowhere'"):
        prepare(rloo(reward=None, reward_model_path="./nowhere"))
