"""Model FLOPs from lengths equal those that torch counts while the pass runs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import tiny
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from hypo_train.algorithms.preference import preference_loss_call
from hypo_train.algorithms.reference import Reference
from hypo_train.data.rows import Pair
from hypo_train.metrics.devices import peak_bf16
from hypo_train.metrics.flops import ModelFlops, Size, UncountedError
from hypo_train.model.head_functions import sequence_logprobs_call
from hypo_train.model.load import load_policy
from hypo_train.trees.pack import Batcher

aten = torch.ops.aten

LORA = {"use_peft": True, "lora_r": 4, "lora_target_modules": "all-linear"}
WAYS = {
    "full": {},
    "lora": LORA,
    "lora in the attention": {**LORA, "lora_target_modules": ["o_proj"]},
    "lora, head": {**LORA, "lora_target_modules": ["q_proj", "v_proj", "lm_head"]},
    "last layer": {"num_layers_unfrozen": 1},
    "last layers, checkpointing": {"num_layers_unfrozen": 2, "gradient_checkpointing": True},
}
PAIRS = [
    Pair(row=0, prompt=(5, 20, 6, 21, 9), chosen=(7, 8, 1), rejected=(11, 1)),
    Pair(row=1, prompt=(6, 9), chosen=(12, 3, 4, 1), rejected=(3, 1)),
]
SAMPLES = [[7, 1], [9, 9, 1], [4, 1], [1]]


def linear_flops(counter):
    """Return the FLOPs of plain matrix products; attention's are batched, or in one kernel."""
    counts = counter.get_flop_counts()["Global"]
    return counts.get(aten.mm, 0) + counts.get(aten.addmm, 0)


def without_attention(rates):
    return rates._replace(attended={})


@pytest.fixture
def policy_of(settings, saved_model):
    def load(architecture="llama", **changes):
        config = settings(model=saved_model(architecture, num_hidden_layers=3), algorithm="hypo", **changes)
        return config, load_policy(config, autocast=False)

    return load


@pytest.mark.parametrize("way", WAYS)
def test_linear_layers_and_head_cost_what_torch_counts(policy_of, way):
    config, policy = policy_of(**{**WAYS[way], "impl": "reference"})
    flops = ModelFlops.of(policy)
    policy.eval()  # where checkpointing computes nothing again
    tree = Batcher(tiny.PAD, shares_prompts=policy.shares_prompts).pairs(PAIRS, SAMPLES)
    size = Size.of(tree)
    loss = preference_loss_call(tree, Reference(logps=torch.zeros(8)), len(PAIRS), config)
    with FlopCounterMode(display=False) as forward:
        out = policy(tree, loss)
    assert linear_flops(forward) == without_attention(flops.policy).of(size)
    with FlopCounterMode(display=False) as backward:
        out.loss.backward()
    assert linear_flops(backward) == without_attention(flops.backward).of(size)


@pytest.mark.parametrize("way", ["full", "lora, head", "last layer"])
def test_the_references_passes_cost_what_torch_counts(policy_of, way):
    config, policy = policy_of(**WAYS[way])
    flops, tree = ModelFlops.of(policy), Batcher(tiny.PAD).samples([[5, 20, 6], [8, 2]], SAMPLES)
    trunk = policy.run_trunk(tree)
    for known, rates in ((None, flops.reference), (trunk, flops.above_trunk)):
        with FlopCounterMode(display=False) as counter:
            policy.reference(tree, sequence_logprobs_call(tree, config), trunk=known)
        assert linear_flops(counter) == without_attention(rates).of(Size.of(tree))
    assert (trunk is not None) == (flops.above_trunk != flops.reference)


