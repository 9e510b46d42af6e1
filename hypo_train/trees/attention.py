"""Attention over a packed row of trees, registered as an attention function of transformers.

A model whose ``_attn_implementation`` is ``NAME`` uses SDPA, unless its decoder is called with ``tree=Part``: then each
token attends to its prompt and its own branch only. On CUDA one FlexAttention call serves the whole row. FlexAttention
has no gradients on a CPU, and on CUDA no kernel for heads of fewer than 16 dimensions or for float64. In these cases
SDPA is called for each prompt and each branch, or once for all branches of a small tree.
"""

from __future__ import annotations

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

    @property
    def tokens(self) -> slice:
        """Return the slice of the row that this call computes."""
        prompts = self.layout.num_prompt_tokens
        return slice(0 if self.has_prompts else prompts, None if self.has_branches else prompts)

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, *, scale: float | None, softcap: float | None
    ) -> Tensor:
        """Return attention (1, N, H, D) of queries (1, H, N, D) over keys and values (1, H_kv, N, D)."""
        if self.kept is not None and layer not in self.kept:  # a checkpointed layer that is recomputed keeps the first
            self.kept[layer] = (key, value)
        if self.prompt is not None:
            prompt_key, prompt_value = self.prompt[layer]
            key, value = torch.cat([prompt_key, key], dim=2), torch.cat([prompt_value, value], dim=2)
        if flex_supports(query, key, value):
            mask = self._block_mask(query.device)
            return flex_tree_attention(query, key, value, mask, scale=scale, softcap=softcap)
        return self._attend_by_group(query, key, value, scale, softcap)

    def _block_mask(self, device: torch.device) -> Any:
        has_prompts, has_branches = self.has_prompts, self.has_branches
        make = partial(block_mask, self.layout, has_prompts=has_prompts, has_branches=has_branches, device=device)
        return self.layout.cached_mask((has_prompts, has_branches, device), make)

    def _attend_by_group(
        self, query: Tensor, key: Tensor, value: Tensor, scale: float | None, softcap: float | None
    ) -> Tensor:
        prompts = self.layout.prompts
        groups = self.layout.branch_groups if self.has_branches else []
        lengths = [sum(group) for _, group in groups]
        # split, not slices: the gradient of every slice would be as large as the row.
        queries = query.split([*(prompts if self.has_prompts else ()), *lengths], dim=2)
        keys, values = key.split([*prompts, *lengths], dim=2), value.split([*prompts, *lengths], dim=2)
        outputs = []
        if self.has_prompts:
            for t in range(len(prompts)):
                outputs.append(_attend(queries[t], keys[t], values[t], None, scale, softcap))
        group_queries = queries[len(prompts) if self.has_prompts else 0 :]
        for (t, group), group_query, group_key, group_value in zip(
            groups, group_queries, keys[len(prompts) :], values[len(prompts) :], strict=True
        ):
            tree_key = torch.cat([keys[t], group_key], dim=2)
            tree_value = torch.cat([values[t], group_value], dim=2)
            make = partial(branch_mask, prompts[t], group, query.device)
            mask = self.layout.cached_mask((prompts[t], group, query.device), make)
            outputs.append(_attend(group_query, tree_key, tree_value, mask, scale, softcap))
        return torch.cat([output.transpose(1, 2) for output in outputs], dim=1)


def branch_mask(prompt: int, branches: tuple[int, ...], device: torch.device) -> Tensor:
    """Return (sum of branches, prompt + sum of branches) bool: the keys that the tokens of a tree's branches see."""
    within = torch.block_diag(*(torch.ones(length, length, dtype=torch.bool).tril_() for length in branches))
    return torch.cat([within.new_ones(len(within), prompt), within], dim=1).to(device)


def _attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float | None, softcap: float | None
) -> Tensor:
    """Return attention under ``mask``, or causal attention if there is no mask."""
    if softcap is not None:
        return _softcapped_attention(query, key, value, mask, scale, softcap)
    is_grouped = query.shape[1] != key.shape[1]
    return scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=is_grouped
    )


def _softcapped_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float | None, softcap: float
) -> Tensor:
    """Return attention with scores ``softcap * tanh(score / softcap)``; without a mask the last query sees all keys."""
    repeats = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)
    scores = query @ key.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
    scores = softcap * (scores / softcap).tanh()
    if mask is None:
        every_key = scores.new_ones(scores.shape[-2:], dtype=torch.bool)
        mask = every_key.tril_(key.shape[2] - query.shape[2])
    softmax_dtype = torch.promote_types(scores.dtype, torch.float32)
    # Not minus infinity: a padding token sees no key, and its NaN would reach every row that shares a product with it.
    lowest = torch.finfo(scores.dtype).min
    return scores.masked_fill(~mask, lowest).softmax(-1, dtype=softmax_dtype).to(value.dtype) @ value


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
    if tree is None and options.get("softcap") is not None:  # SDPA has no softcap
        if attention_mask is not None:
            attention_mask = attention_mask[..., : key.shape[2]]
        output = _softcapped_attention(query, key, value, attention_mask, options.get("scaling"), options["softcap"])
        return output.transpose(1, 2).contiguous(), None
    if tree is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    for name in ("position_bias", "s_aux"):
        if options.get(name) is not None:
            raise ValueError(f"{type(module).__name__} has {name}, which tree attention does not support")
    layer: int = module.layer_idx  # type: ignore[assignment]
    return tree.attend(layer, query, key, value, scale=options.get("scaling"), softcap=options.get("softcap")), None


AttentionInterface.register(NAME, _tree_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)


def decoder_inputs(part: Part, device: torch.device) -> dict[str, Any]:
    """Return the arguments, beside token ids and positions, that make a decoder compute ``part``."""
    # transformers does not change a mask of four dimensions, so that no N x N mask is built.
    return {"attention_mask": torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device), "tree": part}
