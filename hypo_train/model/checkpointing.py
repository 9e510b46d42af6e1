"""Activation checkpointing: the backward pass recomputes results that the forward pass does not keep."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

Checkpointing = bool | Literal["selective"]

# Operators whose results are kept because they are slow to compute: matrix products and attention (any name).
_PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "_grouped_mm", "_scaled_mm"}
_ATTENTION = ("attention", "flash_attn")
# A product whose result is more than this many times as wide as its operand is recomputed: it is the product with
# LoRA's B, which is fast for its memory. Layers of the models widen by up to 8.
_LOW_RANK = 8


def enable(model: Any, kind: Checkpointing, *, has_dropout: bool) -> None:
    """Make a transformers model checkpoint its layers while it trains.

    Args:
        kind: True keeps each layer's input alone, and costs one more forward pass. "selective" also keeps the results
            of matrix products and attention, and recomputes only what is cheap.
        has_dropout: whether a layer draws random numbers, which must be the same the second time.
    """
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": has_dropout}
    if kind == "selective":
        options["context_fn"] = partial(create_selective_checkpoint_contexts, _keep_what_costs_time)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
    # Only reentrant checkpointing needs the embeddings' gradient, which would pass through every frozen layer.
    model.disable_input_require_grads()


def _keep_what_costs_time(_: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    name = str(operator).removeprefix("aten.")
    kind = name.split(".")[0]
    costly = kind in _PRODUCTS or any(part in name for part in _ATTENTION)
    if kind in ("mm", "addmm"):
        inner, width = args[-1].shape
        costly = width <= _LOW_RANK * inner
    return CheckpointPolicy.MUST_SAVE if costly else CheckpointPolicy.PREFER_RECOMPUTE
