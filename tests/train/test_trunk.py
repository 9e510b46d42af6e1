"""Reusing the frozen layers and prompts of a step does not change the results."""

import pytest
import tiny
import torch
from policies import LORA, PAIRS, logprobs, model_config, policy_of
from policies import tree as whole_tree
from torch.testing import assert_close

from hypo_train.algorithms.preference import preference_loss_call
from hypo_train.algorithms.reference import compute_reference
from hypo_train.model.trunk import frozen_layers

WAYS = {"full": {}, "lora": LORA, "last layer": {"num_layers_unfrozen": 1}, "no layer": {"num_layers_unfrozen": 2}}
ARCHITECTURES = ["llama", "gpt_neox", "gpt2", "gemma2"]


@pytest.fixture
def layer_calls():
    """Counts the calls of each decoder layer of a policy."""

    def count(policy):
        calls = []
        layers = next(m for m in policy.base.get_decoder().children() if isinstance(m, torch.nn.ModuleList))
        for i, layer in enumerate(layers):
            inner = layer.self_attn if hasattr(layer, "self_attn") else layer.attention
            inner.register_forward_hook(lambda *_, i=i: calls.append(i))
        return calls

    return count


def step(policy, *, prompts_first=False, share_trunk=False):
    """Loss and gradients of a step on trained weights that have left the reference."""
    tree, config = whole_tree(), model_config("-", kl_coef=0.1, beta=0.5)
    prompts = policy.run_prompts(tree) if prompts_first else None
    trunk = policy.run_trunk(tree, prompts) if share_trunk else None
    reference = compute_reference(policy, tree, config, trunk=trunk)
    loss = policy(tree, preference_loss_call(tree, reference, len(PAIRS), config), prompts=prompts, trunk=trunk).loss
    policy.zero_grad()
    loss.backward()
    return [loss.detach(), reference.logps, *(p.grad.clone() for p in policy.trained_parameters().values())]


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointed"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_saving_gives_the_loss_and_gradients_of_none(saved_model, architecture, way, checkpointing):
    policy = policy_of(saved_model(architecture), gradient_checkpointing=checkpointing, **WAYS[way]).train()
    tiny.perturb(policy.trained_parameters().values())
    expected = step(policy)
    assert len(expected) > 2
    for savings in ({"share_trunk": True}, {"prompts_first": True}, {"share_trunk": True, "prompts_first": True}):
        for found, value in zip(step(policy, **savings), expected, strict=True):
            assert_close(found, value, atol=1e-5 * max(1.0, value.abs().max().item()), rtol=0, msg=str(savings))


@pytest.mark.parametrize("architecture", ["llama", "gpt_neox"])
def test_the_frozen_trunk_runs_once_for_policy_and_reference(saved_model, architecture, layer_calls):
    settings = {"num_layers_unfrozen": 1, "gradient_checkpointing": False}  # which calls layers again
    policy = policy_of(saved_model(architecture, num_hidden_layers=4), **settings)
    calls = layer_calls(policy)
    step(policy)
    assert sorted(calls) == [0, 0, 1, 1, 2, 2, 3, 3]
    calls.clear()
    step(policy, share_trunk=True)
    assert sorted(calls) == [0, 1, 2, 3, 3]
    calls.clear()
    step(policy, share_trunk=True, prompts_first=True)  # prompts and branches, then the reference's layer
    assert sorted(calls) == [0, 0, 1, 1, 2, 2, 3, 3, 3]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_what_is_frozen_is_found(saved_model, architecture):
    folder = saved_model(architecture, **({"n_layer": 4} if architecture == "gpt2" else {"num_hidden_layers": 4}))
    policy = policy_of(folder, num_layers_unfrozen=1)
    assert len(policy.trunk_layers) == 3
    assert len(policy_of(folder, num_layers_unfrozen=4).trunk_layers) == 0
    assert policy_of(folder).trunk_layers == policy_of(folder, **LORA).trunk_layers == []
    policy.base.get_input_embeddings().requires_grad_(True)
    assert frozen_layers(policy.base.get_decoder()) == []


def test_a_trunk_that_is_replayed_leaves_the_layers_as_they_were(saved_model):
    policy = policy_of(saved_model(), num_layers_unfrozen=1)
    before = policy(whole_tree(), logprobs())
    trunk = policy.run_trunk(whole_tree())
    policy.reference(whole_tree(), logprobs(), trunk=trunk)
    assert torch.equal(policy(whole_tree(), logprobs()), before)
    assert all("forward" not in vars(layer) for layer in policy.trunk_layers)


def test_separate_rows_have_no_prompts_to_run_first(saved_model):
    policy = policy_of(saved_model(), attn_implementation="sdpa")
    with pytest.raises(ValueError, match="separate rows have no prompts"):
        policy.run_prompts(whole_tree(shares_prompts=False))


def test_a_tree_is_refused_by_an_attention_without_tree_masks(saved_model):
    policy = policy_of(saved_model(), attn_implementation="sdpa")
    with pytest.raises(ValueError, match="sdpa attention takes no trees"):
        policy(whole_tree(), logprobs())
