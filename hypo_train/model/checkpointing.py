"""What the backward pass computes again, instead of the forward pass keeping it."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

Checkpointing = bool | Literal["selective"]

# What costs time, and so is kept: matrix products, and attention under any of its names.
_PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "_grouped_mm", "_scaled_mm"}
_ATTENTION = ("attention", "flash_attn")
# A result that is so many times as wide as what it was computed from costs little for the memory that it takes: it is
# a low-rank update's, LoRA's B. Models' own layers widen by up to 8.
_LOW_RANK = 8


def enable(model: Any, kind: Checkpointing, *, has_dropout: bool) -> None:
    """Have a transformers model checkpoint its layers while it trains.

    Args:
        kind: True keeps each layer's input alone, at the price of one more forward pass; "selective" keeps the
            results of matrix products and of attention too, and computes again what is cheap beside them.
        has_dropout: Whether something in a layer draws random numbers, which the second time must be the same.
    """
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": has_dropout}
    if kind == "selective":
        options["context_fn"] = partial(create_selective_checkpoint_contexts, _keep_what_costs_time)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
    # Only the reentrant kind needs the embeddings' gradient, which would pass through every frozen layer.
    model.disable_input_require_grads()


def _keep_what_costs_time(_: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    name = str(operator).removeprefix("aten.")
    kind = name.split(".")[0]
    costly = kind in _PRODUCTS or any(part in name for part in _ATTENTION)
    if kind in ("mm", "addmm"):
        inner, width = args[-1].shape
        costly = width <= _LOW_RANK * inner
    return CheckpointPolicy.MUST_SAVE if costly else CheckpointPolicy.PREFER_RECOMPUTE
