"""Liger's layer kernels: asked for only where they run, and then computing what the layers did."""

from __future__ import annotations

import sys

import pytest
import tiny
import torch
from policies import LORA, policy_of
from transformers.models.llama import modeling_llama

from hypo_train.model.liger import use_layer_kernels
from hypo_train.model.tree_model import ModelError


@pytest.fixture
def a_gpu(monkeypatch):
    """A GPU as far as loading can tell; the model stays where it is."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    moved = []
    monkeypatch.setattr(torch.nn.Module, "cuda", lambda module: moved.append(module) or module)
    return moved


@pytest.fixture
def liger(monkeypatch):
    """Liger, whose changes to transformers end with the test."""
    for name in ("apply_rotary_pos_emb", "LlamaRMSNorm", "LlamaMLP"):
        monkeypatch.setattr(modeling_llama, name, getattr(modeling_llama, name))
    return pytest.importorskip("liger_kernel.transformers")


def test_without_liger_the_package_to_install_is_named(saved_model, a_gpu, monkeypatch):
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", None)
    with pytest.raises(ModelError, match=r"use_liger_kernel=true: .*hypo-kernels\[liger\]"):
        policy_of(saved_model(), use_liger_kernel=True)


def test_without_a_gpu_liger_is_refused(saved_model, liger, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ModelError, match="Liger's kernels need a GPU, and there is none: leave it out"):
        policy_of(saved_model(), use_liger_kernel=True)


def test_an_architecture_that_liger_does_not_know_is_refused(saved_model, liger, a_gpu):
    with pytest.raises(ModelError, match="Liger has no kernels for gpt_neox models"):
        policy_of(saved_model("gpt_neox"), use_liger_kernel=True)


@pytest.mark.parametrize("way", [{}, LORA], ids=["full", "lora"])
def test_liger_gets_the_model_on_the_gpu_before_its_adapter(saved_model, liger, a_gpu, monkeypatch, way):
    calls = []

    def apply(model, **options):
        assert a_gpu == [model]
        calls.append((type(model).__name__, options))

    monkeypatch.setattr(liger, "_apply_liger_kernel_to_instance", apply)
    policy_of(saved_model(), **way)
    assert not calls
    policy_of(saved_model(), use_liger_kernel=True, **way)
    assert calls == [("LlamaForCausalLM", {"cross_entropy": False, "fused_linear_cross_entropy": False})]


def test_liger_changes_layers_only(liger, a_gpu):
    model = tiny.new_model("llama")
    parameters, forward = dict(model.named_parameters()), type(model).forward
    use_layer_kernels(model)
    assert modeling_llama.apply_rotary_pos_emb.__module__.startswith("liger_kernel")
    layer = model.model.layers[0]
    for module in (model.model.norm, layer.input_layernorm, layer.post_attention_layernorm, layer.mlp):
        assert module.forward.__func__.__module__.startswith("liger_kernel")
    assert "forward" not in vars(model)
    assert type(model).forward is forward
    found = dict(model.named_parameters())
    assert found.keys() == parameters.keys()
    assert all(found[name] is parameters[name] for name in found)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_liger_is_as_near_the_truth_as_transformers(saved_model, liger):
    def outcome(model):
        logits = model(input_ids=torch.arange(5, 25, device="cuda").unsqueeze(0), use_cache=False).logits
        weight = torch.randn(logits.shape, generator=torch.Generator().manual_seed(0)).to(logits)
        return [logits, *torch.autograd.grad((logits * weight).sum(), list(model.parameters()))]

    folder = saved_model("llama", hidden_size=64)
    # transformers keeps its norms in fp32 even here: the truth has their rounding, as the eager run has.
    truth = outcome(policy_of(folder).base.double().cuda())
    eager = outcome(policy_of(folder).base.cuda())
    found = outcome(policy_of(folder, use_liger_kernel=True).base)
    for kernel, plain, true in zip(found, eager, truth, strict=True):
        eps = torch.finfo(torch.float32).eps * true.abs().max()
        assert (kernel - true).abs().max() <= 2 * ((plain - true).abs().max() + eps)
