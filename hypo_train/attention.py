"""Attention over a packed row of trees, as one more attention function of transformers' interface.

A model whose ``_attn_implementation`` is ``NAME`` attends as under SDPA, until a call of its decoder brings a
``tree=Part``: then every token sees its prompt and its own branch alone. On a CPU each tree is attended to by
itself, so that nothing is computed for two trees at once; on CUDA one FlexAttention call skips what is masked.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "hypo_tree"


@dataclass(frozen=True)
class Layout:
    """Where the trees of a packed row lie: first all prompts, then all branches, tree after tree.

    ``prompts[t]`` is the length of tree t's prompt, ``branches[t]`` the lengths of its branches, 0 included.
    """

    prompts: tuple[int, ...]
    branches: tuple[tuple[int, ...], ...]
    _masks: dict[torch.device, list[Tensor]] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def num_prompt_tokens(self) -> int:
        return sum(self.prompts)

    @property
    def num_tokens(self) -> int:
        return self.num_prompt_tokens + sum(map(sum, self.branches))

    @property
    def num_attended(self) -> int:
        """Pairs of a token and one that it attends to, itself included."""
        trees = zip(self.prompts, self.branches, strict=True)
        return sum(causal(prompt) + sum(prompt * b + causal(b) for b in branches) for prompt, branches in trees)

    def branch_masks(self, device: torch.device) -> list[Tensor]:
        """Of each tree, (B, P + B) bool: True where a token of its branches sees one of its prompt or branches."""
        if device not in self._masks:
            self._masks[device] = [
                _branch_mask(prompt, branches).to(device)
                for prompt, branches in zip(self.prompts, self.branches, strict=True)
            ]
        return self._masks[device]


def causal(length: int) -> int:
    """Pairs of a token and one that it attends to, itself included, in a text of ``length`` tokens."""
    return length * (length + 1) // 2


def _branch_mask(prompt: int, branches: Sequence[int]) -> Tensor:
    own = torch.arange(len(branches)).repeat_interleave(torch.tensor(branches, dtype=torch.long))
    same = (own.unsqueeze(1) == own.unsqueeze(0)).tril_()
    return torch.cat([same.new_ones(len(own), prompt), same], dim=1)


# A layer's keys and values, (1, H_kv, N, D) each, by the layer's index.
KeyValues = dict[int, tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Part:
    """The tokens of a layout that one call of the decoder computes: all of them, the prompts or the branches.

    The branches alone go on from ``prompt``, what a call for the prompts ``kept``: two calls compute what one
    does, gradients included, and something may happen in between, as drawing samples does.
    """

    layout: Layout
    has_prompts: bool = True
    has_branches: bool = True
    prompt: KeyValues | None = None  # for the branches alone
    kept: KeyValues | None = None  # an empty dict that the prompts' keys and values are put into

    @property
    def tokens(self) -> slice:
        """Which of the row's tokens."""
        prompts = self.layout.num_prompt_tokens
        return slice(0 if self.has_prompts else prompts, None if self.has_branches else prompts)

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, *, scale: float | None, softcap: float | None
    ) -> Tensor:
        """(1, H, N, D) queries over (1, H_kv, N, D) keys and values -> (1, N, H, D)."""
        if self.kept is not None and layer not in self.kept:  # recomputing a checkpointed layer keeps the first ones
            self.kept[layer] = (key, value)
        if self.prompt is not None:
            prompt_key, prompt_value = self.prompt[layer]
            key, value = torch.cat([prompt_key, key], dim=2), torch.cat([prompt_value, value], dim=2)
        return self._tree_by_tree(query, key, value, scale, softcap)

    def _tree_by_tree(
        self, query: Tensor, key: Tensor, value: Tensor, scale: float | None, softcap: float | None
    ) -> Tensor:
        layout = self.layout
        prompts = list(layout.prompts)
        branches = [sum(lengths) for lengths in layout.branches] if self.has_branches else []
        # Splitting, not slicing: a slice's gradient is as large as the row, and there would be one a tree.
        queries = list(query.split([*(prompts if self.has_prompts else []), *branches], dim=2))
        keys, values = key.split([*prompts, *branches], dim=2), value.split([*prompts, *branches], dim=2)
        out = []
        if self.has_prompts:
            for t in range(len(prompts)):
                out.append(_attend(queries.pop(0), keys[t], values[t], None, scale, softcap))
        for t, mask in enumerate(layout.branch_masks(query.device) if branches else []):
            if branches[t]:
                b = len(prompts) + t
                whole_key = torch.cat([keys[t], keys[b]], dim=2)
                whole_value = torch.cat([values[t], values[b]], dim=2)
                out.append(_attend(queries[t], whole_key, whole_value, mask, scale, softcap))
        return torch.cat([piece.transpose(1, 2) for piece in out], dim=1)


def _attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float | None, softcap: float | None
) -> Tensor:
    """Causal attention where there is no mask."""
    grouped = query.shape[1] != key.shape[1]
    if softcap is None:
        return scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=grouped
        )
    return _capped(query, key, value, mask, scale, softcap)


def _capped(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float | None, softcap: float
) -> Tensor:
    """Attention whose scores are bent below ``softcap``; without a mask the last query sees every key."""
    repeats = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)
    scores = query @ key.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
    scores = softcap * (scores / softcap).tanh()
    if mask is None:
        seen = scores.new_ones(scores.shape[-2:], dtype=torch.bool)
        mask = seen.tril_(key.shape[2] - query.shape[2])
    return scores.masked_fill(~mask, -torch.inf).float().softmax(-1).to(value.dtype) @ value


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
    if tree is None and options.get("softcap") is not None:  # SDPA has none
        if attention_mask is not None:
            attention_mask = attention_mask[..., : key.shape[2]]
        out = _capped(query, key, value, attention_mask, options.get("scaling"), options["softcap"])
        return out.transpose(1, 2).contiguous(), None
    if tree is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    for name in ("position_bias", "s_aux"):
        if options.get(name) is not None:
            raise ValueError(f"{type(module).__name__} has {name} in its attention, which trees do not serve")
    layer: int = module.layer_idx  # type: ignore[assignment]
    out = tree.attend(layer, query, key, value, scale=options.get("scaling"), softcap=options.get("softcap"))
    return out, None


AttentionInterface.register(NAME, _tree_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)


def decoder_inputs(part: Part, device: torch.device) -> dict[str, Any]:
    """What a decoder has to be called with, beside tokens and positions, to attend as ``part`` says."""
    # A mask of four dimensions passes through transformers as it is: nothing N x N is built.
    return {"attention_mask": torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device), "tree": part}
