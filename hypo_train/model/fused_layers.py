"""Compute RMSNorm and SwiGLU layers with fewer passes over memory, and keep less of them for the backward pass.

On a CPU such passes take a large part of the time that matrix products leave. Two kinds of modules are replaced, in
every architecture whose own forward gives the same results: RMSNorm, and MLPs that compute
``down_proj(silu(gate_proj(x)) * up_proj(x))``. Only ``forward`` is replaced, and not the parameters, so that peft,
FSDP and ``save_pretrained`` see the same modules. On CUDA, Liger's kernels do the same (``use_liger_kernel``).
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.functional import rms_norm, silu

from hypo_train.model.text_parts import decoder_of
from hypo_train.model.trunk import decoder_layers

# Up to this size a norm is one call of torch's function: in a decode step the number of calls takes the time.
_FEW = 8192


def fuse_layers(model: Any, *, recompute: bool) -> bool:
    """Replace the forward of a transformers model's RMSNorms and SwiGLU MLPs, where it computes the same.

    Args:
        recompute: compute the input of ``down_proj`` again in the backward pass, from the two results that are kept
            anyway. It is for layers that are not checkpointed.

    Returns:
        Whether all norms and MLPs of the decoder's layers were replaced.
    """
    decoder = decoder_of(model)
    mlp_forward = _recomputing_mlp if recompute else _mlp
    compared: dict[Any, bool] = {}  # modules of a class with the same epsilon are compared once
    for module in list(decoder.modules()):
        eps, is_mlp, key = _eps(module), _has_parts_of_an_mlp(module), (type(module), _eps(module))
        if "forward" in vars(module) or (eps is None and not is_mlp):  # in the first case, a library has replaced it
            continue
        if key not in compared:
            compared[key] = _computes_swiglu(module) if eps is None else _computes_rms_norm(module, eps)
        if compared[key]:
            module.forward = MethodType(mlp_forward if eps is None else _norm_forward, module)
    return all(_is_fused(layer) for layer in decoder_layers(decoder) or [nn.Identity()])


def _is_fused(layer: nn.Module) -> bool:
    """Return whether a layer has a replaced MLP, and no norm that is not replaced."""
    replaced = [getattr(vars(module).get("forward"), "__func__", None) for module in layer.children()]
    norms = [module for module in layer.modules() if "Norm" in type(module).__name__]
    return any(f in (_mlp, _recomputing_mlp) for f in replaced) and all("forward" in vars(norm) for norm in norms)


# RMSNorm


class _RMSNorm(torch.autograd.Function):
    """``x * rsqrt(mean(x²) + eps) * weight`` over the last dimension."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        rstd = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, rstd)
        return (x * rstd).mul_(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight, rstd = ctx.saved_tensors
        temporary = torch.mul(grad, x, out=torch.empty(x.shape, dtype=x.dtype, device=x.device))
        rows = temporary.view(-1, x.shape[-1])
        grad_weight = rstd.reshape(-1) @ rows if ctx.needs_input_grad[1] else None
        if not ctx.needs_input_grad[0]:
            return None, grad_weight, None
        along_x = (rows @ weight).view_as(rstd).mul_(rstd**3).div_(-x.shape[-1])
        grad_x = torch.mul(grad, rstd, out=temporary).mul_(weight).addcmul_(x, along_x)
        return grad_x, grad_weight, None


def _norm_forward(self: nn.Module, hidden_states: Tensor) -> Tensor:
    weight: Tensor = self.weight  # type: ignore[assignment]
    if hidden_states.dtype is not torch.float32 or weight.dtype is not torch.float32:  # architectures round differently
        result: Tensor = type(self).forward(self, hidden_states)
        return result
    eps = _eps(self)
    assert eps is not None
    if hidden_states.numel() <= _FEW:
        return rms_norm(hidden_states, weight.shape, weight, eps)
    return _RMSNorm.apply(hidden_states, weight, eps)


def _eps(module: nn.Module) -> float | None:
    """Return the epsilon of a module that may be an RMSNorm, or None."""
    if "RMSNorm" not in type(module).__name__ or [name for name, _ in module.named_parameters()] != ["weight"]:
        return None
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    return eps if isinstance(eps, float) else None


def _computes_rms_norm(module: nn.Module, eps: float) -> bool:
    x, weight = _random(3, 8), nn.Parameter(_random(8))
    probe = copy.copy(module)
    probe._parameters = {"weight": weight}
    return _gives(lambda: type(module).forward(probe, x), _RMSNorm.apply(x, weight, eps))


# SwiGLU


class _SwiGLU(torch.autograd.Function):
    """``silu(gate) * up``, which keeps ``gate`` and ``up`` alone."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        grad_up = silu(gate).mul_(grad)
        grad_gate = grad * up
        return torch.ops.aten.silu_backward.grad_input(grad_gate, gate, grad_input=grad_gate), grad_up


def _mlp(self: Any, x: Tensor) -> Tensor:
    result: Tensor = self.down_proj(_SwiGLU.apply(self.gate_proj(x), self.up_proj(x)))
    return result


def _recomputing_mlp(self: Any, x: Tensor) -> Tensor:
    gate, up = self.gate_proj(x), self.up_proj(x)
    product = _SwiGLU.apply(gate, up)
    with _recomputed(product, gate.detach(), up.detach()) if torch.is_grad_enabled() else nullcontext():
        result: Tensor = self.down_proj(product)
    return result


def _recomputed(product: Tensor, gate: Tensor, up: Tensor) -> saved_tensors_hooks:
    """Return a context in which the backward pass does not keep ``product``, ``silu(gate) * up``, but computes it."""
    storage, numel = product.untyped_storage()._cdata, product.numel()

    def pack(saved: Tensor) -> Tensor | torch.Size:
        is_product = saved.untyped_storage()._cdata == storage and saved.numel() == numel and saved.is_contiguous()
        return saved.shape if is_product else saved.detach()

    def unpack(packed: Tensor | torch.Size) -> Tensor:
        return packed if isinstance(packed, Tensor) else silu(gate).mul_(up).view(packed)

    return saved_tensors_hooks(pack, unpack)


def _has_parts_of_an_mlp(module: nn.Module) -> bool:
    names = {name for name, _ in module.named_children()}
    return names == {"gate_proj", "up_proj", "down_proj", "act_fn"}


def _computes_swiglu(module: nn.Module) -> bool:
    x = _random(3, 4)
    with torch.random.fork_rng(devices=[]):
        gate, up, down = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 4)
    probe = copy.copy(module)
    probe._modules = {**module._modules, "gate_proj": gate, "up_proj": up, "down_proj": down}
    return _gives(lambda: type(module).forward(probe, x), down(silu(gate(x)) * up(x)))


# Comparison


def _random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def _gives(function: Callable[[], Any], expected: Tensor) -> bool:
    """Return whether a module's own forward gives these results; it may also refuse the call."""
    try:
        found = function()
    except Exception:  # every architecture has other arguments
        return False
    return isinstance(found, Tensor) and torch.allclose(found, expected, rtol=1e-5, atol=1e-6)
