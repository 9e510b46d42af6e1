"""Samples of models with sliding windows, against transformers' own forward pass over the whole row without a cache."""

from __future__ import annotations

import pytest
import tiny
import torch
from torch.testing import assert_close

from hypo_train.sampling import DecodeSampler, Distribution, GenerateSampler
from hypo_train.sampling.decode import branches

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
WINDOW = 8
PROMPTS = [[5, 9, 11, 7], [6], list(range(5, 24)), [8, 8]]  # shorter and longer than the window
ALTERNATING = {"layer_types": ["sliding_attention", "full_attention"]}
ARCHITECTURES = {
    "mistral": {},  # a window in every layer
    "gemma2": {"attn_logit_softcapping": 2.0, "attn_implementation": "eager"},
    "gemma3_text": ALTERNATING,  # with another RoPE for layers with a window
    "olmo3": ALTERNATING,
    "gpt_oss": {"attn_implementation": "eager"},  # with sinks
}


def new_model(architecture):
    model = tiny.new_model(architecture, sliding_window=WINDOW, **ARCHITECTURES[architecture])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("sinks"):  # a new model has none
                parameter.copy_(torch.tensor([-1.0, 0.0, 1.0, 2.0]))
    return model.to(DEVICE)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("kind", [DecodeSampler, GenerateSampler])
def test_samples_are_those_of_rows_without_a_cache(architecture, kind):
    model = new_model(architecture)
    options = {"eos_token_ids": (), "pad_token_id": tiny.PAD}
    samples = kind(model, score=True, **options).sample(PROMPTS, 3, 4 * WINDOW, seed=1)
    for row, completion in enumerate(samples.completions()):
        expected = tiny.plain_token_logprobs(model, PROMPTS[row // 3], completion)
        assert_close(samples.logprobs[row], expected, atol=1e-5, rtol=1e-5)
    greedy = kind(model, distribution=Distribution(top_k=1), **options).sample(PROMPTS, 1, 4 * WINDOW, seed=1)
    for prompt, completion in zip(PROMPTS, greedy.completions(), strict=True):
        logits = tiny.plain_logits(model, [*prompt, *completion])[len(prompt) - 1 : -1]
        assert logits.argmax(1).tolist() == completion


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
