"""The generate sampler and models whose logits differ in a batch: rows are sampled alone, or the model is refused."""

from __future__ import annotations

import pytest
import tiny
import torch
from torch.testing import assert_close
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    GenerationMixin,
    Llama4TextConfig,
    RecurrentGemmaConfig,
    RwkvConfig,
)

from hypo_train.sampling import Distribution, GenerateSampler

PROMPTS = [[5, 9, 11, 7], [6, 4], [8, 8, 12], [7, 5, 13, 6]]
OPTIONS = {"eos_token_ids": (), "pad_token_id": tiny.PAD}
SIZES = {
    "vocab_size": len(tiny.WORDS),
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "eos_token_id": tiny.EOS,
}
CONFIGS = {
    # A state that padding changes, and in transformers the other rows of a batch too.
    "rwkv": RwkvConfig(vocab_size=len(tiny.WORDS), hidden_size=32, num_hidden_layers=2, bos_token_id=0, eos_token_id=1),
    # A state that padding changes in a pass without a cache.
    "recurrent_gemma": RecurrentGemmaConfig(**SIZES, num_hidden_layers=3, lru_width=32, attention_window_size=8),
    # Queries are scaled by their place in the batch, in layers without RoPE, from 8 tokens on.
    "llama4": Llama4TextConfig(
        **SIZES,
        num_hidden_layers=2,
        intermediate_size_mlp=48,
        num_local_experts=2,
        no_rope_layers=[1, 0],
        floor_scale=8,
    ),
}


@pytest.fixture
def generated(monkeypatch):
    """The number of rows of each call of ``generate``."""
    found, generate = [], GenerationMixin.generate

    def noted(self, **options):
        found.append(len(options["input_ids"]))
        return generate(self, **options)

    monkeypatch.setattr(GenerationMixin, "generate", noted)
    return found


@pytest.mark.parametrize("architecture", ["llama", "gpt_neox", "gpt2", "opt", "mistral", "gemma3_text"])
def test_most_models_are_sampled_in_batches(architecture, generated):
    GenerateSampler(tiny.new_model(architecture), **OPTIONS).sample(PROMPTS, 2, 3, seed=1)
    assert generated == [2, 8]  # the comparison, and the samples


@pytest.mark.parametrize("name", CONFIGS)
def test_rows_that_a_batch_changes_are_sampled_alone(name, generated):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name]).eval()
    tiny.perturb(model.parameters(), size=0.2)
    samples = GenerateSampler(model, score=True, **OPTIONS).sample(PROMPTS, 2, 6, seed=1)
    assert generated[-8:] == [1] * 8
    for row, completion in enumerate(samples.completions()):
        expected = tiny.plain_token_logprobs(model, PROMPTS[row // 2], completion)
        assert_close(samples.logprobs[row], expected, atol=1e-5, rtol=1e-5)
    greedy = GenerateSampler(model, distribution=Distribution(top_k=1), **OPTIONS).sample(PROMPTS, 1, 6, seed=1)
    for prompt, completion in zip(PROMPTS, greedy.completions(), strict=True):
        logits = tiny.plain_logits(model, [*prompt, *completion])[len(prompt) - 1 : -1]
        assert logits.argmax(1).tolist() == completion


def test_a_generate_without_the_models_own_logits_is_refused(monkeypatch):
    model = tiny.new_model("llama")
    forward = model.forward

    def forgetful(input_ids, **options):  # of all tokens before the newest one
        cache = next((name for name in ("cache", "past_key_values") if options.get(name) is not None), None)
        if cache and input_ids.shape[1] == 1:
            options[cache], options["attention_mask"] = DynamicCache(), None
        return forward(input_ids=input_ids, **options)

    monkeypatch.setattr(type(model), "forward", lambda self, **options: forgetful(**options))
    with pytest.raises(ValueError, match="the generate of LlamaForCausalLM gives other logits than a plain forward"):
        GenerateSampler(model, **OPTIONS)
