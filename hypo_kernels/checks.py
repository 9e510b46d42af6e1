"""The ValueErrors of the public functions, shared by all implementations.

The checks read shapes, dtypes, devices and CPU tensors, so none of them waits for a GPU. The exception is
``values_are_finite``, which runs only with ``validate=True``.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

import torch
from torch import Tensor

from hypo_kernels.errors import require
from hypo_kernels.head import LMHead
from hypo_kernels.layout import IGNORE_INDEX, TargetLayout
from hypo_kernels.projection import Projection
from hypo_kernels.workspace import default_budget

IMPLEMENTATIONS = ("auto", "triton", "triton-rows", "triton-epilogue", "torch", "reference")
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def implementation(impl: str, head: LMHead, compute_dtype: torch.dtype) -> str:
    """Return the implementation for a head and its device. Raises ValueError if ``impl`` does not support them."""
    device = head.weight.device
    require(impl in IMPLEMENTATIONS, f"impl={impl!r}: must be one of {', '.join(map(repr, IMPLEMENTATIONS))}")
    if impl == "auto":
        impl = "triton" if device.type == "cuda" and compute_dtype != torch.float64 else "torch"
    require(
        impl != "reference" or head.vocab_shard is None,
        "impl='reference' does not support a vocab_shard: gather the head, or use impl='auto'",
    )
    if impl.startswith("triton"):
        require(
            device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1",
            f"impl={impl!r} needs CUDA tensors, got {device}; use impl='torch' there (or 'auto')",
        )
        require(
            compute_dtype != torch.float64,
            f"impl={impl!r} does not compute in float64; use impl='torch' or 'reference'",
        )
    return impl


def compute_dtype(hidden: Tensor, weight: Tensor, name: str = "") -> torch.dtype:
    """Return autocast's dtype if it is enabled, else the common dtype of the inputs; ``name`` prefixes their names."""
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    require(
        hidden.dtype == weight.dtype,
        f"{name}hidden is {hidden.dtype} and {name}lm_head_weight {weight.dtype}: convert one of them, or call under "
        f"torch.autocast({device!r}, dtype=...)",
    )
    return hidden.dtype


def inputs(projection: Projection, targets: Tensor | TargetLayout, cu_seqlens: Tensor | None, name: str = "") -> None:
    """Check shapes, dtypes and devices of hidden, head and targets; ``name`` prefixes the arguments' names."""
    hidden, head = projection.hidden, projection.head
    weight, bias, shard = head.weight, head.bias, head.vocab_shard
    h, w, b = (f"{name}hidden", f"{name}lm_head_weight", f"{name}bias")
    require(
        hidden.ndim in (2, 3),
        f"{h} has shape {tuple(hidden.shape)}: must be (T, D) packed or (S, L, D) padded",
    )
    require(weight.ndim == 2, f"{w} has shape {tuple(weight.shape)}: must be (V, D)")
    require(weight.shape[0] >= 1, f"{w} has shape {tuple(weight.shape)}: the vocabulary is empty")
    require(
        hidden.shape[-1] == weight.shape[1],
        f"{h} has {hidden.shape[-1]} features and {w} {weight.shape[1]}: the last dimensions must be equal",
    )
    for tensor, label in ((hidden, h), (weight, w)):
        require(tensor.dtype in FLOATS, f"{label} is {tensor.dtype}: must be floating point")
    require(hidden.device == weight.device, f"{h} is on {hidden.device} and {w} on {weight.device}")
    if bias is not None:
        require(
            bias.shape == (weight.shape[0],),
            f"{b} has shape {tuple(bias.shape)}: must be ({weight.shape[0]},), one a vocabulary entry",
        )
        require(bias.device == weight.device, f"{b} is on {bias.device} and {w} on {weight.device}")
    require(
        targets.shape == hidden.shape[:-1],
        f"targets has shape {tuple(targets.shape)} and {h} {tuple(hidden.shape)}: need one target for each row",
    )
    if isinstance(targets, Tensor):
        require(
            not targets.dtype.is_floating_point and not targets.dtype.is_complex and targets.dtype != torch.bool,
            f"targets is {targets.dtype}: must be integers",
        )
    else:
        require(cu_seqlens is None, "cu_seqlens goes with a tensor of targets; a TargetLayout holds its own bounds")
    require(
        hidden.ndim == 2 or cu_seqlens is None,
        f"cu_seqlens goes with packed inputs, but {h} is padded: {tuple(hidden.shape)}",
    )
    require(
        shard is None or shard.size == weight.shape[0],
        f"{w} has {weight.shape[0]} vocabulary entries and this rank's vocab_shard {shard and shard.size}: "
        f"pass the rank's own rows, {shard and shard.start} to {shard and shard.start + shard.size}",
    )
    head.check_constants()


