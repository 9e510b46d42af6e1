"""What only the decoding engine promises; what every engine does is in test_sampler.py."""

from __future__ import annotations

import pytest
import tiny
import torch
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import T5Config, T5ForConditionalGeneration

from hypo_train.sampling import DecodeSampler, Distribution, PromptKV, serves
from hypo_train.sampling.decode import branches
from hypo_train.sampling.decode import sampler as decode
from hypo_train.sampling.protocol import cache_argument

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EOS, PAD = 1, 0
PROMPTS = [[5, 3, 8, 2], [4], [7, PAD, EOS, 6, 9, 2, 5], [3, 3]]


def new_model(architecture="llama", **changes):
    settings = {"vocab_size": 12, "eos_token_id": EOS, "pad_token_id": None}
    return tiny.new_model(architecture, **{**settings, **changes}).to(DEVICE)


def sampler_of(model, **options):
    """Step by step on every device: what is counted here does not run when a graph is replayed."""
    settings = {"eos_token_ids": (EOS,), "pad_token_id": PAD, "score": True, "capture": False}
    return DecodeSampler(model, **{**settings, **options})


def assert_same_draws(found, expected):
    assert found.completions() == expected.completions()
    assert torch.equal(found.ended, expected.ended)
    length = min(found.tokens.shape[1], expected.tokens.shape[1])
    assert_close(found.logprobs[:, :length], expected.logprobs[:, :length], atol=1e-5, rtol=1e-5)


def teacher_forced(model, prompt, completion):
    return tiny.plain_token_logprobs(model, prompt, completion)


# Which models


