"""Tests of frozen parts: towers that no text reaches, and parameters that `unfrozen_parameters` leaves out."""

from __future__ import annotations

import policies
import pytest
import short_runs
import tiny
import torch
from transformers import Gemma3Config, Gemma3ForConditionalGeneration

from hypo_train.config import Config
from hypo_train.model.tree_model import ModelError

VISION = {"vision_tower", "multi_modal_projector"}


@pytest.fixture(scope="module")
def multimodal(tmp_path_factory):
    """The folder of a Gemma 3 with a vision tower, whose linear layers have the names of the decoder's."""
    text = tiny.new_config("gemma2", final_logit_softcapping=None).to_dict() | {
        "model_type": "gemma3_text",
        "sliding_window": 64,
    }
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Gemma3Config(
        text_config={**text, "layer_types": ["sliding_attention", "full_attention"], "rope_parameters": None},
        vision_config={**sizes, "image_size": 16, "patch_size": 8},
        mm_tokens_per_image=4,
        **{f"{name}_token_index": len(tiny.WORDS) - 1 - i for i, name in enumerate(["image", "boi", "eoi"])},
    )
    torch.manual_seed(0)
    return tiny.save(Gemma3ForConditionalGeneration(config).eval(), tmp_path_factory.mktemp("gemma3"))


@pytest.mark.parametrize(
    "changes", [{}, policies.LORA, {**policies.LORA, "lora_target_modules": ["q_proj", "o_proj"]}], ids=str
)
def test_a_vision_tower_is_left_alone(multimodal, changes):
    policy = policies.policy_of(multimodal, **changes)
    policy(policies.tree(), policies.logprobs()).sum().backward()
    trained = policy.trained_parameters()
    assert trained
    assert not any(part in name for name in trained for part in VISION)
    assert all(parameter.grad is not None for parameter in trained.values())
    assert policy.reference_parameters.keys() == (set() if changes else trained.keys())


def test_weight_decay_does_not_shrink_a_vision_tower(settings, multimodal):
    config = settings(model=multimodal, algorithm="dpo", weight_decay=0.5, learning_rate=1e-2, max_steps=1)
    short_runs.trained(config)
    start, end = (Gemma3ForConditionalGeneration.from_pretrained(f) for f in (multimodal, f"{config.output_dir}/final"))
    changed = {n for (n, a), b in zip(start.named_parameters(), end.parameters(), strict=True) if not torch.equal(a, b)}
    assert changed
    assert not any(part in name for name in changed for part in VISION)


def test_a_missing_default_of_peft_names_our_setting(multimodal):
    with pytest.raises(ModelError, match="peft has no default for gemma3 models: set lora_target_modules: all-linear"):
        policies.policy_of(multimodal, use_peft=True)
    with pytest.raises(ModelError, match="has no module 'fc1'"):  # it is in the vision tower
        policies.policy_of(multimodal, use_peft=True, lora_target_modules=["q_proj", "fc1"])


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        (r"layers\.\d+\.q_proj", r"matches the whole name of no module of Llama.* such as model\.layers\.0\.self_attn"),
        ("(q_proj", "is no regular expression"),
    ],
)
def test_a_pattern_without_a_match_names_our_setting(saved_model, pattern, message):
    with pytest.raises(ModelError, match=f"^lora_target_modules=.*{message}"):
        policies.policy_of(saved_model(), use_peft=True, lora_target_modules=pattern)


def test_one_name_is_not_a_regular_expression(saved_model):
    policy = policies.policy_of(saved_model(), use_peft=True, lora_target_modules="q_proj")
    assert len(policy.trained_parameters()) == 2 * 2


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        (["lm_head"], {"lm_head.weight"}),
        (["model.layers.1.mlp.(up|down)_proj"], {f"model.layers.1.mlp.{name}_proj.weight" for name in ("up", "down")}),
        (["model.embed_tokens", "model.norm"], {"model.embed_tokens.weight", "model.norm.weight"}),
    ],
)
def test_only_the_named_parameters_are_trained(saved_model, patterns, expected):
    """Log-probs and gradients are those of a fully trained policy; the reference copies the named ones alone."""
    whole, part = policies.policy_of(saved_model()), policies.policy_of(saved_model(), unfrozen_parameters=patterns)
    assert {name.removeprefix("model.") for name in part.trained_parameters()} == expected
    assert part.reference_parameters.keys() == part.trained_parameters().keys()
    for policy in (whole, part):
        policy(policies.tree(), policies.logprobs()).sum().backward()
    for name, parameter in part.trained_parameters().items():
        torch.testing.assert_close(parameter.grad, whole.get_parameter(name).grad, rtol=1e-4, atol=1e-5, msg=name)
    start = part.reference(policies.tree(), policies.logprobs())
    tiny.perturb(part.trained_parameters().values())
    assert torch.equal(part.reference(policies.tree(), policies.logprobs()), start)


def test_a_tied_head_is_trained_under_both_names(saved_model):
    policy = policies.policy_of(saved_model(tie_word_embeddings=True), unfrozen_parameters=["lm_head"])
    assert policy.base.model.embed_tokens.weight.requires_grad


def test_unknown_and_unreached_names_are_refused(saved_model, multimodal):
    with pytest.raises(ModelError, match=r"'embed_tokens' matches no parameter of Llama.*mean model\.embed_tokens\.we"):
        policies.policy_of(saved_model(), unfrozen_parameters=["embed_tokens"])
    with pytest.raises(ModelError, match=r"vision_tower.*, which no text reaches"):
        policies.policy_of(multimodal, unfrozen_parameters=["model.vision_tower"])
    for changes, message in (
        ({"unfrozen_parameters": ["lm_head.weight[:32000]"]}, "parts of a matrix cannot be trained alone"),
        ({"unfrozen_parameters": ["("]}, r"\( is no regular expression"),
        ({"unfrozen_parameters": ["lm_head"], "use_peft": True}, "unfrozen_parameters with use_peft=True: choose one"),
    ):
        with pytest.raises(ValueError, match=message):
            Config(model_name_or_path="m", dataset_name="d", **changes)
