"""Sliding windows and attention sinks: which layer has which, and trees of rows that are several windows long.

The truth is transformers' own forward pass over a plain row for each sequence.
"""

from __future__ import annotations

import pytest
import tiny
import torch
from policies import model_config
from torch import nn
from torch.testing import assert_close
from transformers import (
    Gemma3TextConfig,
    GPT2Config,
    GptOssConfig,
    Llama4TextConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3NextConfig,
)

from hypo_train.algorithms.preference import preference_loss_call
from hypo_train.algorithms.reference import Reference
from hypo_train.data.rows import Pair
from hypo_train.metrics.flops import Size
from hypo_train.model import checkpointing, exactness
from hypo_train.model.load import make_exact
from hypo_train.model.policy import Policy
from hypo_train.model.positions import LongestRow
from hypo_train.model.tree_model import ModelError
from hypo_train.model.windows import layer_windows, other_window
from hypo_train.trees import layout
from hypo_train.trees.pack import Batcher

OF_LAYERS = {
    "all layers": (MistralConfig(sliding_window=16, num_hidden_layers=2), [16, 16]),
    # Mistral's own code does not read it.
    "all layers, whatever layer_types says": (
        MistralConfig(sliding_window=16, num_hidden_layers=2, layer_types=["full_attention"] * 2),
        [16, 16],
    ),
    "none": (MistralConfig(sliding_window=None, num_hidden_layers=2), [None, None]),
    "a config without the word": (GPT2Config(n_layer=2), [None, None]),
    "from a layer on": (
        Qwen2Config(use_sliding_window=True, sliding_window=8, max_window_layers=1, num_hidden_layers=3),
        [None, 8, 8],
    ),
    "set, but not used": (Qwen2Config(sliding_window=8, max_window_layers=0, num_hidden_layers=2), [None, None]),
    "every other layer": (GptOssConfig(sliding_window=8, num_hidden_layers=4), [8, None, 8, None]),
    "all but every sixth": (Gemma3TextConfig(sliding_window=8, num_hidden_layers=7), [8, 8, 8, 8, 8, None, 8]),
}


@pytest.mark.parametrize(("config", "expected"), OF_LAYERS.values(), ids=OF_LAYERS.keys())
def test_each_layer_has_its_window(config, expected):
    assert layer_windows(config) == expected


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (Llama4TextConfig(), "chunked_attention"),
        (Qwen3NextConfig(), "linear_attention"),
        (Gemma3TextConfig(use_bidirectional_attention=True), "bidirectional"),
    ],
)
def test_a_layer_without_a_plain_window_is_named(config, message):
    with pytest.raises(ValueError, match=message):
        layer_windows(config)


# Trees


ALTERNATING = {"layer_types": ["sliding_attention", "full_attention"]}
ARCHITECTURES = {
    "mistral": {},
    "gemma2": {"attn_logit_softcapping": 2.0},
    "gemma3_text": ALTERNATING,
    "gpt_oss": {},  # with sinks
    "olmo3": ALTERNATING,
    "phi3": {},
    "qwen2": {"use_sliding_window": True, "max_window_layers": 1},
}


def model_of(architecture, window):
    """A tiny model of the architecture; its sinks, which are zero in a new one, have values."""
    model = tiny.new_model(architecture, sliding_window=window, **ARCHITECTURES[architecture])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("sinks"):
                parameter.copy_(torch.tensor([-1.0, 0.0, 1.0, 2.0]))
    return model


