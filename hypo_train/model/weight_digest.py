"""Digests of weights, to compare them between processes and runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from hypo_train.distributed.fsdp import full_tensor
from hypo_train.model.policy import Policy
from hypo_train.model.quantization import scales
from hypo_train.model.reward_model import RewardModel
from hypo_train.utils.hashing import tensor_digest


def weight_hashes(tensors: Mapping[str, Tensor]) -> dict[str, list[Any]]:
    """Return dtype, shape and digest of each tensor, by name. If any is sharded, all ranks must call this."""
    quantized = {f"{name}.{scale}": t for name, p in tensors.items() for scale, t in scales(p).items()}
    everything = {**tensors, **quantized}  # equal codes with other scales are other weights
    return {name: [str(t.dtype), list(t.shape), tensor_digest(full_tensor(t))] for name, t in everything.items()}


def initial_weights(trained: Policy | RewardModel) -> dict[str, Tensor]:
    """Return the weights that training starts from: the frozen ones, and the reference's copies of the trained ones.

    LoRA's adapter is left out: it is trained, and the reference switches it off.
    """
    frozen = {name: p for name, p in trained.named_parameters() if not p.requires_grad}
    return frozen | (trained.reference_parameters if isinstance(trained, Policy) else {})