@pytest.mark.parametrize("frozen", [False, True])
def test_attention_costs_what_torch_counts_of_a_full_square(policy_of, frozen):
    # GPT-2 has no rotary embeddings, so its only batched products are attention's.
    _, policy = policy_of("gpt2", attn_implementation="eager", num_layers_unfrozen=1 if frozen else None)
    flops = ModelFlops.of(policy)
    pairs = [replace(pair, chosen=(7, 8, 1), rejected=(9, 9, 1), prompt=(5, 20, 6)) for pair in PAIRS]
    tree = Batcher(tiny.PAD, shares_prompts=False).pairs(pairs, [])
    rows, width = tree.input_ids.shape
    assert tree.num_tokens == rows * width, "no padding, which torch would count"
    square = Size.of(tree)._replace(attended={None: rows * width * width})
    with FlopCounterMode(display=False) as forward:
        out = policy(tree, lambda hidden, head: hidden.sum())
    assert forward.get_flop_counts()["Global"][aten.bmm] == flops.policy.attended[None] * square.attended[None]
    with FlopCounterMode(display=False) as backward:
        out.backward()
    assert backward.get_flop_counts()["Global"][aten.bmm] == flops.backward.attended[None] * square.attended[None]


@pytest.mark.parametrize("architecture", ["gpt_neox", "qwen3", "cohere", "phi", "opt"])
def test_every_architecture_is_counted(policy_of, architecture):
    config, policy = policy_of(architecture, attn_implementation="sdpa")
    tree = Batcher(tiny.PAD, shares_prompts=False).samples([[5, 20, 6, 7]], [[8, 2]])
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        policy(tree, sequence_logprobs_call(tree, config))
    assert linear_flops(counter) == without_attention(ModelFlops.of(policy).policy).of(Size.of(tree))


# Sizes


@pytest.mark.parametrize("shares_prompts", [True, False])
def test_attended_pairs_are_counted_from_lengths(shares_prompts):
    tree = Batcher(tiny.PAD, shares_prompts=shares_prompts).pairs(PAIRS[:1], [[7, 8, 9, 1], []])
    branches = (2, 1, 3, 0)  # a completion's last token is no input
    if shares_prompts:
        tokens = 5 + sum(branches)
        attended = sum(range(1, 6)) + sum(5 + i + 1 for b in branches for i in range(b))
    else:
        tokens = sum(5 + b for b in branches)
        attended = sum(i + 1 for b in branches for i in range(5 + b))
    assert Size.of(tree) == (tokens, {None: attended}, 3 + 2 + 4)


def test_sampling_costs_a_pass_over_the_samples_tree():
    prompts = [[5, 20, 6], [8, 2]]
    whole = Size.of(Batcher(tiny.PAD).samples(prompts, SAMPLES))
    assert Size.of_samples(prompts, SAMPLES, prefill=True) == whole
    without = (whole.tokens - 5, {None: whole.attended[None] - 6 - 3}, whole.rows)
    assert Size.of_samples(prompts, SAMPLES, prefill=False) == without


# Unknown models


def test_matrices_outside_of_linear_layers_are_refused(policy_of):
    _, policy = policy_of()
    policy.base.get_decoder().layers[1].mlp.experts = nn.Parameter(torch.zeros(4, 32, 48))
    with pytest.raises(UncountedError, match=r"layers\.1\.mlp\.experts \(4, 32, 48\) is not the weight of"):
        ModelFlops.of(policy)


def test_counting_leaves_the_policy_as_it_was(policy_of):
    _, policy = policy_of()
    policy.train()
    state = {name: value.clone() for name, value in policy.state_dict().items()}
    ModelFlops.of(policy)
    assert policy.training
    assert all(parameter.grad is None for parameter in policy.parameters())
    assert not any(module._forward_pre_hooks for module in policy.modules())
    assert all(torch.equal(value, state[name]) for name, value in policy.state_dict().items())


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA GH200 480GB", 990e12),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA GeForce RTX 4090", 165e12),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("Tesla T4", None),
    ],
)
def test_the_peak_follows_from_the_devices_name(name, peak):
    assert peak_bf16(name) == peak
