"""Fused RMSNorms and SwiGLU MLPs against the layers that they replace, and which layers are left alone."""

from __future__ import annotations

import copy

import pytest
import tiny
import torch
from policies import LORA, policy_of, tree
from torch.testing import assert_close

from benchmarks.measure import peak_extra_bytes
from hypo_train.model import fused_layers, trainable
from hypo_train.model.fused_layers import fuse_layers

ALL_LINEAR = {**LORA, "lora_target_modules": "all-linear"}


def fused(model):
    return {name for name, module in model.named_modules() if "forward" in vars(module)}


def layer_of(model, *, dtype=torch.float32):
    """Return a layer's norm and MLP with weights that a test can tell apart."""
    layer = model.get_decoder().layers[0].to(dtype)
    tiny.perturb(layer.parameters(), size=0.3)
    return layer.post_attention_layernorm, layer.mlp


def results(norm, mlp, x, upstream):
    """Return the output, and the gradients of the input and of all weights."""
    x = x.clone().requires_grad_()
    out = mlp(norm(x))
    return [out, *torch.autograd.grad(out, [x, *norm.parameters(), *mlp.parameters()], upstream)]


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
def test_fused_layers_are_as_exact_as_the_models(recompute):
    model = tiny.new_model("llama")
    norm, mlp = layer_of(model)
    size = norm.weight.numel()
    generator = torch.Generator().manual_seed(0)
    # Two dimensions before the last, a size that is no power of two, and strides that are not contiguous.
    x, upstream = (torch.randn(137, 2, size, generator=generator).transpose(0, 1) for _ in range(2))
    truth = results(copy.deepcopy(norm).double(), copy.deepcopy(mlp).double(), x.double(), upstream.double())
    own = results(norm, mlp, x, upstream)
    assert fuse_layers(model, recompute=recompute)
    for found, eager, exact in zip(results(norm, mlp, x, upstream), own, truth, strict=True):
        rounding = torch.finfo(torch.float32).eps * exact.abs().max()
        assert (found - exact).abs().max() <= 2 * ((eager - exact).abs().max() + rounding)


@pytest.mark.parametrize("way", [{}, ALL_LINEAR, {"num_layers_unfrozen": 1}], ids=["full", "lora", "last layer"])
def test_a_policy_of_fused_layers_has_the_same_gradients(saved_model, monkeypatch, way):
    gradients = []
    for fuse in (fuse_layers, lambda model, **_: False):
        monkeypatch.setattr(trainable, "fuse_layers", fuse)
        torch.manual_seed(0)  # the adapter's first weights
        policy = policy_of(saved_model(), **way).train()
        tiny.perturb(policy.trained_parameters().values())
        policy(tree(), lambda hidden, head: (hidden * torch.linspace(-1, 1, hidden.shape[1])).sum()).backward()
        gradients.append({name: p.grad for name, p in policy.trained_parameters().items() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert (gradient - gradients[1][name]).abs().max() <= 1e-5 * gradient.abs().max(), name


def test_fused_layers_keep_less_for_the_backward_pass(monkeypatch, saved_model):
    monkeypatch.setattr(fused_layers, "_FEW", 0)  # the test's rows are few
    kept = []
    for fuse in (fuse_layers, lambda model, **_: False):
        monkeypatch.setattr(trainable, "fuse_layers", fuse)
        policy = policy_of(saved_model(), gradient_checkpointing=False).train()
        _, extra = peak_extra_bytes(lambda p=policy: p(tree(), lambda hidden, _: hidden.sum()), torch.device("cpu"))
        kept.append(extra)
    assert kept[0] < 0.8 * kept[1]


def test_layers_that_compute_something_else_are_left_alone():
    gemma = tiny.new_model("gemma2")  # its norms multiply by 1 + weight, its MLPs have GELU
    assert not fuse_layers(gemma, recompute=True)
    assert not fused(gemma)


def test_a_copy_of_a_fused_model_uses_its_own_weights():
    model = tiny.new_model("llama")
    norm, _ = layer_of(model)
    fuse_layers(model, recompute=True)
    twin = copy.deepcopy(norm)
    with torch.no_grad():
        twin.weight.zero_()
    x = torch.ones(1, norm.weight.numel())
    assert not twin(x).any()
    assert norm(x).all()


def test_norms_of_bf16_weights_are_the_models_own():
    model = tiny.new_model("llama")
    norm, _ = layer_of(model, dtype=torch.bfloat16)
    x = torch.randn(3, norm.weight.numel(), generator=torch.Generator().manual_seed(0)).bfloat16()
    own = norm(x)
    fuse_layers(model, recompute=True)
    assert_close(norm(x), own, atol=0, rtol=0)
