"""Checkpoints whose embeddings and LM head differ, although their config says that they are one matrix."""

from __future__ import annotations

import policies
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from hypo_train.export.command import save_whole_model
from hypo_train.model.tree_model import ModelError


@pytest.fixture
def untied(tmp_path):
    """The folder of a model whose file has a head of its own, and the head."""
    folder = tiny.save(tiny.new_model("llama", tie_word_embeddings=True), tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"] + 1
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder, weights["lm_head.weight"]


def test_the_head_of_the_file_is_trained_and_exported(untied, tmp_path):
    folder, head = untied
    policy = policies.policy_of(folder)
    assert torch.equal(policy.head().weight, head)
    save_whole_model(policy, tmp_path / "exported", torch.float32, None)
    policy.save_pretrained(tmp_path / "saved")
    for copy in ("exported", "saved"):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / copy)
        assert torch.equal(model.lm_head.weight, head)
        assert not model.config.tie_word_embeddings


def test_processes_that_share_weights_need_a_right_config(untied):
    """Other ranks build the model from its config alone."""
    with pytest.raises(ModelError, match="tie_word_embeddings: true; set it to false there"):
        policies.policy_of(untied[0], fsdp=True)


def test_a_copy_of_the_embeddings_stays_tied(untied):
    folder, _ = untied
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    policy = policies.policy_of(folder)
    assert policy.head().weight is policy.base.get_input_embeddings().weight
