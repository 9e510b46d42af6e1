"""What weights hold, as short strings: to know those of another process, run or day again."""

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
    """Dtype, shape and content of each, by name; of sharded ones, all processes must ask together."""
    quantized = {f"{name}.{scale}": t for name, p in tensors.items() for scale, t in scales(p).items()}
    everything = {**tensors, **quantized}  # equal codes under other scales are other weights
    return {name: [str(t.dtype), list(t.shape), tensor_digest(full_tensor(t))] for name, t in everything.items()}


def initial_weights(trained: Policy | RewardModel) -> dict[str, Tensor]:
    """The weights that training leaves as they were: those that are frozen, and the reference's copies of the others.

    LoRA's adapter, trained and without a copy, is switched off in the reference and does not count.
    """
    frozen = {name: p for name, p in trained.named_parameters() if not p.requires_grad}
    return frozen | (trained.reference_parameters if isinstance(trained, Policy) else {})
