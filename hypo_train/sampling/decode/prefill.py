"""The forward pass over prompts that gives their keys and values and the logits of their last tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import DynamicCache

from hypo_train.sampling.protocol import PromptKV, cache_argument, forward_arguments, left_padded, positions


def prefill(model: Any, prompts: Sequence[Sequence[int]], *, pad_token_id: int) -> PromptKV:
    """Return keys, values and last logits of ``prompts``; no_grad, eval mode and autocast are set by the caller."""
    device = next(model.parameters()).device
    input_ids, attention_mask = left_padded(prompts, pad_token_id, device)
    # Without logits_to_keep, the LM head runs over every token of every prompt.
    last_only = {"logits_to_keep": 1} if "logits_to_keep" in forward_arguments(model) else {}
    output = model(
        input_ids=input_ids,
        attention_mask=attention_mask,
        position_ids=positions(attention_mask),
        use_cache=True,
        # The model's own cache would keep no more than a sliding window of the tokens.
        **{cache_argument(model): DynamicCache()},
        **last_only,
    )
    layers = output[cache_argument(model)].layers
    return PromptKV(
        keys=[layer.keys for layer in layers],
        values=[layer.values for layer in layers],
        mask=attention_mask.bool(),
        logits=output.logits[:, -1],
    )
