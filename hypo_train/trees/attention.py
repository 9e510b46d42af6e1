"""Attention over a packed row of trees, registered as an attention function of transformers.

A model whose ``_attn_implementation`` is ``NAME`` uses SDPA, unless its decoder is called with ``tree=Part``: then each
token attends to its prompt and its own branch only, and in a layer with a sliding window to the last of these tokens.
On CUDA one FlexAttention call serves the whole row. FlexAttention has no gradients on a CPU, and on CUDA no kernel for
heads of fewer than 16 dimensions or for float64. In these cases SDPA is called for each prompt and each branch, or once
for all branches of a small tree.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from hypo_train.trees.flex import block_mask, flex_supports, flex_tree_attention
from hypo_train.trees.layout import Layout
from hypo_train.trees.scores import PLAIN, Scores, stepwise_attention

NAME = "hypo_tree"
KeyValues = dict[int, tuple[Tensor, Tensor]]  # layer index -> keys and values, (1, H_kv, N, D) each


@dataclass(frozen=True)
class Part:
    """The tokens of a layout that one call of the decoder computes: all tokens, the prompts, or the branches.

    A call for the prompts followed by a call for the branches gives the results and gradients of one call for both, so
    that samples can be drawn in between. The first call stores keys and values in ``kept``; the second gets them as
    ``prompt``.
    """

    layout: Layout
    has_prompts: bool = True
    has_branches: bool = True
    prompt: KeyValues | None = None  # the prompts' keys and values, for a call without prompts
    kept: KeyValues | None = None  # an empty dict, which a call for the prompts fills
    windows: Sequence[int | None] = ()  # the sliding window of each layer; empty: no layer has one

    @property
    def tokens(self) -> slice:
        """Return the slice of the row that this call computes."""
        prompts = self.layout.num_prompt_tokens
        return slice(0 if self.has_prompts else prompts, None if self.has_branches else prompts)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scores: Scores = PLAIN) -> Tensor:
        """Return attention (1, N, H, D) of queries (1, H, N, D) over keys and values (1, H_kv, N, D)."""
        if self.kept is not None and layer not in self.kept:  # a checkpointed layer that is recomputed keeps the first
            self.kept[layer] = (key, value)
        if self.prompt is not None:
            prompt_key, prompt_value = self.prompt[layer]
            key, value = torch.cat([prompt_key, key], dim=2), torch.cat([prompt_value, value], dim=2)
        if not query.shape[2]:  # all completions are one token long; neither Inductor nor SDPA by group serves that
            nothing = query[..., :1] + key[:, :1, :0, :1] + value[:, :1, :0]  # keeps autograd's graph connected
            return nothing.transpose(1, 2).to(value.dtype)
        if flex_supports(query, key, value):
            mask = self._block_mask(self._window(layer), query.device)
            return flex_tree_attention(query, key, value, mask, scores)
        return self._attend_by_group(query, key, value, self._window(layer), scores)

    def _window(self, layer: int) -> int | None:
        """Return the layer's sliding window; None if it has none, or none that a sequence is longer than."""
        window = self.windows[layer] if self.windows else None
        return window if window is not None and window < self.layout.longest else None

    def _block_mask(self, window: int | None, device: torch.device) -> Any:
        part = (self.has_prompts, self.has_branches, window, device)
        return self.layout.cached_mask(part, partial(block_mask, self.layout, *part))

    def _attend_by_group(self, query: Tensor, key: Tensor, value: Tensor, window: int | None, scores: Scores) -> Tensor:
        prompts = self.layout.prompts
        groups = self.layout.branch_groups if self.has_branches else []
        lengths = [sum(group) for _, group in groups]
        # split, not slices: the gradient of every slice would be as large as the row.
        queries = query.split([*(prompts if self.has_prompts else ()), *lengths], dim=2)
        keys, values = key.split([*prompts, *lengths], dim=2), value.split([*prompts, *lengths], dim=2)
        outputs = []
        if self.has_prompts:
            for t, prompt in enumerate(prompts):
                mask = self._group_mask(0, (prompt,), window, query.device)
                outputs.append(_attend(queries[t], keys[t], values[t], mask, scores))
        group_queries = queries[len(prompts) if self.has_prompts else 0 :]
        for (t, group), group_query, group_key, group_value in zip(
            groups, group_queries, keys[len(prompts) :], values[len(prompts) :], strict=True
        ):
            prompt_key, prompt_value, prompt = keys[t], values[t], prompts[t]
            if window is not None and prompt >= window:  # a branch's first token sees that many of the prompt's last
                prompt = window - 1
                prompt_key, prompt_value = (x[:, :, x.shape[2] - prompt :] for x in (prompt_key, prompt_value))
            tree_key = torch.cat([prompt_key, group_key], dim=2)
            tree_value = torch.cat([prompt_value, group_value], dim=2)
            mask = self._group_mask(prompt, group, window, query.device)
            outputs.append(_attend(group_query, tree_key, tree_value, mask, scores))
        return torch.cat([output.transpose(1, 2) for output in outputs], dim=1)

    def _group_mask(
        self, prompt: int, branches: tuple[int, ...], window: int | None, device: torch.device
    ) -> Tensor | None:
        """Return the :func:`branch_mask` of these lengths, or None where a plain causal mask is the same."""
        if window is not None and prompt + max(branches) <= window:
            window = None
        if window is None and not prompt and len(branches) == 1:
            return None
        key = (prompt, branches, window, device)
        return self.layout.cached_mask(key, partial(branch_mask, *key))