def tokens(*lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [tuple(torch.randint(5, len(tiny.WORDS), (n,), generator=generator).tolist()) for n in lengths]


# Prompts, chosen and rejected completions that are longer and shorter than a window of 8.
LENGTHS = [(30, 25, 3), (5, 2, 20), (12, 9, 9), (1, 7, 1)]
PAIRS = [Pair(row, *tokens(*lengths, seed=row)) for row, lengths in enumerate(LENGTHS)]


LONGEST = LongestRow(55, "the longest of PAIRS")


def dpo(chosen, rejected):
    return -nn.functional.logsigmoid(0.1 * (chosen - rejected)).mean()


def plain_logprob(model, prompt, completion):
    logits = model(input_ids=torch.tensor([[*prompt, *completion]]), use_cache=False).logits[0]
    logps = logits[len(prompt) - 1 : -1].log_softmax(-1)
    return logps.gather(1, torch.tensor(completion).unsqueeze(1)).sum()


def gradients_of(loss, model):
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def check_against_plain_rows(architecture, window, *, prompts_first=False, checkpointed=False):
    """Compare loss and all gradients of PAIRS with those of transformers' own forward pass."""
    model = model_of(architecture, window)
    model.set_attn_implementation("eager")  # in transformers 5.17, SDPA leaves out the softcap of Gemma 2
    chosen = torch.stack([plain_logprob(model, pair.prompt, pair.chosen) for pair in PAIRS])
    rejected = torch.stack([plain_logprob(model, pair.prompt, pair.rejected) for pair in PAIRS])
    expected = dpo(chosen, rejected)
    expected_gradients = gradients_of(expected, model)

    policy = make_exact(model, lambda model: Policy(model, is_peft=False), longest=LONGEST)
    assert policy.shares_prompts, policy.why_separate_rows
    if checkpointed:
        checkpointing.enable(model, True, has_dropout=False)
        policy.train()
    tree = Batcher(tiny.PAD).pairs(PAIRS, [])
    config = model_config("-", algorithm="dpo", beta=0.1)
    call = preference_loss_call(tree, Reference(logps=torch.zeros(2 * len(PAIRS))), len(PAIRS), config)
    loss = policy(tree, call, prompts=policy.run_prompts(tree) if prompts_first else None).loss
    assert_close(loss, expected, atol=1e-5, rtol=1e-5)
    gradients = gradients_of(loss, model)
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in expected_gradients.items():
        scale = max(1.0, gradient.abs().max().item())
        assert_close(gradients[name], gradient, atol=1e-5 * scale, rtol=0, msg=lambda m, n=name: f"{n}: {m}")


@pytest.fixture(params=[0, 10**6], ids=["a branch at a time", "a tree at a time"])
def groups(request, monkeypatch):
    monkeypatch.setattr(layout, "SMALL_TREE", request.param)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_loss_and_gradients_are_those_of_plain_rows(architecture, groups):
    check_against_plain_rows(architecture, 8)


@pytest.mark.parametrize("architecture", ["mistral", "gpt_oss"])
def test_prompts_first_and_recomputed_layers_alike(architecture, groups):
    check_against_plain_rows(architecture, 8, prompts_first=True, checkpointed=True)


@pytest.mark.slow
@pytest.mark.parametrize("checkpointed", [False, True], ids=["", "checkpointed"])
@pytest.mark.parametrize("prompts_first", [False, True], ids=["in one call", "prompts first"])
@pytest.mark.parametrize("window", [1, 2, 7, 16, 31, 60])  # a token alone, ..., the longest row but one, all of it
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_window_and_way_gives_plain_rows(architecture, groups, window, prompts_first, checkpointed):
    check_against_plain_rows(architecture, window, prompts_first=prompts_first, checkpointed=checkpointed)


def test_a_window_that_covers_every_row_needs_no_mask_of_its_own():
    results = []
    for window in (None, 55):
        policy = make_exact(model_of("mistral", window), lambda model: Policy(model, is_peft=False), longest=LONGEST)
        tree = Batcher(tiny.PAD).pairs([PAIRS[0]], [])
        assert tree.layout.longest == 54
        results.append(policy(tree, lambda hidden, head: hidden))
        assert all(key[2] is None for key in tree.layout._masks)
    assert torch.equal(*results)


@pytest.mark.parametrize("window", [None, 1, 3, 8, 100])
@pytest.mark.parametrize("shares_prompts", [True, False])
def test_attended_pairs_are_counted_within_the_window(window, shares_prompts):
    tree = Batcher(tiny.PAD, shares_prompts=shares_prompts).pairs(PAIRS[:2], [])
    counted = 0
    for pair in PAIRS[:2]:
        lengths = [len(pair.prompt) + len(completion) - 1 for completion in (pair.chosen, pair.rejected)]
        for start, stop in [(0, len(pair.prompt))] * shares_prompts + [
            (len(pair.prompt) * shares_prompts, length) for length in lengths
        ]:
            counted += sum(min(position + 1, window or 1000) for position in range(start, stop))
    assert Size.of(tree, [window]).attended == {window: counted}


# The proof before training


def test_a_layer_whose_mask_has_another_window_is_named():
    model = model_of("mistral", 5000)
    assert other_window(model, [5000, 5000]) is None
    reason = "a token does not see {} in layer 1, as its config says"
    assert other_window(model, [5000, 4999]) == reason.format("the last 4999 tokens")
    assert other_window(model, [5000, None]) == reason.format("all tokens before it")
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("wrong", [lambda window: window + 1, lambda window: None], ids=["one too long", "none"])
def test_trees_with_a_wrong_window_are_not_taken(monkeypatch, wrong):
    monkeypatch.setattr(exactness, "other_window", lambda *_: None)  # so that the comparison of logits has to see it
    monkeypatch.setattr(
        "hypo_train.model.tree_model.layer_windows", lambda config: [wrong(w) for w in layer_windows(config)]
    )
    policy = make_exact(model_of("mistral", 5000), lambda model: Policy(model, is_peft=False), longest=LONGEST)
    assert "does not keep to trees: logits differ by" in policy.why_separate_rows
    assert policy.base.config.sliding_window == 5000


def test_chunked_attention_takes_separate_rows_with_the_reason():
    model = tiny.new_model("llama", attention_chunk_size=8)
    policy = make_exact(model, lambda model: Policy(model, is_peft=False), longest=LONGEST)
    assert policy.why_separate_rows == "it cannot take trees: it has layers of chunked_attention"


def test_a_window_of_no_tokens_is_refused_by_name():
    # Exported configs write 0 for no window, and transformers then masks every token.
    model = tiny.new_model("mistral", sliding_window=0)
    with pytest.raises(ModelError, match="has sliding_window=0, so that a token would not even see itself: set it to"):
        make_exact(model, lambda model: Policy(model, is_peft=False), longest=LONGEST)


def test_a_model_that_looks_ahead_is_refused():
    model = tiny.new_model("gemma3_text", use_bidirectional_attention=True)
    with pytest.raises(ModelError, match="is no causal language model: a token's logits depend on the tokens after it"):
        make_exact(model, lambda model: Policy(model, is_peft=False), longest=LONGEST)
