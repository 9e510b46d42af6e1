"""Every ValueError of the public functions, shared by all implementations.

Only shapes, dtypes, devices and what already lies on the host are looked at, so that no check makes the
host wait for a GPU; ``values_are_finite`` does, and runs only when asked for.
"""

from __future__ import annotations

import itertools
import math
import os
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hypo_kernels.head import LMHead, LoRA
from hypo_kernels.objective import KL_ESTIMATORS, PREFERENCES, Objective

if TYPE_CHECKING:
    from hypo_kernels.layout import TargetLayout
    from hypo_kernels.projection import Projection

IMPLEMENTATIONS = ("auto", "triton", "triton-rows", "triton-epilogue", "torch", "reference")
IGNORE_INDEX = -100
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def implementation(impl: str, head: LMHead, compute_dtype: torch.dtype) -> str:
    """The implementation to use for a head and its device; one that cannot serve them raises."""
    device = head.weight.device
    _require(impl in IMPLEMENTATIONS, f"impl={impl!r}: must be one of {', '.join(map(repr, IMPLEMENTATIONS))}")
    if impl == "auto":
        impl = "triton" if device.type == "cuda" and compute_dtype != torch.float64 else "torch"
    _require(
        impl != "reference" or head.shard is None,
        "impl='reference' does not serve a vocab_shard: gather the head, or use impl='auto'",
    )
    if impl.startswith("triton"):
        _require(
            device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1",
            f"impl={impl!r} needs CUDA tensors, got {device}; use impl='torch' there (or 'auto')",
        )
        _require(
            compute_dtype != torch.float64,
            f"impl={impl!r} does not compute in float64; use impl='torch' or 'reference'",
        )
    return impl


def compute_dtype(hidden: Tensor, weight: Tensor, name: str = "") -> torch.dtype:
    """Autocast's dtype where it is on, else the common dtype of the inputs; ``name`` prefixes their names."""
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    _require(
        hidden.dtype == weight.dtype,
        f"{name}hidden is {hidden.dtype} and {name}lm_head_weight {weight.dtype}: convert one of them, or call under "
        f"torch.autocast({device!r}, dtype=...)",
    )
    return hidden.dtype


def inputs(projection: Projection, targets: Tensor | TargetLayout, cu_seqlens: Tensor | None, name: str = "") -> None:
    """Shapes, dtypes and devices of hidden, head and targets; ``name`` prefixes the arguments' names."""
    hidden, head = projection.hidden, projection.head
    weight, bias, shard = head.weight, head.bias, head.shard
    h, w, b = (f"{name}hidden", f"{name}lm_head_weight", f"{name}bias")
    _require(
        hidden.ndim in (2, 3),
        f"{h} has shape {tuple(hidden.shape)}: must be (T, D) packed or (S, L, D) padded",
    )
    _require(weight.ndim == 2, f"{w} has shape {tuple(weight.shape)}: must be (V, D)")
    _require(weight.shape[0] >= 1, f"{w} has shape {tuple(weight.shape)}: the vocabulary is empty")
    _require(
        hidden.shape[-1] == weight.shape[1],
        f"{h} has {hidden.shape[-1]} features and {w} {weight.shape[1]}: the last dimensions must be equal",
    )
    for tensor, label in ((hidden, h), (weight, w)):
        _require(tensor.dtype in FLOATS, f"{label} is {tensor.dtype}: must be floating point")
    _require(hidden.device == weight.device, f"{h} is on {hidden.device} and {w} on {weight.device}")
    if bias is not None:
        _require(
            bias.shape == (weight.shape[0],),
            f"{b} has shape {tuple(bias.shape)}: must be ({weight.shape[0]},), one a vocabulary entry",
        )
        _require(bias.device == weight.device, f"{b} is on {bias.device} and {w} on {weight.device}")
    _require(
        targets.shape == hidden.shape[:-1],
        f"targets has shape {tuple(targets.shape)} and {h} {tuple(hidden.shape)}: need one target for each row",
    )
    if isinstance(targets, Tensor):
        _require(
            not targets.dtype.is_floating_point and not targets.dtype.is_complex and targets.dtype != torch.bool,
            f"targets is {targets.dtype}: must be integers",
        )
    else:
        _require(cu_seqlens is None, "cu_seqlens goes with a tensor of targets; a TargetLayout has its bounds already")
    _require(
        hidden.ndim == 2 or cu_seqlens is None,
        f"cu_seqlens goes with packed inputs, but {h} is padded: {tuple(hidden.shape)}",
    )
    _require(
        shard is None or shard.size == weight.shape[0],
        f"{w} has {weight.shape[0]} vocabulary entries and this rank's vocab_shard {shard and shard.size}: "
        f"pass the rank's own rows, {shard and shard.start} to {shard and shard.start + shard.size}",
    )
    head_constants(head)