def branch_mask(prompt: int, branches: tuple[int, ...], window: int | None, device: torch.device) -> Tensor:
    """Return (sum of branches, prompt + sum of branches) bool: the keys that the tokens of a tree's branches see.

    Args:
        prompt: number of keys of the prompt, its last ones.
        window: number of keys that a token sees at most, itself included.
    """
    within = torch.block_diag(*(_causal(length, length, window) for length in branches))
    return torch.cat([torch.cat([_causal(n, prompt, window, prompt) for n in branches]), within], dim=1).to(device)


def _causal(queries: int, keys: int, window: int | None, first: int = 0) -> Tensor:
    """Return (queries, keys) bool: whether query i, at position ``first`` + i, sees key j at position j."""
    mask = torch.ones(queries, keys, dtype=torch.bool).tril_(first)
    return mask if window is None else mask.triu_(first - window + 1)


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scores: Scores) -> Tensor:
    """Return attention under ``mask``, or causal attention if there is no mask."""
    if not scores.is_plain:
        return stepwise_attention(query, key, value, mask, scores)
    is_grouped = query.shape[1] != key.shape[1]
    return scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=mask is None, scale=scores.scale, enable_gqa=is_grouped
    )


def _tree_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    tree: Part | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    scores = Scores(options.get("scaling"), options.get("softcap"), options.get("s_aux"))
    if options.get("position_bias") is not None and not (tree is None and scores.is_plain):
        raise ValueError(f"{type(module).__name__} has position_bias, which tree attention does not support")
    if tree is not None and attention_mask is not None and attention_mask.numel() > 1:  # not that of decoder_inputs
        raise ValueError(
            f"{type(module).__name__} has an attention mask of its own, which tree attention does not support"
        )
    if tree is not None:
        layer: int = module.layer_idx  # type: ignore[assignment]
        return tree.attend(layer, query, key, value, scores), None
    if scores.is_plain:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    if attention_mask is not None:
        attention_mask = attention_mask[..., : key.shape[2]]
    return stepwise_attention(query, key, value, attention_mask, scores).transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, _tree_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)


def decoder_inputs(part: Part, device: torch.device) -> dict[str, Any]:
    """Return the arguments, beside token ids and positions, that make a decoder compute ``part``."""
    # transformers does not change a mask of four dimensions, so that no N x N mask is built.
    return {"attention_mask": torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device), "tree": part}
