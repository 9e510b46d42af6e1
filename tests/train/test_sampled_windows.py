"""Samples of models with sliding windows, against transformers' own forward pass over the whole row without a cache."""

from __future__ import annotations

import pytest
import tiny
import torch
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, GPTNeoConfig

from hypo_train.model.load import make_exact
from hypo_train.model.policy import Policy
from hypo_train.model.positions import LongestRow
from hypo_train.sampling import DecodeSampler, Distribution, GenerateSampler, PromptKV, serves
from hypo_train.sampling.decode import branches
from hypo_train.trees.attention import NAME
from hypo_train.trees.pack import Batcher

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
WINDOW = 8
PROMPTS = [[5, 9, 11, 7], [6], list(range(5, 24)), [8, 8]]  # shorter and longer than the window
ALTERNATING = {"layer_types": ["sliding_attention", "full_attention"]}
ARCHITECTURES = {
    "mistral": {},  # a window in every layer
    "gemma2": {"attn_logit_softcapping": 2.0},
    "gemma3_text": ALTERNATING,  # with another RoPE for layers with a window
    "olmo3": ALTERNATING,
    "gpt_oss": {},  # with sinks
}


def new_model(architecture, attention="eager"):
    model = tiny.new_model(architecture, sliding_window=WINDOW, **ARCHITECTURES[architecture])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("sinks"):  # a new model has none
                parameter.copy_(torch.tensor([-1.0, 0.0, 1.0, 2.0]))
    model.set_attn_implementation(attention)
    return model.to(DEVICE)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("attention", [NAME, "eager"])  # of training on trees and on separate rows
@pytest.mark.parametrize("kind", [DecodeSampler, GenerateSampler])
def test_samples_are_those_of_rows_without_a_cache(architecture, attention, kind):
    model, plain = new_model(architecture, attention), new_model(architecture)
    options = {"eos_token_ids": (), "pad_token_id": tiny.PAD}
    samples = kind(model, score=True, **options).sample(PROMPTS, 3, 4 * WINDOW, seed=1)
    for row, completion in enumerate(samples.completions()):
        expected = tiny.plain_token_logprobs(plain, PROMPTS[row // 3], completion)
        assert_close(samples.logprobs[row], expected, atol=1e-5, rtol=1e-5)
    greedy = kind(model, distribution=Distribution(top_k=1), **options).sample(PROMPTS, 1, 4 * WINDOW, seed=1)
    for prompt, completion in zip(PROMPTS, greedy.completions(), strict=True):
        logits = tiny.plain_logits(plain, [*prompt, *completion])[len(prompt) - 1 : -1]
        assert logits.argmax(1).tolist() == completion


@pytest.mark.parametrize("longest", range(WINDOW - 1, WINDOW + 3))
def test_prompts_that_just_fill_a_window_are_continued_exactly(longest):
    """A window's cache was once rolled a token too early, when it was just full."""
    model = new_model("gemma3_text")
    for kind in (DecodeSampler, GenerateSampler):
        sampler = kind(model, eos_token_ids=(), pad_token_id=tiny.PAD, distribution=Distribution(top_k=1))
        prompt = list(range(5, 5 + longest))
        [completion] = sampler.sample([prompt], 1, 3, seed=1).completions()
        logits = tiny.plain_logits(model, [*prompt, *completion])[longest - 1 : -1]
        assert logits.argmax(1).tolist() == completion


def test_a_window_that_the_model_does_not_have_is_found_out(monkeypatch):
    model = new_model("mistral")
    assert serves(model) is None
    monkeypatch.setattr("hypo_train.sampling.decode.windows.layer_windows", lambda config: [None, None])
    assert "other logits than a plain forward pass" in serves(model)
    assert model.config.sliding_window == WINDOW


def test_local_attention_of_gpt_neo_goes_to_generate():
    config = GPTNeoConfig(hidden_size=32, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]])
    model = AutoModelForCausalLM.from_config(config)
    assert serves(model) == "GPTNeoForCausalLM cannot decode branches of a prompt: it has layers of local attention"


def test_a_window_that_is_ignored_would_be_seen(monkeypatch):
    model = new_model("mistral")
    sampler = DecodeSampler(model, eos_token_ids=(), pad_token_id=tiny.PAD, score=True, capture=False)
    monkeypatch.setattr(branches.Windows, "masks", lambda self, mask, tokens_before: mask)
    samples = sampler.sample(PROMPTS, 1, 4 * WINDOW, seed=1)
    expected = tiny.plain_token_logprobs(model, PROMPTS[0], samples.completions()[0])
    assert (samples.logprobs[0] - expected).abs().max() > 0.1


def test_ended_rows_that_are_dropped_keep_the_others_windows():
    model = new_model("mistral")
    options = {"pad_token_id": tiny.PAD, "score": True}
    ends = DecodeSampler(model, eos_token_ids=tuple(range(5, 9)), **options).sample(PROMPTS, 2, 4 * WINDOW, seed=1)
    assert ends.ended.any()
    for row, completion in enumerate(ends.completions()):
        expected = tiny.plain_token_logprobs(model, PROMPTS[row // 2], completion)
        assert_close(ends.logprobs[row, : len(completion)], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("architecture", ["mistral", "gemma2", "gpt_oss"])
def test_samples_continue_the_trainings_pass_over_the_prompts(architecture):
    policy = make_exact(new_model(architecture), lambda model: Policy(model, is_peft=False), longest=LongestRow(64, ""))
    assert policy.shares_prompts
    with torch.no_grad():
        prompts = policy.run_prompts(Batcher(tiny.PAD).prompts(PROMPTS).to(DEVICE))
        logits = policy.head().next_token_logits(prompts.last_hidden())
    keys, values = zip(*prompts.padded_key_values(), strict=True)
    kv = PromptKV(keys, values, prompts.mask(), logits)
    sampler = DecodeSampler(policy.model, eos_token_ids=(), pad_token_id=tiny.PAD, score=True)
    expected = sampler.sample(PROMPTS, 2, 2 * WINDOW, seed=1)
    found = sampler.sample(PROMPTS, 2, 2 * WINDOW, seed=1, prompt_kv=kv)
    assert found.completions() == expected.completions()
    assert_close(found.logprobs, expected.logprobs, atol=1e-5, rtol=1e-5)