def lora(lora: LoRA, hidden: Tensor, head: LMHead) -> None:
    """``W + scale·B·A`` has the shape of W, and its factors multiply as the hidden states do."""
    vocab, width = head.weight.shape
    _require(
        lora.A.ndim == 2 and lora.A.shape[1] == width,
        f"lora.A has shape {tuple(lora.A.shape)}: must be (r, {width}), as lm_head_weight is {(vocab, width)}",
    )
    rank = lora.A.shape[0]
    _require(
        tuple(lora.B.shape) == (vocab, rank),
        f"lora.B has shape {tuple(lora.B.shape)}: must be ({vocab}, {rank}), as lora.A is {(rank, width)}",
    )
    _require(math.isfinite(lora.scale), f"lora.scale={lora.scale}: must be finite")
    for factor, label in ((lora.A, "lora.A"), (lora.B, "lora.B")):
        _require(factor.device == hidden.device, f"{label} is on {factor.device} and hidden on {hidden.device}")
        _require(
            factor.dtype == hidden.dtype or torch.is_autocast_enabled(hidden.device.type),
            f"{label} is {factor.dtype} and hidden {hidden.dtype}: convert one of them, or call under "
            f"torch.autocast({hidden.device.type!r}, dtype=...)",
        )


def head_constants(head: LMHead) -> None:
    cap, scale, temperature = head.logit_softcap, head.logit_scale, head.temperature
    _require(cap is None or (math.isfinite(cap) and cap > 0), f"logit_softcap={cap}: must be positive, or None")
    _require(math.isfinite(scale) and scale != 0, f"logit_scale={scale}: must be finite and not 0")
    _require(math.isfinite(temperature) and temperature > 0, f"temperature={temperature}: must be positive")


def sequences(cu_seqlens: Tensor, num_rows: int) -> None:
    """``cu_seqlens`` (S+1,) starts at 0, never falls and ends at the number of rows."""
    _require(
        cu_seqlens.ndim == 1 and len(cu_seqlens) >= 1 and not cu_seqlens.dtype.is_floating_point,
        f"cu_seqlens is {cu_seqlens.dtype} of shape {tuple(cu_seqlens.shape)}: must be integers of shape (S+1,)",
    )
    bounds = cu_seqlens.tolist()
    _require(bounds[0] == 0, f"cu_seqlens starts at {bounds[0]}: must start at 0")
    _require(
        bounds[-1] == num_rows,
        f"cu_seqlens ends at {bounds[-1]}: must end at T={num_rows}, the number of rows",
    )
    for i, (a, b) in enumerate(itertools.pairwise(bounds)):
        _require(b >= a, f"cu_seqlens falls from {a} to {b} at position {i + 1}: must not decrease")


def targets_in_vocabulary(layout: TargetLayout, head: LMHead) -> None:
    """Every counted target is a row of the (whole) weight. Looks at the host's copy."""
    vocab_size = head.vocab_size if head.shard is None else head.shard.vocab_size
    if len(layout.targets) == 0:
        return
    low, high = int(layout.targets.min()), int(layout.targets.max())
    bad = low if low < 0 else high
    _require(
        0 <= bad < vocab_size,
        f"targets holds {bad}: must be in [0, {vocab_size}), or {IGNORE_INDEX} to ignore a row",
    )


def objective(objective: Objective) -> None:
    beta, kl_coef, length_penalty = objective.beta, objective.kl_coef, objective.length_penalty
    preference, label_smoothing = objective.preference, objective.label_smoothing
    importance_cap = objective.importance_cap
    _require(preference in PREFERENCES, f"preference={preference!r}: must be one of {PREFERENCES}")
    _require(math.isfinite(beta) and beta > 0, f"beta={beta}: must be positive")
    _require(math.isfinite(kl_coef) and kl_coef >= 0, f"kl_coef={kl_coef}: must be 0 or more")
    _require(math.isfinite(length_penalty), f"length_penalty={length_penalty}: must be finite")
    _require(0 <= label_smoothing < 0.5, f"label_smoothing={label_smoothing}: must be in [0, 0.5)")
    _require(
        preference == "sigmoid" or label_smoothing == 0,
        f"label_smoothing={label_smoothing} goes with preference='sigmoid', got {preference!r}",
    )
    _require(importance_cap > 0, f"importance_cap={importance_cap}: must be positive (inf truncates nothing)")


def batch(num_sequences: int, num_pairs: int, num_generations: int) -> int:
    """Number of prompts with online samples; the sequences must divide into pairs and groups."""
    _require(num_pairs >= 0, f"num_pairs={num_pairs}: must be 0 or more")
    _require(num_generations >= 2, f"num_generations={num_generations}: RLOO needs at least 2 samples a prompt")
    _require(num_sequences > 0, "there are no sequences: the batch is empty")
    samples = num_sequences - 2 * num_pairs
    _require(samples >= 0, f"num_pairs={num_pairs} needs {2 * num_pairs} sequences, the batch has {num_sequences}")
    _require(
        samples % num_generations == 0,
        f"{num_sequences} sequences are {2 * num_pairs} of pairs and {samples} online samples, "
        f"which num_generations={num_generations} does not divide",
    )
    return samples // num_generations


