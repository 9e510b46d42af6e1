"""Sampling from a copy of the weights: LoRA merged into it, or another dtype."""

import copy

import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model
from torch.testing import assert_close

from hypo_train.sampling import DecodeSampler
from hypo_train.sampling.decode import sampler as decode
from hypo_train.sampling.merged_weights import MergedWeights, merged_weights

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EOS, PAD = 1, 0
PROMPTS = [[5, 3, 8, 2], [4], [7, 9, 2, 5]]
TARGETS = {"llama": ["q_proj", "down_proj", "lm_head"], "gpt_neox": ["query_key_value", "dense_h_to_4h"]}


def lora_model(architecture="llama", **options):
    """An adapter that matters, over a frozen base; GPT-NeoX's layers have biases."""
    base = tiny.new_model(architecture, vocab_size=12, eos_token_id=EOS, pad_token_id=None)
    config = LoraConfig(r=4, lora_dropout=0.5, target_modules=TARGETS[architecture], task_type="CAUSAL_LM", **options)
    model = get_peft_model(base, config).to(DEVICE)
    tiny.perturb([p for name, p in model.named_parameters() if "lora_B" in name], size=0.2)
    return model


def trained(model):
    return [p for p in model.parameters() if p.requires_grad]


def sampler_of(model, **options):
    return DecodeSampler(model, eos_token_ids=(EOS,), pad_token_id=PAD, score=True, **options)


def assert_drawn_from(model, samples, n):
    """Every log-prob is the live model's own, by a plain forward pass."""
    was_training = model.training
    model.eval()
    for row, completion in enumerate(samples.completions()):
        expected = tiny.plain_token_logprobs(model, PROMPTS[row // n], completion)
        assert_close(samples.logprobs[row, : len(completion)], expected, atol=1e-5, rtol=1e-5)
    model.train(was_training)


@pytest.mark.parametrize("architecture", TARGETS)
def test_merged_lora_draws_from_the_weights_of_the_last_update(architecture):
    model = lora_model(architecture).train()
    sampler = sampler_of(model, merge_lora=True)
    for step in range(3):
        if step:
            tiny.perturb(trained(model), seed=step, size=0.2)
            sampler.weights_changed(step)
        samples = sampler.sample(PROMPTS, 3, 8, seed=1)
        assert samples.version == step
        assert not sampler.live
        assert_drawn_from(model, samples, 3)
    assert model.training


def test_an_update_that_nobody_announced_is_seen_too():
    model = lora_model()
    sampler = sampler_of(model, merge_lora=True)
    before = sampler.sample(PROMPTS, 2, 6, seed=1)
    optimizer = torch.optim.SGD(trained(model), lr=1.0)
    for parameter in trained(model):
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    after = sampler.sample(PROMPTS, 2, 6, seed=1)
    assert_drawn_from(model, after, 2)
    assert not torch.equal(before.logprobs, after.logprobs)


def test_an_adapter_that_is_switched_off_takes_no_part():
    model = lora_model()
    sampler = sampler_of(model, merge_lora=True)
    sampler.sample(PROMPTS, 2, 6, seed=1)
    with model.disable_adapter():
        assert_drawn_from(model, sampler.sample(PROMPTS, 2, 6, seed=1), 2)
    assert_drawn_from(model, sampler.sample(PROMPTS, 2, 6, seed=1), 2)


def test_merging_and_not_merging_draw_the_same():
    model = lora_model()
    merged, unmerged = (sampler_of(model, merge_lora=choice).sample(PROMPTS, 3, 8, seed=1) for choice in (True, False))
    assert merged.completions() == unmerged.completions()


def test_only_long_responses_are_worth_a_copy():
    sampler = sampler_of(lora_model())
    sampler.eos_token_ids = list(range(12))  # every response ends with its first token
    limit = decode._MERGE_FROM_TOKENS
    for max_new_tokens, live in [(limit - 1, True), (limit, False), (limit - 1, True)]:
        sampler.sample(PROMPTS, 1, max_new_tokens, seed=1)
        assert sampler.live == live
    sampler.sample(PROMPTS, 1, limit, seed=1)
    sampler.release()
    assert sampler.live


def test_a_merged_copy_shares_all_unchanged_weights():
    model = lora_model()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    addresses = [p.data_ptr() for p in model.parameters()]
    copied = MergedWeights(model, None)
    tiny.perturb([own for own, _, _ in copied._copies], size=1.0)
    assert [p.data_ptr() for p in model.parameters()] == addresses
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]), name
    owned = {own.data_ptr() for own, _, _ in copied._copies}
    assert len(owned) == 2 * 2 + 1  # two layers' adapted projections, and the head
    shared = [p for p in copied.model.parameters() if p.data_ptr() not in owned]
    assert {p.data_ptr() for p in shared} <= set(addresses)
    assert not any("lora" in name for name, _ in copied.model.named_modules())


def test_weights_cast_once_give_the_same_logits_as_autocast():
    model = tiny.new_model("gpt_neox", vocab_size=12, tie_word_embeddings=True).to(DEVICE)
    copied = MergedWeights(model, torch.bfloat16)
    ids = torch.tensor([[3, 1, 4, 1, 5]], device=DEVICE)
    with torch.no_grad(), torch.autocast(DEVICE, torch.bfloat16):
        assert torch.equal(copied.model(input_ids=ids).logits, model(input_ids=ids).logits)
    tiny.perturb(model.parameters())
    assert copied.is_stale()
    copied.refresh()
    assert not copied.is_stale()
    with torch.no_grad(), torch.autocast(DEVICE, torch.bfloat16):
        assert torch.equal(copied.model(input_ids=ids).logits, model(input_ids=ids).logits)


def test_adapters_that_are_more_than_lora_and_dora_are_refused():
    model = lora_model("gpt_neox", lora_bias=True)
    with pytest.raises(ValueError, match="is not plain LoRA or DoRA on a linear layer"):
        sampler_of(model, merge_lora=True).sample(PROMPTS, 1, 2, seed=1)
    sampler = sampler_of(model)
    sampler.eos_token_ids = list(range(12))  # long responses are asked for, none is drawn
    assert_drawn_from(model, sampler.sample(PROMPTS, 1, decode._MERGE_FROM_TOKENS, seed=1), 1)
    assert sampler.live, "left to itself, the sampler decodes from what cannot be merged as it is"


@pytest.mark.parametrize("merge_lora", [True, False])
def test_dora_draws_from_the_weights_of_the_last_update(merge_lora):
    model = lora_model(use_dora=True).train()
    sampler = sampler_of(model, merge_lora=merge_lora)
    for step in range(2):
        tiny.perturb(trained(model), seed=step, size=0.2)
        sampler.weights_changed(step)
        assert_drawn_from(model, sampler.sample(PROMPTS, 3, 8, seed=1), 3)


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"use_rslora": True}], ids=lambda o: next(iter(o), "lora"))
@pytest.mark.parametrize("architecture", TARGETS)
def test_merged_weights_match_a_model_without_adapters(architecture, options):
    model = lora_model(architecture, **options)
    tiny.perturb(trained(model), size=0.2)  # a magnitude of DoRA starts as the length of its row
    found = dict(merged_weights(model))
    merged = copy.deepcopy(model).merge_and_unload()
    expected = dict(merged.named_parameters())
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert_close(found[name], tensor.detach(), atol=1e-6, rtol=1e-6)