@pytest.mark.parametrize("architecture", tiny._CONFIGS)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_every_tested_architecture_decodes_with_its_attention(architecture, attention):
    if attention == "sdpa" and architecture in ("gemma2", "gpt_oss"):
        pytest.skip("its softcap or sinks need eager attention")
    model = new_model(architecture, attn_implementation=attention)
    assert serves(model) is None
    samples = sampler_of(model).sample(PROMPTS, 2, 8, seed=1)
    for row, completion in enumerate(samples.completions()):
        expected = teacher_forced(model, PROMPTS[row // 2], completion)
        assert_close(samples.logprobs[row, : len(completion)], expected, atol=1e-5, rtol=1e-5)
    assert model.config._attn_implementation == attention


def test_a_model_it_does_not_serve_is_refused_with_the_reason():
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    cases = {
        "rope_type .dynamic": new_model(rope_parameters=rope),
        "encoder-decoder": T5ForConditionalGeneration(T5Config(vocab_size=12, d_model=8, d_kv=4, d_ff=8, num_layers=1)),
    }
    for reason, model in cases.items():
        with pytest.raises(ValueError, match=reason):
            sampler_of(model)


def test_layers_that_keep_more_than_keys_and_values_are_refused():
    model = new_model("qwen2")
    model.config.layer_types = ["full_attention", "linear_attention"]
    assert "linear_attention" in serves(model)


def test_a_model_that_decodes_wrongly_is_found_out():
    model = new_model()
    attention = model.model.layers[1].self_attn
    plain = attention.forward

    def blind(*args, attention_mask, **kwargs):  # a layer that lets the samples see each other
        if attention_mask is not None and attention_mask.is_floating_point():
            attention_mask = torch.zeros_like(attention_mask)
        return plain(*args, attention_mask=attention_mask, **kwargs)

    attention.forward = blind
    assert "other logits than a plain forward pass" in serves(model)


def test_a_model_without_4d_masks_is_refused_with_its_error():
    model = new_model()
    attention = model.model.layers[0].self_attn
    plain = attention.forward

    def fussy(*args, attention_mask, **kwargs):
        if attention_mask is not None and attention_mask.shape[-2] != attention_mask.shape[-1]:
            raise ValueError("a square mask, please")
        return plain(*args, attention_mask=attention_mask, **kwargs)

    attention.forward = fussy
    assert "a square mask, please" in serves(model)


# Sliding windows


def test_windows_of_several_sizes_go_to_generate():
    model = new_model("mistral", sliding_window=8)
    model.config.layer_types = ["sliding_attention"] * 2
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hypo_train.sampling.decode.windows.layer_windows", lambda config: [4, 8])
        assert serves(model) == (
            "MistralForCausalLM cannot decode branches of a prompt: it has sliding windows of several sizes (4, 8)"
        )


# What goes through the model


def counted_tokens(model):
    """A list that grows by the tokens of every forward pass."""
    counts = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: counts.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    return counts


def test_a_prompt_is_computed_once_for_all_its_samples():
    model = new_model()
    sampler = sampler_of(model, eos_token_ids=())
    counts = counted_tokens(model)
    sampler.sample([[5, 3, 8, 2]] * 3, 4, 6, seed=1)
    assert counts == [12] + [12] * 5  # 3 prompts of 4 tokens, then 3 x 4 new tokens a step


def test_prompts_of_like_length_are_computed_together(monkeypatch):
    model = new_model()
    sampler = sampler_of(model, eos_token_ids=())
    expected = sampler.sample(PROMPTS, 2, 3, seed=1)
    monkeypatch.setattr(decode, "_PREFILL_TOKENS" if DEVICE == "cuda" else "_PREFILL_TOKENS_CPU", 8)
    counts = counted_tokens(model)
    assert_same_draws(sampler.sample(PROMPTS, 2, 3, seed=1), expected)
    assert counts == [2 * 2, 4, 7, 2 * 4, 2 * 4]  # prompts of 1 and 2 tokens, of 4, of 7, then two steps


@torch.no_grad()
def own_prefill(model, prompts, side):
    """The prompts' KV as a trainer's own pass would leave it."""
    length = max(map(len, prompts))
    gaps = [[PAD] * (length - len(prompt)) for prompt in prompts]
    rows = [gap + p if side == "left" else p + gap for gap, p in zip(gaps, prompts, strict=True)]
    seen = [
        [0] * len(g) + [1] * len(p) if side == "left" else [1] * len(p) + [0] * len(g)
        for g, p in zip(gaps, prompts, strict=True)
    ]
    mask = torch.tensor(seen, device=DEVICE)
    position_ids = (mask.cumsum(1) - 1).clamp(min=0)
    out = model(
        input_ids=torch.tensor(rows, device=DEVICE), attention_mask=mask, position_ids=position_ids, use_cache=True
    )
    last = position_ids.argmax(1) if side == "right" else torch.full((len(rows),), length - 1, device=DEVICE)
    layers = out[cache_argument(model)].layers
    return PromptKV(
        keys=[layer.keys for layer in layers],
        values=[layer.values for layer in layers],
        mask=mask.bool(),
        logits=out.logits[torch.arange(len(rows), device=DEVICE), last],
    )


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("architecture", ["llama", "gpt_neox"])
@pytest.mark.parametrize("max_kv_bytes", [None, 1], ids=["one batch", "a prompt each"])
def test_given_prompt_kv_gives_the_same_draws_without_prefill(architecture, side, max_kv_bytes):
    model = new_model(architecture)
    sampler = sampler_of(model, max_kv_bytes=max_kv_bytes)
    expected = sampler.sample(PROMPTS, 3, 8, seed=1)
    kv = own_prefill(model, PROMPTS, side)
    for tensor in [*kv.keys, *kv.values]:  # what an attention kernel may leave in the padding
        tensor.masked_fill_(~kv.mask[:, None, :, None], float("nan"))
    counts = counted_tokens(model)
    assert_same_draws(sampler.sample(PROMPTS, 3, 8, seed=1, prompt_kv=kv), expected)
    assert max(counts) <= 3 * len(PROMPTS)


def test_prompt_kv_of_other_prompts_is_refused():
    model = new_model()
    kv = own_prefill(model, PROMPTS, "left")
    with pytest.raises(ValueError, match="prompt_kv belongs to other prompts"):
        sampler_of(model).sample(PROMPTS[::-1], 2, 4, seed=1, prompt_kv=kv)


# What must not change a draw


@pytest.mark.skipif(DEVICE != "cpu", reason="rows are dropped on the CPU only")
@pytest.mark.parametrize("architecture", ["llama", "gpt_neox"])
def test_dropping_rows_that_have_ended_changes_nothing(architecture, monkeypatch):
    model = new_model(architecture)
    prompts = PROMPTS * 3
    dropped = []
    drop = branches.Branches.drop

    def watched(self, row):
        dropped.append(len(self.token) - 1 - row)
        drop(self, row)

    monkeypatch.setattr(branches.Branches, "drop", watched)
    found = sampler_of(model, eos_token_ids=(EOS, 7, 3)).sample(prompts, 2, 16, seed=1)
    assert len(dropped) > 3
    assert max(dropped) > 0, "a row from the middle must have been dropped too"
    monkeypatch.setattr(branches.Branches, "drop", lambda self, row: None)
    assert_same_draws(found, sampler_of(model, eos_token_ids=(EOS, 7, 3)).sample(prompts, 2, 16, seed=1))


@pytest.mark.parametrize(("tokens", "batches"), [(1, 4), (32, 4), (64, 2), (128, 1)])
def test_batches_that_fit_a_budget_of_kv_change_nothing(tokens, batches, monkeypatch):
    model = new_model()
    expected = sampler_of(model).sample(PROMPTS, 2, 8, seed=1)
    taken = []
    init = branches.Branches.__init__

    def counting(self, *args, **kwargs):
        init(self, *args, **kwargs)
        taken.append(self.nbytes())

    token_bytes = 2 * model.config.num_hidden_layers * model.config.num_key_value_heads * 8 * 4
    sampler = sampler_of(model, max_kv_bytes=tokens * token_bytes)
    monkeypatch.setattr(branches.Branches, "__init__", counting)
    assert_same_draws(sampler.sample(PROMPTS, 2, 8, seed=1), expected)
    single = branches.num_slots(max(map(len, PROMPTS)), 2 * 8)
    assert max(taken) <= max(tokens, single) * token_bytes
    assert len(taken) == batches


def test_a_row_draws_the_same_whatever_its_company():
    sampler = sampler_of(new_model())
    together = sampler.sample(PROMPTS, 2, 8, seed=1).completions()
    other = [[9] * 11 for _ in PROMPTS]
    assert sampler.sample([PROMPTS[0], *other[1:]], 2, 8, seed=1).completions()[:2] == together[:2]


# The draw


def test_a_draw_inverts_the_distribution_function():
    probabilities = torch.tensor([0.0, 0.25, 0.0, 0.5, 0.25, 0.0])
    uniforms = torch.tensor([0.0, 0.2499, 0.25, 0.7499, 0.75, 1 - 2**-53], dtype=torch.float64)
    assert branches.draw(probabilities, uniforms).tolist() == [1, 1, 3, 3, 4, 4]


def test_the_tail_of_a_large_vocabulary_is_drawn():
    size, tail = 131072, 1e-9
    probabilities = torch.full((size,), tail)
    probabilities[0] = 1 - tail * size
    # From the middle of a tail whose tokens are each far below the rounding of 1 in fp32.
    wanted = torch.tensor([size // 4, size // 2, size - 2], dtype=torch.float64)
    exact = probabilities.double()
    uniforms = (exact[0] + tail * (wanted - 0.5)) / exact.sum()
    assert (branches.draw(probabilities, uniforms) - wanted).abs().max() <= 1


class NoSync(TorchDispatchMode):
    """Refuses what makes the host wait for the device."""

    forbidden = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "_unique2", "masked_select")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.__name__.split(".")[0] not in self.forbidden, f"{func} waits for the device"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "options", [{}, {"distribution": Distribution(temperature=1.3, top_k=5, top_p=0.8)}], ids=["plain", "truncated"]
)
@pytest.mark.parametrize("architecture", ["llama", "gpt_neox"])
def test_a_step_never_waits_for_the_device(architecture, options, monkeypatch):
    sampler = sampler_of(new_model(architecture), **options)
    step, steps = branches.Branches.step, []

    def watched(self, width):
        with NoSync():
            step(self, width)
        steps.append(width)

    monkeypatch.setattr(branches.Branches, "step", watched)
    sampler.sample(PROMPTS, 2, 6, seed=1)
    assert steps
    with pytest.raises(AssertionError, match="waits for the device"), NoSync():
        torch.ones(1).item()


# Autocast


def test_under_autocast_draws_come_from_autocast_logits():
    """Three runs: fp32 truth, the model's plain forward under autocast, and the engine under autocast."""
    model = new_model()
    with torch.autocast(DEVICE, torch.bfloat16):
        samples = sampler_of(model).sample(PROMPTS, 4, 12, seed=1)
    rows = [(PROMPTS[row // 4], completion) for row, completion in enumerate(samples.completions())]
    truth = torch.cat([teacher_forced(model, *row) for row in rows])
    with torch.autocast(DEVICE, torch.bfloat16):
        plain = torch.cat([teacher_forced(model, *row) for row in rows])
    error = (samples.logprobs[samples.mask] - truth).abs().max()
    eps = torch.finfo(torch.bfloat16).eps
    assert 1e-4 < error <= 2 * ((plain - truth).abs().max() + eps * truth.abs().max())