def reference_logps(ref_logps: Tensor, num_sequences: int, device: torch.device) -> None:
    _require(
        ref_logps.shape == (num_sequences,),
        f"ref_logps has shape {tuple(ref_logps.shape)}: must be ({num_sequences},), one a sequence",
    )
    _require(ref_logps.dtype in FLOATS, f"ref_logps is {ref_logps.dtype}: must be floating point")
    _require(ref_logps.device == device, f"ref_logps is on {ref_logps.device} and hidden on {device}")


def behavior_logps(behavior_logps: Tensor, targets: Tensor | TargetLayout, device: torch.device, kl: str) -> None:
    """Log-probs of the tokens under the policy that drew them: constants, as exact as the policy's own."""
    shape = tuple(behavior_logps.shape)
    _require(
        shape == tuple(targets.shape),
        f"behavior_logps has shape {shape} and targets {tuple(targets.shape)}: need one for each row (those of "
        "pairs and of ignored rows are not read)",
    )
    _require(
        behavior_logps.dtype in (torch.float32, torch.float64),
        f"behavior_logps is {behavior_logps.dtype}: must be float32 or float64, as a ratio of probabilities is the "
        "exponential of its error",
    )
    _require(behavior_logps.device == device, f"behavior_logps is on {behavior_logps.device} and hidden on {device}")
    _require(
        not behavior_logps.requires_grad,
        "behavior_logps requires a gradient, but importance weights are constants: pass behavior_logps.detach()",
    )
    _require(
        kl == "sampled",
        f"behavior_logps corrects kl_estimator='sampled', not {kl!r}: use 'sampled', or samples of the current policy",
    )


def one_reference(
    policy: Projection,
    ref_logps: Tensor | None,
    ref_hidden: Tensor | None,
    ref_weight: Tensor | None,
    ref_bias: Tensor | None,
) -> None:
    """The reference comes either as log-probs or as hidden states, with a head that does not train."""
    hidden, head = policy.hidden, policy.head
    _require(
        ref_logps is not None or ref_hidden is not None,
        "the reference is missing: pass ref_logps (S,), or ref_hidden of the shape of hidden",
    )
    _require(
        ref_logps is None or ref_hidden is None,
        "ref_logps and ref_hidden are both given: pass one of the two",
    )
    if ref_hidden is None:
        _require(ref_weight is None, "ref_lm_head_weight goes with ref_hidden, which is missing")
        _require(ref_bias is None, "ref_bias goes with ref_hidden, which is missing")
        return
    _require(
        ref_hidden.shape == hidden.shape,
        f"ref_hidden has shape {tuple(ref_hidden.shape)} and hidden {tuple(hidden.shape)}: must be equal",
    )
    _require(
        ref_weight is not None or not head.weight.requires_grad,
        "lm_head_weight is being trained, so it is not the reference's: pass ref_lm_head_weight with ref_hidden",
    )
    _require(
        ref_weight is not None or ref_bias is not None or head.bias is None or not head.bias.requires_grad,
        "bias is being trained, so it is not the reference's: pass ref_bias with ref_hidden",
    )


def same_vocabulary(head: LMHead, ref_head: LMHead) -> None:
    _require(
        head.weight.shape[0] == ref_head.weight.shape[0],
        f"lm_head_weight has {head.weight.shape[0]} vocabulary entries and ref_lm_head_weight "
        f"{ref_head.weight.shape[0]}: must be equal",
    )


def kl_estimator(kl_estimator: str, ref_hidden: Tensor | None) -> None:
    """The exact one needs the reference's distributions, of which log-probs of sequences hold one number each."""
    _require(
        kl_estimator in KL_ESTIMATORS,
        f"kl_estimator={kl_estimator!r}: must be one of {', '.join(map(repr, KL_ESTIMATORS))}",
    )
    _require(
        kl_estimator != "exact" or ref_hidden is not None,
        "kl_estimator='exact' needs the reference's whole distributions, which ref_logps does not hold: pass "
        "ref_hidden and ref_lm_head_weight instead of it, or use kl_estimator='sampled'",
    )


def chunk_budget(max_chunk_bytes: int) -> None:
    _require(max_chunk_bytes > 0, f"max_chunk_bytes={max_chunk_bytes}: must be positive")


def values_are_finite(**tensors: Tensor | None) -> None:
    """Waits for the device."""
    for name, tensor in tensors.items():
        if tensor is not None:
            count = int((~tensor.isfinite()).sum())
            _require(count == 0, f"{name} holds {count} values that are NaN or infinite")