def targets_in_vocabulary(layout: TargetLayout, head: LMHead) -> None:
    """Raise ValueError unless every counted target is in the vocabulary. Runs on the host."""
    vocab_size = head.vocab_size if head.vocab_shard is None else head.vocab_shard.vocab_size
    if len(layout.targets) == 0:
        return
    low, high = int(layout.targets.min()), int(layout.targets.max())
    bad = low if low < 0 else high
    require(
        0 <= bad < vocab_size,
        f"targets holds {bad}: must be in [0, {vocab_size}), or {IGNORE_INDEX} to ignore a row",
    )


def reference_logps(ref_logps: Tensor, num_sequences: int, device: torch.device) -> None:
    """Check shape, dtype and device of the reference's log-probs."""
    require(
        ref_logps.shape == (num_sequences,),
        f"ref_logps has shape {tuple(ref_logps.shape)}: must be ({num_sequences},), one a sequence",
    )
    require(ref_logps.dtype in FLOATS, f"ref_logps is {ref_logps.dtype}: must be floating point")
    require(ref_logps.device == device, f"ref_logps is on {ref_logps.device} and hidden on {device}")


def behavior_logps(
    behavior_logps: Tensor, targets: Tensor | TargetLayout, device: torch.device, kl_estimator: str
) -> None:
    """Raise ValueError unless ``behavior_logps`` are constants, in fp32 or fp64, with the shape of the targets."""
    shape = tuple(behavior_logps.shape)
    require(
        shape == tuple(targets.shape),
        f"behavior_logps has shape {shape} and targets {tuple(targets.shape)}: need one for each row (those of "
        "pairs and of ignored rows are not read)",
    )
    require(
        behavior_logps.dtype in (torch.float32, torch.float64),
        f"behavior_logps is {behavior_logps.dtype}: must be float32 or float64, as a ratio of probabilities is the "
        "exponential of its error",
    )
    require(behavior_logps.device == device, f"behavior_logps is on {behavior_logps.device} and hidden on {device}")
    require(
        not behavior_logps.requires_grad,
        "behavior_logps requires a gradient, but importance weights are constants: pass behavior_logps.detach()",
    )
    require(
        kl_estimator == "sampled",
        f"behavior_logps corrects kl_estimator='sampled', not {kl_estimator!r}: use 'sampled', or samples of the "
        "current policy",
    )


def constants(name: str, tensors: Mapping[str, Tensor], number: int, what: str, device: torch.device) -> None:
    """Raise ValueError unless each of ``tensors`` is a constant of shape ``(number,)``, one value for each ``what``."""
    for key, x in tensors.items():
        require(isinstance(x, Tensor), f"{name}[{key!r}] is a {type(x).__name__}: must be a tensor ({number},)")
        require(
            x.shape == (number,),
            f"{name}[{key!r}] has shape {tuple(x.shape)}: must be ({number},), one for each {what}",
        )
        require(x.device == device, f"{name}[{key!r}] is on {x.device} and hidden on {device}")
        require(
            not x.requires_grad,
            f"{name}[{key!r}] requires a gradient, but the loss gives gradients to the policy alone: pass x.detach()",
        )


