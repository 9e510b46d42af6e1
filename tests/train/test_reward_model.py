"""Reward models: trees give the rewards of transformers' own classifier, which a saved one is."""

from __future__ import annotations

import pytest
import tiny
import torch
from short_runs import trained
from torch.testing import assert_close
from transformers import AutoConfig, AutoModelForSequenceClassification, BertConfig, BertForSequenceClassification

from hypo_train.metrics.meter import Meter
from hypo_train.model.reward_model import RewardModel
from hypo_train.model.tree_model import ModelError
from hypo_train.prepare import prepare
from hypo_train.rewards import ClassifierReward, ModelReward
from hypo_train.train import train_step
from hypo_train.trees.pack import Batcher

LORA = {"use_peft": True, "lora_r": 4, "lora_target_modules": "all-linear"}
WAYS = {"full": {}, "lora": LORA, "last layer": {"num_layers_unfrozen": 1}}
PROMPTS = [[5, 6, 7], [8, 9]]
COMPLETIONS = [[10, 11, tiny.EOS], [12, tiny.EOS], [13, 14, 15, 16], [tiny.EOS]]


@pytest.fixture
def reward_settings(settings):
    return lambda **changes: settings(algorithm="reward", **changes)


@pytest.fixture(scope="session")
def saved_classifier(tmp_path_factory):
    """The folder of a tiny reward model with random weights, its padding token as asked for."""

    def save(architecture="llama", *, pad=tiny.PAD, num_labels=1, chat=False):
        folder = tmp_path_factory.mktemp(f"{architecture}-rm")
        torch.manual_seed(1)
        config = tiny.new_config(architecture, num_labels=num_labels)
        config.pad_token_id = pad
        model = AutoModelForSequenceClassification.from_config(config)
        torch.nn.init.normal_(model.score.weight)
        model.save_pretrained(folder)
        tiny.word_tokenizer(chat=chat).save_pretrained(folder)
        return folder

    return save


