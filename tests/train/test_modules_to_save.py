"""Modules that are trained whole beside LoRA (peft's ``modules_to_save``)."""

from __future__ import annotations

import policies
import pytest
import short_runs
import tiny
import torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM

from hypo_kernels import sequence_logprobs
from hypo_train.config import Config
from hypo_train.export.command import run as export
from hypo_train.export.settings import ExportSettings
from hypo_train.model.head_functions import head_options
from hypo_train.model.tree_model import ModelError

BOTH = ["embed_tokens", "lm_head"]
SAVED = {"use_peft": True, "lora_r": 4, "lora_target_modules": ["q_proj"], "lora_modules_to_save": BOTH}


@pytest.mark.parametrize("tied", [False, True])
def test_loss_and_gradients_are_those_of_the_trained_copy(saved_model, tied):
    policy = policies.policy_of(saved_model(tie_word_embeddings=tied), **SAVED)
    start = policies.own_logprobs(policy.base).detach()
    tiny.perturb(policy.trained_parameters().values())
    expected = policies.own_logprobs(policy.base)
    expected.square().sum().backward()
    gradients = {name: p.grad.clone() for name, p in policy.trained_parameters().items()}
    policy.zero_grad()
    found = policy(policies.tree(), policies.logprobs())
    found.square().sum().backward()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    for name, parameter in policy.trained_parameters().items():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-4, atol=1e-3, msg=name)
    assert sum(p.ndim == 2 and len(p) == len(tiny.WORDS) for p in policy.trained_parameters().values()) == 2 - tied
    torch.testing.assert_close(policy.reference(policies.tree(), policies.logprobs()), start, rtol=1e-5, atol=1e-5)


def test_the_exact_kl_has_the_original_head(saved_model):
    """The estimator multiplies the reference's hidden states by the reference's head itself."""
    policy, tree, config = policies.policy_of(saved_model(), **SAVED), policies.tree(), policies.model_config("-")
    tiny.perturb(policy.trained_parameters().values())
    hidden = policy.reference(tree, lambda hidden, head: hidden)
    weight, _ = policy.reference_head()
    found = sequence_logprobs(hidden, weight, tree.targets, tree.cu_seqlens, **head_options(policy.head(), config))
    torch.testing.assert_close(found, policy.reference(tree, policies.logprobs()), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("tied", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_run_saves_resumes_and_exports_them(settings, saved_model, tmp_path, tied):
    start = saved_model(tie_word_embeddings=tied)
    config = settings(model=start, algorithm="hypo", max_steps=2, save_steps=1, learning_rate=1e-2, **SAVED)
    metrics = short_runs.trained(config)
    again = config.model_copy(
        update={"resume_from_checkpoint": f"{config.output_dir}/checkpoint-1", "output_dir": str(tmp_path / "again")}
    )
    assert short_runs.trained(again)[-1] == metrics[-1]
    export(ExportSettings(run_or_checkpoint=config.output_dir, output_dir=str(tmp_path / "merged"), merge=True))
    adapter = AutoPeftModelForCausalLM.from_pretrained(f"{config.output_dir}/final")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    original = AutoModelForCausalLM.from_pretrained(start)
    embeddings = [model.get_input_embeddings().weight for model in (adapter, merged, original)]
    assert torch.equal(embeddings[0], embeddings[1])
    assert not torch.equal(embeddings[1], embeddings[2])
    torch.testing.assert_close(tiny.plain_logits(merged, [5, 6, 7]), tiny.plain_logits(adapter, [5, 6, 7]))
    assert (merged.lm_head.weight is merged.model.embed_tokens.weight) == tied


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora_modules_to_save": ["embed_token"]}, "has no module 'embed_token': did you mean embed_tokens"),
        (
            {"lora_modules_to_save": ["norm"]},
            r"peft would also take 'model\.layers\.0\.input_layernorm' for 'norm': write 'mod",
        ),
        ({"lora_modules_to_save": ["q_proj"]}, "'q_proj' is in lora_target_modules too"),
        ({"lora_modules_to_save": ["layers"]}, "'layers' is a list of modules"),
    ],
)
def test_what_cannot_be_trained_whole_is_refused(saved_model, changes, message):
    with pytest.raises(ModelError, match=message):
        policies.policy_of(saved_model(), **{**SAVED, **changes})


def test_a_tie_that_peft_would_break_is_refused(saved_model):
    changes = {**SAVED, "lora_target_modules": ["c_attn"], "lora_modules_to_save": ["wte"]}
    with pytest.raises(ModelError, match="GPT2LMHeadModel has one matrix for its embeddings and its LM head"):
        policies.policy_of(saved_model("gpt2"), **changes)


def test_one_module_need_not_be_a_list():
    def saved(value):
        return Config(model_name_or_path="m", dataset_name="d", lora_modules_to_save=value).lora_modules_to_save

    assert saved("lm_head") == saved(["lm_head"]) == ["lm_head"]
    assert saved([]) is None
