"""Decoding with packed weights; that the draws are the policy's is in test_sampler.py."""

import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.testing import assert_close

from hypo_train.sampling import DecodeSampler
from hypo_train.sampling.decode import packed_weights as packing
from hypo_train.sampling.decode.packed_weights import packed_weights

PROMPTS = [[5, 3, 8, 2], [4], [7, 9, 2, 5]]


def sampler_of(model, **options):
    return DecodeSampler(model, eos_token_ids=(1,), pad_token_id=0, score=True, **options)


def state_of(model):
    """What a layer with a packed weight has besides its own state."""
    return [sorted(vars(module)) for module in model.modules()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 4, 40])
@torch.no_grad()
def test_packed_products_equal_plain_ones(rows, dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(70, 33), nn.Linear(33, 65, bias=False))  # sizes that no block divides
    x = torch.randn(rows, 2, 70).transpose(0, 1)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        plain = model(x)
        with packed_weights(model):
            assert "forward" in vars(model[0])
            packed = model(x)
    assert packed.dtype == plain.dtype == dtype
    truth = model.double()(x.double())
    assert (packed - truth).abs().max() <= 2 * ((plain - truth).abs().max() + torch.finfo(dtype).eps)


@torch.no_grad()
def test_what_cannot_be_packed_is_left_alone():
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    model = nn.Sequential(Doubled(4, 4), nn.Linear(4, 4).double(), nn.Linear(4, 4))
    model[2].forward = own = lambda x: x.float()
    x = torch.randn(3, 4)
    expected = model[0](x)
    with packed_weights(model):
        assert torch.equal(model[0](x), expected)
        assert "forward" not in vars(model[1])
    assert model[2].forward is own


@pytest.mark.parametrize("lora", [False, True])
def test_a_draw_reads_the_current_weights_and_leaves_no_trace(lora):
    model = tiny.new_model("gpt_neox", vocab_size=12, eos_token_id=1, pad_token_id=None)
    if lora:
        model = get_peft_model(model, LoraConfig(r=2, target_modules=["query_key_value"], task_type="CAUSAL_LM"))
    sampler, before = sampler_of(model, pack_weights=True, merge_lora=lora), state_of(model)
    for step in range(2):
        tiny.perturb([p for p in model.parameters() if p.requires_grad], seed=step, size=0.1)
        sampler.weights_changed(step)
        samples = sampler.sample(PROMPTS, 2, 8, seed=1)
        for row, completion in enumerate(samples.completions()):
            expected = tiny.plain_token_logprobs(model.eval(), PROMPTS[row // 2], completion)
            assert_close(samples.logprobs[row, : len(completion)], expected, atol=1e-5, rtol=1e-5)
    assert state_of(model) == before


def test_a_draw_that_fails_leaves_no_trace(monkeypatch):
    model = tiny.new_model("llama", vocab_size=12)
    sampler, before = sampler_of(model, pack_weights=True), state_of(model)
    monkeypatch.setattr(sampler, "_decode", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        sampler.sample(PROMPTS, 2, 8, seed=1)
    assert state_of(model) == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="weights are packed on the CPU only")
def test_only_large_enough_draws_are_worth_packing(monkeypatch):
    rows, tokens = packing._FROM_ROWS, packing._FROM_TOKENS
    sampler, calls = sampler_of(tiny.new_model("llama", vocab_size=12)), []
    reorder = torch.ops.mkldnn._reorder_linear_weight
    monkeypatch.setattr(torch.ops.mkldnn, "_reorder_linear_weight", lambda *args: calls.append(1) or reorder(*args))
    sampler.eos_token_ids = list(range(12))  # every completion ends with its first token
    for n, new, packs in [(rows - 1, tokens, False), (rows, tokens - 1, False), (rows, tokens, True)]:
        calls.clear()
        sampler.sample(PROMPTS[:1], n, new, seed=1)
        assert bool(calls) == packs, (n, new)