@torch.no_grad()
def plain_rewards(folder):
    """By transformers' own forward, a row at a time."""
    model = AutoModelForSequenceClassification.from_pretrained(folder, attn_implementation="eager").eval()
    rows = [[*PROMPTS[i // 2], *completion] for i, completion in enumerate(COMPLETIONS)]
    return torch.cat([model(input_ids=torch.tensor([row])).logits[:, 0] for row in rows])


@pytest.mark.parametrize("shares_prompts", [True, False], ids=["trees", "rows"])
@pytest.mark.parametrize("pad", [tiny.PAD, tiny.EOS], ids=["pad", "pad is EOS"])
@pytest.mark.parametrize("architecture", ["llama", "gpt_neox", "qwen2", "gemma2"])
def test_rewards_are_the_classifiers_own(reward_settings, saved_classifier, architecture, pad, shares_prompts):
    folder = saved_classifier(architecture, pad=pad)
    config = reward_settings(model=folder, attn_implementation="auto" if shares_prompts else "eager")
    run = prepare(config)
    assert isinstance(run.trained, RewardModel)
    run.trained.base.config.get_text_config().pad_token_id = pad
    tree = Batcher(pad, shares_prompts=run.trained.shares_prompts).scored(PROMPTS, COMPLETIONS)
    with torch.no_grad():
        rewards = run.trained.rewards(tree.to(run.accelerator.device)).cpu()
    assert_close(rewards, plain_rewards(folder), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("way", WAYS)
def test_a_trained_reward_model_prefers_chosen_and_loads(reward_settings, way):
    config = reward_settings(
        max_steps=30, num_eval_rows=8, learning_rate=1e-2, per_device_train_batch_size=8, **WAYS[way]
    )
    *lines, evaluation = trained(config)
    assert lines[0]["loss"] == pytest.approx(0.7, abs=0.4)
    assert lines[-1]["loss"] < 0.2
    assert lines[-1]["accuracy"] == 1
    assert evaluation["eval_accuracy"] == 1
    assert evaluation["eval_margin"] > 1
    assert "completions/mean_length" not in evaluation
    final = f"{config.output_dir}/final"
    assert AutoConfig.from_pretrained(final).architectures == ["LlamaForSequenceClassification"]
    run = prepare(config.model_copy(update={"model_name_or_path": final, "use_peft": False}))
    tree = run.batcher.scored(PROMPTS, COMPLETIONS).to(run.accelerator.device)
    with torch.no_grad():
        assert_close(run.trained.rewards(tree).cpu(), plain_rewards(final), atol=1e-5, rtol=1e-5)


def test_the_loss_is_bradley_terrys_on_plain_rows(reward_settings, saved_classifier):
    folder = saved_classifier()
    run, meter = prepare(reward_settings(model=folder)), Meter()
    run.model.train()
    train_step(run, 0, meter)
    model = AutoModelForSequenceClassification.from_pretrained(folder, attn_implementation="eager").eval()
    losses = []
    for row in (run.plan.train_rows[i] for i in run.plan.rows_of_step(0)):
        with torch.no_grad():
            chosen, rejected = (
                model(torch.tensor([[*row.prompt, *c]])).logits[0, 0] for c in (row.chosen, row.rejected)
            )
        losses.append(-torch.nn.functional.logsigmoid(chosen - rejected))
    assert meter.read()["loss"] == pytest.approx(float(torch.stack(losses).mean()), abs=1e-5)


def test_an_interrupted_run_goes_on_with_the_same_numbers(reward_settings, tmp_path):
    whole = trained(reward_settings(max_steps=4, save_steps=2, output_dir=str(tmp_path / "whole")))
    part = reward_settings(
        max_steps=4, output_dir=str(tmp_path / "part"), resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2")
    )
    assert trained(part) == whole[2:]


# A reward model as RLOO's reward


@pytest.fixture
def rloo(settings):
    return lambda folder, **changes: settings(algorithm="rloo", reward_model_path=str(folder), **changes)


def test_rloo_learns_from_a_reward_model_of_its_own_tokens(rloo, saved_classifier):
    folder = saved_classifier()
    run = prepare(rloo(folder))
    assert isinstance(run.reward.reward, ModelReward)
    assert not any("reads texts" in line for line in run.notes)
    assert_close(run.reward(PROMPTS, COMPLETIONS).cpu(), plain_rewards(folder), atol=1e-5, rtol=1e-5)
    lines = trained(rloo(folder, num_eval_rows=4))
    assert {"reward", "reward_std", "kl"} <= set(lines[0])
    assert "eval_reward" in lines[-1]


def saved_bert(folder, *, max_position_embeddings):
    """A tiny encoder as reward model, whose tokenizer is not the policies', and that tokenizer."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tiny.WORDS) + 1, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32, num_labels=1, pad_token_id=0, max_position_embeddings=max_position_embeddings,
    )  # fmt: skip
    model = BertForSequenceClassification(config).eval()
    model.save_pretrained(folder)
    tokenizer = tiny.word_tokenizer()
    tokenizer.add_tokens(["another"])
    tokenizer.save_pretrained(folder)
    return model, tokenizer


def test_a_classifier_with_another_tokenizer_reads_texts(rloo, saved_model, tmp_path):
    model, tokenizer = saved_bert(tmp_path / "bert", max_position_embeddings=64)
    run = prepare(rloo(tmp_path / "bert"))
    assert isinstance(run.reward.reward, ClassifierReward)
    assert "the reward model reads texts: its tokenizer is not the policy's" in run.notes
    texts = ["good film", "what is", "tell me about the film"]
    prompts = [tokenizer(text).input_ids for text in texts]
    completions = [
        [*tokenizer("very good").input_ids, tiny.EOS],
        [tiny.EOS],
        tokenizer("the walk was very dull").input_ids,
    ]
    rewards = run.reward(prompts, completions).cpu()
    whole = ["good film very good", "what is", "tell me about the film the walk was very dull"]
    with torch.no_grad():
        plain = torch.cat([model(torch.tensor([tokenizer(text).input_ids])).logits[:, 0] for text in whole])
    assert_close(rewards, plain, atol=1e-5, rtol=1e-5)


def test_a_too_long_text_is_truncated_on_the_left(rloo, tmp_path):
    model, tokenizer = saved_bert(tmp_path / "bert", max_position_embeddings=4)
    run = prepare(rloo(tmp_path / "bert"))  # whose prompts and completions may have 24 tokens
    words = tokenizer("tell me about the film it was good").input_ids
    with torch.no_grad():
        plain = model(torch.tensor([words[-4:]])).logits[:, 0]
    assert_close(run.reward([words[:5]], [words[5:]]).cpu(), plain, atol=1e-5, rtol=1e-5)


def test_a_language_model_is_no_reward_model(rloo, saved_model):
    with pytest.raises(ModelError, match="gives 2 labels: a reward model has one"):
        prepare(rloo(saved_model()))


def test_several_labels_are_no_reward(rloo, saved_classifier):
    with pytest.raises(ModelError, match="gives 3 labels: a reward model has one"):
        prepare(rloo(saved_classifier(num_labels=3)))


def test_a_classifier_without_padding_is_refused(rloo, saved_classifier):
    with pytest.raises(ModelError, match="its config has no pad_token_id"):
        prepare(rloo(saved_classifier(pad=None)))
