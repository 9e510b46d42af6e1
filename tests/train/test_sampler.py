"""The conformance suite of the `Sampler` protocol: a new engine is one more entry in ENGINES."""

import copy
import random
from functools import partial

import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model
from torch.testing import assert_close
from transformers import GenerationConfig

from hypo_train.sampling import DecodeSampler, Distribution, GenerateSampler, Samples
from hypo_train.trees.attention import NAME


def kv_bytes(model, tokens):
    """What the keys and values of so many tokens take."""
    config = model.config
    heads = getattr(config, "num_key_value_heads", config.num_attention_heads)
    return tokens * 2 * config.num_hidden_layers * heads * (config.hidden_size // config.num_attention_heads) * 4


def decode_sampler(model, *, max_batch_tokens=None, **options):
    limit = None if max_batch_tokens is None else kv_bytes(model, max_batch_tokens)
    return DecodeSampler(model, max_kv_bytes=limit, **options)


# A factory takes (model, *, eos_token_ids, pad_token_id, distribution, max_batch_tokens, score).
ENGINES = {"generate": GenerateSampler, "decode": decode_sampler}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cuda":  # where "decode" replays graphs
    ENGINES["decode, step by step"] = partial(decode_sampler, capture=False)
EOS, PAD = 1, 0
MOST_LIKELY = Distribution(top_k=1)
# Of different lengths, one of a single token, one that holds the pad and the EOS token.
PROMPTS = [[5, 3, 8, 2], [4], [7, PAD, EOS, 6, 9, 2, 5], [3, 3]]


@pytest.fixture(params=ENGINES)
def engine(request):
    return ENGINES[request.param]


@pytest.fixture(params=["llama", "gpt_neox"])
def architecture(request):
    return request.param


def tiny_model(architecture, vocab_size=12, initializer_range=0.25):
    """Random weights, large enough that the next token's distribution is far from uniform."""
    model = tiny.new_model(
        architecture, vocab_size=vocab_size, initializer_range=initializer_range, eos_token_id=EOS, pad_token_id=None
    )
    return model.to(DEVICE)


def build(engine, model, *, eos_token_ids=(EOS,), pad_token_id=PAD, **options):
    return engine(model, eos_token_ids=eos_token_ids, pad_token_id=pad_token_id, **options)


@torch.no_grad()
def next_token_logprobs(model, tokens):
    """(length, V) in eval mode, from one plain row: no padding, no mask, no cache."""
    was_training = model.training
    model.eval()
    logits = model(input_ids=torch.tensor([tokens], device=DEVICE), use_cache=False).logits[0]
    model.train(was_training)
    return logits.float().log_softmax(-1)


def teacher_forced(model, prompt, completion):
    logprobs = next_token_logprobs(model, prompt + completion)[len(prompt) - 1 : -1]
    return logprobs.gather(1, torch.tensor(completion, device=DEVICE).unsqueeze(1)).squeeze(1)


def assert_scored_as_teacher_forced(model, samples, n=1, prompts=PROMPTS):
    for row, completion in enumerate(samples.completions()):
        expected = teacher_forced(model, prompts[row // n], completion)
        assert_close(samples.logprobs[row, : len(completion)], expected, atol=1e-5, rtol=1e-5)
        assert (samples.logprobs[row, len(completion) :] == 0).all()


def greedy(model, prompt, max_new_tokens):
    """The most likely continuation of one prompt, token by token, up to and including EOS."""
    tokens = []
    while len(tokens) < max_new_tokens and tokens[-1:] != [EOS]:
        tokens.append(next_token_logprobs(model, prompt + tokens)[-1].argmax().item())
    return tokens


def perturb(model, seed):
    """An optimizer step as far as an engine can tell: in place, and far enough to change every choice."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator).to(DEVICE))


# Log-probs


@pytest.mark.parametrize("max_batch_tokens", [None, 40], ids=["one batch", "several batches"])
def test_logprobs_equal_teacher_forcing(engine, architecture, max_batch_tokens):
    model = tiny_model(architecture)
    sampler = build(engine, model, score=True, max_batch_tokens=max_batch_tokens)
    samples = sampler.sample(PROMPTS, 3, 12, seed=1)
    assert samples.logprobs.dtype == torch.float32
    assert_scored_as_teacher_forced(model, samples, n=3)


def test_capped_scores_are_not_nan_for_padded_prompts():
    """Gemma 2's attention, under which a padding token sees no key."""
    model = tiny.new_model("gemma2", vocab_size=12, attn_logit_softcapping=2.0, attn_implementation="eager").to(DEVICE)
    model.set_attn_implementation(NAME)
    samples = build(GenerateSampler, model, score=True).sample(PROMPTS, 2, 6, seed=1)
    assert_scored_as_teacher_forced(model, samples, n=2)


def test_logprobs_follow_temperature_and_truncation(engine, architecture):
    model = tiny_model(architecture)
    sampler = build(engine, model, score=True, distribution=Distribution(1.7, top_k=5, top_p=0.8))
    prompt, n = [5, 3, 8], 64
    samples = sampler.sample([prompt], n, 1, seed=1)
    logits = next_token_logprobs(model, prompt)[-1] / 1.7
    best = logits.sort(descending=True)
    probs = best.values[:5].softmax(0)
    kept = int((probs.cumsum(0) < 0.8).sum()) + 1  # the fewest tokens that hold 0.8 of what top_k left
    assert 1 < kept < 5
    expected = torch.full_like(logits, -torch.inf)
    expected[best.indices[:kept]] = best.values[:kept].log_softmax(0)
    drawn = samples.tokens[:, 0]
    assert set(drawn.tolist()) == set(best.indices[:kept].tolist())
    assert_close(samples.logprobs[:, 0], expected[drawn], atol=1e-5, rtol=1e-5)


def test_logprobs_are_absent_unless_asked_for(engine):
    assert build(engine, tiny_model("llama")).sample(PROMPTS, 1, 2, seed=0).logprobs is None


def test_logprobs_do_not_depend_on_the_rows_scored_at_once(monkeypatch):
    sampler = build(GenerateSampler, tiny_model("llama"), score=True)
    together = sampler.sample(PROMPTS, 2, 6, seed=1)
    monkeypatch.setattr("hypo_train.sampling.generate._SCORE_BYTES", 1)  # a row at a time
    apart = sampler.sample(PROMPTS, 2, 6, seed=1)
    assert_close(apart.logprobs, together.logprobs, atol=1e-6, rtol=1e-6)


# Freshness


def test_the_weights_are_those_of_the_last_update(engine, architecture):
    model = tiny_model(architecture)
    scored = build(engine, model, score=True)
    # The log-probs alone could come from a fresh pass over stale samples: the greedy limit shows the draw.
    most_likely = build(engine, model, distribution=MOST_LIKELY)
    seen = []
    for step in range(3):
        if step:
            perturb(model, seed=step)
            scored.weights_changed(step)
            most_likely.weights_changed(step)
        samples = scored.sample(PROMPTS, 1, 8, seed=1)
        assert samples.version == step
        assert_scored_as_teacher_forced(model, samples)
        drawn = most_likely.sample(PROMPTS, 1, 8, seed=1).completions()
        assert drawn == [greedy(model, prompt, 8) for prompt in PROMPTS]
        seen.append(drawn)
    assert seen[0] != seen[1] != seen[2], "the updates must be large enough to show"


# Distribution


def joint_distribution(model, prompt, temperature=1.0):
    """Exact probability of each (first, second) token; nothing follows an EOS, which stands for itself."""
    first = (next_token_logprobs(model, prompt)[-1] / temperature).softmax(-1).double()
    joint = {}
    for a, p in enumerate(first.tolist()):
        if a == EOS:
            joint[(a,)] = p
            continue
        second = (next_token_logprobs(model, [*prompt, a])[-1] / temperature).softmax(-1).double()
        joint.update({(a, b): p * q for b, q in enumerate(second.tolist())})
    return joint


def chi_square_p_value(completions, joint):
    """Pearson's test, with the cells that expect fewer than five draws taken together."""
    counts = dict.fromkeys(joint, 0)
    for completion in completions:
        counts[tuple(completion)] += 1
    cells = sorted((p * len(completions), counts[key]) for key, p in joint.items())
    rare = [cell for cell in cells if cell[0] < 5]
    cells = [cell for cell in cells if cell[0] >= 5]
    if rare:
        cells.append((sum(e for e, _ in rare), sum(c for _, c in rare)))
    statistic = sum((count - expected) ** 2 / expected for expected, count in cells)
    freedom = torch.tensor((len(cells) - 1) / 2, dtype=torch.float64)
    return torch.special.gammaincc(freedom, torch.tensor(statistic / 2, dtype=torch.float64)).item()


@pytest.mark.parametrize(
    "max_batch_tokens", [None, pytest.param(2500, marks=pytest.mark.slow)], ids=["one batch", "several batches"]
)
def test_the_first_two_tokens_follow_the_joint_distribution(engine, architecture, max_batch_tokens):
    model = tiny_model(architecture)
    prompt = [5, 3, 8]
    # A second, longer prompt makes the rows that are tested left-padded ones.
    sampler = build(engine, model, max_batch_tokens=max_batch_tokens)
    drawn = sampler.sample([prompt, [2] * 6], 8192, 2, seed=1).completions()[:8192]
    assert chi_square_p_value(drawn, joint_distribution(model, prompt)) > 1e-4
    # The test sees a sampler that is a little too cold, and one whose second token ignores the first.
    assert chi_square_p_value(drawn, joint_distribution(model, prompt, temperature=1.15)) < 1e-6
    apart = [drawn[i] if len(drawn[i]) < 2 else [drawn[i][0], drawn[i - 1][-1]] for i in range(len(drawn))]
    assert chi_square_p_value(apart, joint_distribution(model, prompt)) < 1e-6


def test_temperature_is_applied_when_asked_for(engine):
    model = tiny_model("llama")
    drawn = (
        build(engine, model, distribution=Distribution(temperature=1.5)).sample([[5, 3]], 8192, 2, seed=1).completions()
    )
    assert chi_square_p_value(drawn, joint_distribution(model, [5, 3], temperature=1.5)) > 1e-4


def checkpoint_settings(vocab_size):
    """A generation config as hostile as a checkpoint may ship: each of these would change the samples."""
    return GenerationConfig(
        do_sample=True,
        temperature=0.6,
        top_k=50,
        top_p=0.9,
        min_p=0.05,
        typical_p=0.9,
        repetition_penalty=2.0,
        no_repeat_ngram_size=1,
        min_new_tokens=5,
        bad_words_ids=[[3], [4]],
        suppress_tokens=[5, 6],
        begin_suppress_tokens=[7],
        forced_eos_token_id=8,
        exponential_decay_length_penalty=(1, 2.0),
        num_return_sequences=2,
        max_length=9,
        eos_token_id=vocab_size - 1,
        return_dict_in_generate=True,
        output_scores=True,
    )


def test_nothing_is_truncated_by_default(engine, architecture):
    model = tiny_model(architecture, vocab_size=512, initializer_range=0.02)
    model.generation_config = GenerationConfig(do_sample=True, top_k=50, temperature=0.6)
    samples = build(engine, model).sample([[5, 3, 8]], 2000, 1, seed=1)
    assert samples.tokens.unique().numel() > 400  # top_k = 50 leaves 50; near-uniform draws leave about 500


def test_the_checkpoints_generation_config_is_ignored_and_kept(engine, architecture):
    model = tiny_model(architecture, vocab_size=64)
    expected = build(engine, model).sample(PROMPTS, 4, 12, seed=1)
    model.generation_config = shipped = checkpoint_settings(64)
    before = copy.deepcopy(shipped.to_dict())
    samples = build(engine, model).sample(PROMPTS, 4, 12, seed=1)
    assert torch.equal(samples.tokens, expected.tokens)
    assert model.generation_config is shipped
    assert shipped.to_dict() == before


# EOS, padding, ragged prompts


@pytest.mark.parametrize("pad_token_id", [PAD, EOS], ids=["own pad token", "pad is EOS"])
@pytest.mark.parametrize("max_batch_tokens", [None, 60], ids=["one batch", "several batches"])
def test_rows_end_with_their_first_eos(engine, architecture, pad_token_id, max_batch_tokens):
    other_eos, length = 7, 10
    sampler = build(
        engine,
        tiny_model(architecture),
        eos_token_ids=(EOS, other_eos),
        pad_token_id=pad_token_id,
        max_batch_tokens=max_batch_tokens,
    )
    samples = sampler.sample(PROMPTS, 16, length, seed=3)
    assert samples.tokens.shape == samples.mask.shape == (len(PROMPTS) * 16, length)
    assert samples.tokens.dtype == torch.int64
    assert samples.mask.dtype == samples.ended.dtype == torch.bool
    ends = set()
    for tokens, mask, ended, completion in zip(
        samples.tokens.tolist(),
        samples.mask.tolist(),
        samples.ended.tolist(),
        samples.completions(),
        strict=True,
    ):
        size = sum(mask)
        assert mask == [True] * size + [False] * (length - size)
        assert completion == tokens[:size]
        assert tokens[size:] == [pad_token_id] * (length - size)
        assert not {EOS, other_eos} & set(completion[:-1])
        assert ended == (completion[-1] in (EOS, other_eos))
        assert ended or size == length
        ends.add(completion[-1] if ended else None)
    assert ends == {EOS, other_eos, None}, "every way to end must occur"


def test_a_pad_token_that_the_model_draws_counts(engine, architecture):
    samples = build(engine, tiny_model(architecture)).sample(PROMPTS, 32, 6, seed=1)
    assert any(PAD in completion[:-1] for completion in samples.completions())


def test_sampling_stops_when_every_row_has_ended(engine, architecture):
    model = tiny_model(architecture)
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    samples = build(engine, model, eos_token_ids=range(12)).sample(PROMPTS, 2, 64, seed=1)
    assert samples.mask.sum(1).tolist() == [1] * 8
    assert samples.ended.all()
    assert len(calls) <= 16  # an engine may look every few steps


def test_without_an_eos_every_row_is_cut_at_the_limit(engine):
    samples = build(engine, tiny_model("llama"), eos_token_ids=()).sample(PROMPTS, 2, 5, seed=1)
    assert samples.mask.all()
    assert samples.mask.shape == (8, 5)
    assert not samples.ended.any()


@pytest.mark.parametrize("max_batch_tokens", [None, 40, 1], ids=["one batch", "several", "a row each"])
def test_ragged_prompts_decode_as_they_do_alone(engine, architecture, max_batch_tokens):
    model = tiny_model(architecture)
    sampler = build(engine, model, distribution=MOST_LIKELY, max_batch_tokens=max_batch_tokens)
    completions = sampler.sample(PROMPTS, 2, 10, seed=1).completions()
    assert completions == [greedy(model, prompt, 10) for prompt in PROMPTS for _ in range(2)]


def test_a_batch_of_generate_holds_at_most_max_batch_tokens():
    model = tiny_model("llama")
    sizes = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: sizes.append(kwargs["input_ids"].shape[0]), with_kwargs=True
    )
    samples = build(GenerateSampler, model, max_batch_tokens=40).sample(PROMPTS, 3, 6, seed=1)
    assert max(sizes) == 40 // (7 + 6)
    assert len(samples.tokens) == 12


# The caller's model


def lora_model(architecture):
    """A PeftModel whose adapter matters and whose dropout would be seen at once."""
    names = {"llama": ["q_proj", "down_proj", "lm_head"], "gpt_neox": ["query_key_value", "embed_out"]}
    config = LoraConfig(r=4, lora_dropout=0.5, target_modules=names[architecture], task_type="CAUSAL_LM")
    model = get_peft_model(tiny_model(architecture), config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def test_train_mode_checkpointing_and_dropout_keep_the_samples(engine, architecture):
    model = lora_model(architecture)
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    model.train()
    frozen = next(module for name, module in model.named_modules() if name.endswith("layers.1"))
    frozen.eval()  # a caller may hold part of the model in eval mode
    flags = {name: module.training for name, module in model.named_modules()}
    assert len(set(flags.values())) == 2
    drawn = build(engine, model, distribution=MOST_LIKELY).sample(PROMPTS, 1, 8, seed=1).completions()
    samples = build(engine, model, score=True).sample(PROMPTS, 2, 8, seed=1)
    assert {name: module.training for name, module in model.named_modules()} == flags
    assert drawn == [greedy(model, prompt, 8) for prompt in PROMPTS]
    assert_scored_as_teacher_forced(model, samples, n=2)
    with model.disable_adapter():
        assert drawn != [greedy(model, prompt, 8) for prompt in PROMPTS], "the adapter must matter"


def test_the_model_is_put_back_when_sampling_fails(engine):
    model = tiny_model("llama").train()
    sampler, config = build(engine, model), model.generation_config
    attention = model.config._attn_implementation
    random_state = torch.get_rng_state()

    def fail(*_):
        raise RuntimeError("out of memory")

    model.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        sampler.sample(PROMPTS, 1, 2, seed=1)
    assert all(module.training for module in model.modules())
    assert model.generation_config is config
    assert model.config._attn_implementation == attention
    assert torch.equal(torch.get_rng_state(), random_state)


def assert_same(found, expected, path="state"):
    if isinstance(expected, torch.Tensor):
        assert torch.equal(found, expected), path
    elif isinstance(expected, dict):
        assert found.keys() == expected.keys(), path
        for key in expected:
            assert_same(found[key], expected[key], f"{path}/{key}")
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected), path
        for i, (f, e) in enumerate(zip(found, expected, strict=True)):
            assert_same(f, e, f"{path}/{i}")
    else:
        assert found == expected, path


def test_the_trainers_state_is_untouched(engine, architecture):
    model = lora_model(architecture)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    model(input_ids=torch.tensor([PROMPTS[0]], device=DEVICE)).logits.square().sum().backward()
    optimizer.step()

    def state():
        return {
            "addresses": [p.data_ptr() for p in model.parameters()],
            "requires_grad": [p.requires_grad for p in model.parameters()],
            "gradient addresses": [p.grad.data_ptr() for p in trained],
            "values": [p.detach().clone() for p in model.parameters()],
            "gradients": [p.grad.clone() for p in trained],
            "optimizer": copy.deepcopy(optimizer.state_dict()),
            "config": model.config.to_dict(),
            "generation config": model.generation_config.to_dict(),
            "torch rng": torch.get_rng_state(),
            "cuda rng": torch.cuda.get_rng_state_all() if DEVICE == "cuda" else [],
            "python rng": random.getstate(),
        }

    before = state()
    samples = build(engine, model, score=True).sample(PROMPTS, 2, 6, seed=1)
    assert_same(state(), before)
    assert not samples.logprobs.requires_grad


# Seeds


@pytest.mark.parametrize("max_batch_tokens", [None, 40], ids=["one batch", "several batches"])
def test_samples_depend_on_the_seed_not_on_global_random_state(engine, architecture, max_batch_tokens):
    sampler = build(engine, tiny_model(architecture), max_batch_tokens=max_batch_tokens)
    torch.manual_seed(5)
    first = sampler.sample(PROMPTS, 4, 8, seed=1)
    torch.manual_seed(6)
    again = sampler.sample(PROMPTS, 4, 8, seed=1)
    other = sampler.sample(PROMPTS, 4, 8, seed=2)
    assert torch.equal(first.tokens, again.tokens)
    assert first.completions() != other.completions()


@pytest.mark.parametrize("max_batch_tokens", [None, 30], ids=["one batch", "two rows a batch"])
def test_the_samples_of_one_prompt_differ(engine, architecture, max_batch_tokens):
    sampler = build(engine, tiny_model(architecture), eos_token_ids=(), max_batch_tokens=max_batch_tokens)
    completions = sampler.sample([PROMPTS[0]] * 2, 8, 11, seed=1).completions()
    assert len({tuple(completion) for completion in completions}) == 16


def test_rows_are_prompt_by_prompt(engine):
    model = tiny_model("llama")
    completions = build(engine, model, distribution=MOST_LIKELY).sample(PROMPTS, 3, 6, seed=1).completions()
    for row, completion in enumerate(completions):
        assert completion == greedy(model, PROMPTS[row // 3], 6)


# Arguments


@pytest.mark.parametrize(
    ("prompts", "n", "max_new_tokens", "message"),
    [
        ([], 2, 4, "no prompts"),
        ([[1], []], 2, 4, "prompt 1 is empty"),
        ([[1]], 0, 4, "n is 0"),
        ([[1]], 2, 0, "max_new_tokens is 0"),
        ([[1]], 2, -1, "max_new_tokens is -1"),
    ],
)
def test_what_cannot_be_sampled_is_named(engine, prompts, n, max_new_tokens, message):
    with pytest.raises(ValueError, match=message):
        build(engine, tiny_model("llama")).sample(prompts, n, max_new_tokens, seed=0)


@pytest.mark.parametrize("options", [{"temperature": 0.0}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.5}], ids=str)
def test_settings_that_are_no_distribution_are_refused(options):
    with pytest.raises(ValueError, match=f"{next(iter(options))} is"):
        Distribution(**options)


def test_batches_of_nothing_are_refused(engine):
    name = "max_batch_tokens" if engine is GenerateSampler else "max_kv_bytes"
    with pytest.raises(ValueError, match=f"{name} is 0"):
        build(engine, tiny_model("llama"), max_batch_tokens=0)


def test_completions_stop_with_the_mask():
    samples = Samples(
        tokens=torch.tensor([[4, 1, 0], [4, 5, 6], [1, 0, 0]]),
        mask=torch.tensor([[1, 1, 0], [1, 1, 1], [1, 0, 0]], dtype=torch.bool),
        logprobs=None,
        ended=torch.tensor([True, False, True]),
        version=0,
    )
    assert samples.completions() == [[4, 1], [4, 5, 6], [1]]