def token_weights(weights: Tensor, targets: Tensor | TargetLayout, device: torch.device) -> None:
    """Raise ValueError unless the weights of tokens are floating-point constants of the shape of the targets."""
    shape = tuple(weights.shape)
    require(
        shape == tuple(targets.shape),
        f"token_weights has shape {shape} and targets {tuple(targets.shape)}: need one for each row",
    )
    require(weights.dtype in FLOATS, f"token_weights is {weights.dtype}: must be floating point")
    require(weights.device == device, f"token_weights is on {weights.device} and hidden on {device}")
    require(not weights.requires_grad, "token_weights requires a gradient, but weights are constants: pass .detach()")


def one_reference(
    policy: Projection,
    ref_logps: Tensor | None,
    ref_hidden: Tensor | None,
    ref_weight: Tensor | None,
    ref_bias: Tensor | None,
) -> None:
    """Raise ValueError unless the reference is given as ``ref_logps``, or as ``ref_hidden`` with a frozen head."""
    hidden, head = policy.hidden, policy.head
    require(
        ref_logps is not None or ref_hidden is not None,
        "the reference is missing: pass ref_logps (S,), or ref_hidden of the shape of hidden",
    )
    require(
        ref_logps is None or ref_hidden is None,
        "ref_logps and ref_hidden are both given: pass one of the two",
    )
    if ref_hidden is None:
        require(ref_weight is None, "ref_lm_head_weight goes with ref_hidden, which is missing")
        require(ref_bias is None, "ref_bias goes with ref_hidden, which is missing")
        return
    require(
        ref_hidden.shape == hidden.shape,
        f"ref_hidden has shape {tuple(ref_hidden.shape)} and hidden {tuple(hidden.shape)}: must be equal",
    )
    require(
        ref_weight is not None or not head.weight.requires_grad,
        "lm_head_weight is being trained, so it is not the reference's: pass ref_lm_head_weight with ref_hidden",
    )
    require(
        ref_weight is not None or ref_bias is not None or head.bias is None or not head.bias.requires_grad,
        "bias is being trained, so it is not the reference's: pass ref_bias with ref_hidden",
    )


def same_vocabulary(head: LMHead, ref_head: LMHead) -> None:
    """Raise ValueError unless policy and reference have the same vocabulary size."""
    require(
        head.weight.shape[0] == ref_head.weight.shape[0],
        f"lm_head_weight has {head.weight.shape[0]} vocabulary entries and ref_lm_head_weight "
        f"{ref_head.weight.shape[0]}: must be equal",
    )


def exact_kl_has_distributions(kl_estimator: str, ref_hidden: Tensor | None) -> None:
    """Raise ValueError if ``kl_estimator`` is "exact" without ``ref_hidden``: it needs full distributions."""
    require(
        kl_estimator != "exact" or ref_hidden is not None,
        "kl_estimator='exact' needs the reference's full distributions, which ref_logps does not hold: pass "
        "ref_hidden and ref_lm_head_weight instead of it, or use kl_estimator='sampled'",
    )


def chunk_budget(max_chunk_bytes: int | None, device: torch.device) -> int:
    """Return ``max_chunk_bytes``, or the default of ``device`` for None. Raises ValueError unless it is positive."""
    if max_chunk_bytes is None:
        return default_budget(device)
    require(max_chunk_bytes > 0, f"max_chunk_bytes={max_chunk_bytes}: must be positive")
    return max_chunk_bytes


def values_are_finite(**tensors: Tensor | None) -> None:
    """Raise ValueError if a tensor holds NaN or infinity. Waits for the device."""
    for name, tensor in tensors.items():
        if tensor is not None:
            count = int((~tensor.isfinite()).sum())
            require(count == 0, f"{name} holds {count} values that are NaN or infinite")
