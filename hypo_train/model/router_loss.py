"""The load-balancing loss of a mixture of experts' routers, as the model's transformers class computes it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import MoeModelOutputWithPast

from hypo_train.model.text_parts import decoder_of
from hypo_train.trees.layout import Layout

RouterLogits = tuple[Tensor, ...]  # of each layer with experts, (tokens, experts)


def router_aux_loss_coef(model: Any, configured: float | None) -> float:
    """Return the weight of the routers' loss: as configured, or as the model's config asks for it.

    Raises:
        ValueError: a weight is configured, and the model's class has no such loss.
    """
    if configured is None:
        return asked_weight(model) if has_router_loss(model) else 0.0
    if configured and not has_router_loss(model):
        raise ValueError(
            f"router_aux_loss_coef={configured:g}: {type(model).__name__} has no load-balancing loss of routers, leave "
            "it out"
        )
    return configured


def has_router_loss(model: Any) -> bool:
    """Return whether the model's class adds a load-balancing loss of its routers if it is asked to."""
    computes = hasattr(sys.modules[type(model).__module__], "load_balancing_loss_func")
    return computes and any(hasattr(part, "output_router_logits") for part in _configs(model))


def asked_weight(model: Any) -> float:
    """Return the weight of the routers' loss in the model's config; 0 unless it has ``output_router_logits: true``."""
    if not any(getattr(part, "output_router_logits", False) for part in _configs(model)):
        return 0.0
    weights = [getattr(model, name, None) for name in ("router_aux_loss_coef", "aux_loss_coef")]
    weights += [getattr(part, "router_aux_loss_coef", None) for part in _configs(model)]
    return float(next((weight for weight in weights if weight is not None), 0.0))


def _configs(model: Any) -> tuple[Any, Any]:
    return model.config, model.config.get_text_config()


def concatenated_logits(first: RouterLogits, second: RouterLogits) -> RouterLogits:
    """Return the logits of two parts of a row, whose tokens follow each other."""
    return tuple(torch.cat(parts) for parts in zip(first, second, strict=True))


def rows_of_tokens(layout: Layout, device: torch.device) -> Tensor:
    """Return for each token of a packed row the number of completions that it is computed for, (1, N)."""
    lengths = [*layout.prompts, layout.num_tokens - layout.num_prompt_tokens]
    counts = torch.tensor([*map(len, layout.branches), 1]).repeat_interleave(torch.tensor(lengths))
    return counts.unsqueeze(0).to(device, non_blocking=True)


def router_loss(base: Any, router_logits: RouterLogits, weights: Tensor) -> Tensor:
    """Return the auxiliary loss () that the model's own forward pass computes from router logits.

    The forward pass runs with the decoder and the LM head replaced, so that only the loss is computed.

    Args:
        base: a transformers model without peft's wrapper.
        router_logits: what the decoder returned for the N tokens of R rows.
        weights: (R, N) how often each token counts: 0 for padding, and for a prompt that several completions share,
            their number. So the loss is that of a row for each completion.
    """
    hidden = torch.zeros(1, 1, base.get_output_embeddings().weight.shape[1], device=weights.device)
    outputs = MoeModelOutputWithPast(last_hidden_state=hidden, router_logits=router_logits)  # type: ignore[arg-type]
    with (
        _replaced_forward(decoder_of(base), lambda *args, **options: outputs),
        _replaced_forward(base.get_output_embeddings(), lambda hidden: hidden),
    ):
        found = base(
            input_ids=torch.zeros_like(weights), attention_mask=weights, use_cache=False, output_router_logits=True
        )
    loss: Tensor = found.aux_loss
    return loss


@contextmanager
def _replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    original = vars(module).get("forward")  # a library may have wrapped it
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if original is not None:
            module.forward = original
