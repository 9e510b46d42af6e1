"""The load-balancing loss of a mixture of experts, compared with the one that transformers computes on plain rows."""

from __future__ import annotations

import policies
import pytest
import short_runs
import tiny
import torch
from transformers import AutoModelForCausalLM

from hypo_train import preflight
from hypo_train.config import Config
from hypo_train.dry_run import DryRun
from hypo_train.model.router_loss import has_router_loss
from hypo_train.model.tree_model import ModelError
from hypo_train.trees.pack import Batcher

ASKS = {"output_router_logits": True, "router_aux_loss_coef": 0.5}


def test_shared_prompts_count_once_for_each_row(saved_model):
    """Loss and gradients in trees, and in two parts, are those of padded rows in the model's own forward pass."""
    folder = saved_model("mixtral", **ASKS)
    policy, tree = policies.policy_of(folder), policies.tree()
    rows = policies.tree(shares_prompts=False)
    own = AutoModelForCausalLM.from_pretrained(folder)
    expected = own(input_ids=rows.input_ids, attention_mask=rows.attention_mask.long(), use_cache=False).aux_loss
    expected.backward()
    assert policy.shares_prompts
    assert policy.router_aux_loss_coef == 0.5
    prompts = Batcher(tiny.PAD).prompts([pair.prompt for pair in policies.PAIRS])
    for passes in ({}, {"prompts": policy.run_prompts(prompts)}):
        policy.zero_grad()
        _, found = policy(tree, lambda hidden, head: None, with_aux_loss=True, **passes)
        found.backward()
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
        for (name, ours), theirs in zip(policy.model.named_parameters(), own.parameters(), strict=True):
            if theirs.grad is not None:  # the head and the last layer's experts have none
                torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize(
    "changes",
    [
        {"algorithm": "hypo"},  # prompts run first, samples of generate or decode
        pytest.param({"algorithm": "sft"}, marks=pytest.mark.slow),
        pytest.param({"algorithm": "dpo", "attn_implementation": "sdpa"}, marks=pytest.mark.slow),
        pytest.param({"algorithm": "dpo", "gradient_checkpointing": True}, marks=pytest.mark.slow),
        pytest.param({"algorithm": "dpo", "num_layers_unfrozen": 1}, marks=pytest.mark.slow),
        pytest.param({"algorithm": "dpo", **short_runs.LORA}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_run_adds_the_loss_that_the_config_asks_for(settings, saved_model, changes):
    run = settings(model=saved_model("mixtral", **ASKS), max_steps=1, logging_steps=1, num_eval_rows=4, **changes)
    with_loss = short_runs.trained(run)[0]
    assert with_loss["aux_loss"] > 0.1
    without = run.model_copy(update={"router_aux_loss_coef": 0.0, "output_dir": run.output_dir + "-without"})
    plain = short_runs.trained(without)[0]
    assert "aux_loss" not in plain
    assert plain["grad_norm"] != pytest.approx(with_loss["grad_norm"], rel=1e-3)
    assert plain["loss"] == pytest.approx(with_loss["loss"], abs=short_runs.ROUNDING)


def test_a_saved_model_still_asks_for_the_loss(settings, saved_model):
    run = settings(model=saved_model("mixtral", **ASKS), algorithm="dpo", max_steps=1)
    short_runs.trained(run)
    assert AutoModelForCausalLM.from_pretrained(f"{run.output_dir}/final").config.output_router_logits


def test_a_weight_without_routers_is_refused(saved_model):
    with pytest.raises(ModelError, match=r"router_aux_loss_coef=0\.1: LlamaForCausalLM has no load-balancing loss"):
        policies.policy_of(saved_model(), router_aux_loss_coef=0.1)
    with pytest.raises(ValueError, match=r"router_aux_loss_coef=0\.1 with algorithm=reward"):
        Config(model_name_or_path="m", dataset_name="d", algorithm="reward", router_aux_loss_coef=0.1)


def test_a_model_that_does_not_ask_gets_no_loss(saved_model):
    policy = policies.policy_of(saved_model("mixtral"))
    assert has_router_loss(policy.base)
    assert policy.router_aux_loss_coef == 0
    assert policies.policy_of(saved_model("mixtral"), router_aux_loss_coef=0.2).router_aux_loss_coef == 0.2


@pytest.fixture
def no_memory_estimate():
    """Here there is one."""


def test_the_page_names_routers_and_experts_and_has_memory(settings, saved_model):
    """The estimate runs the model with fake tensors, for which torch knows the experts' products in bf16 alone."""
    config = settings(model=saved_model("mixtral", **ASKS), **short_runs.LORA)
    page = "\n".join(preflight.check(config, DryRun()).page())
    assert "the load-balancing loss of the routers is added, times 0.5" in page
    assert "no LoRA on the experts, which are no linear layers: down_proj, gate_up_proj" in page
    assert "memory is not estimated" not in page
    assert "at the peak of each phase" in page


def test_a_reward_model_names_the_loss_that_it_lacks(settings, saved_model):
    found = preflight.check(settings(model=saved_model("mixtral", **ASKS), algorithm="reward"), DryRun())
    assert any("router_aux_loss_coef=0.5), and MixtralForSequ" in line for line in found.warnings)
