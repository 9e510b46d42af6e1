"""Attention over a packed row of trees, as one more attention function of transformers' interface.

A model whose ``_attn_implementation`` is ``NAME`` attends as under SDPA, until a call of its decoder brings a
``tree=Part``: then every token sees its prompt and its own branch alone. On CUDA one FlexAttention call serves the
whole row. A CPU, for which it has no gradients, attends run by run, each with SDPA (a run: a prompt or a branch; of a
small tree all branches at once); so do the few models on CUDA for which FlexAttention has no kernel: heads of less
than 16 dimensions, and float64.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from hypo_train.trees import flex

NAME = "hypo_tree"

# Tokens up to which a tree's branches are attended in one masked call: there, calls cost more than the scores that a
# mask throws away. Forward and backward of 32 trees of 10 + 4 x 18 tokens take 0.74 of the time on one core, of 16
# trees of 32 + 4 x 32 tokens 1.10.
SMALL_TREE = 96


@dataclass(frozen=True)
class Layout:
    """Where the trees of a packed row lie: first all prompts, then all branches, tree after tree.

    ``prompts[t]`` is the length of tree t's prompt, ``branches[t]`` the lengths of its branches, 0 included.
    """

    prompts: tuple[int, ...]
    branches: tuple[tuple[int, ...], ...]
    _branch_masks: dict[tuple[int, tuple[int, ...], torch.device], Tensor] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )
    _block_masks: dict[tuple[bool, bool, torch.device], BlockMask] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    @property
    def num_prompt_tokens(self) -> int:
        return sum(self.prompts)

    @property
    def num_tokens(self) -> int:
        return self.num_prompt_tokens + sum(map(sum, self.branches))

    @cached_property
    def branch_groups(self) -> list[tuple[int, tuple[int, ...]]]:
        """Which branches are attended in one call: (tree, lengths), in the row's order, without empty ones.

        A small tree's together, a large one's each alone: two small copies more, and no query meets another branch's
        keys. On one core, forward and backward of four branches of 48 (384) tokens after 256 take 0.94 (0.35) of the
        time of one masked call.
        """
        groups: list[tuple[int, tuple[int, ...]]] = []
        for t, (prompt, branches) in enumerate(zip(self.prompts, self.branches, strict=True)):
            lengths = tuple(length for length in branches if length)
            together = [lengths] if prompt + sum(lengths) <= SMALL_TREE else [(length,) for length in lengths]
            groups += [(t, group) for group in together if group]
        return groups

    @property
    def num_attended(self) -> int:
        """Pairs of a token and one that it attends to, itself included."""
        trees = zip(self.prompts, self.branches, strict=True)
        return sum(causal(prompt) + sum(prompt * b + causal(b) for b in branches) for prompt, branches in trees)

    def branch_mask(self, prompt: int, branches: tuple[int, ...], device: torch.device) -> Tensor:
        """(Σ branches, prompt + Σ branches) bool: what a tree's branches see of their prompt and themselves."""
        key = (prompt, branches, device)
        if key not in self._branch_masks:
            own = torch.block_diag(*(torch.ones(length, length, dtype=torch.bool).tril_() for length in branches))
            mask = torch.cat([own.new_ones(len(own), prompt), own], dim=1)
            self._branch_masks[key] = mask.to(device)
        return self._branch_masks[key]

    def block_mask(self, has_prompts: bool, has_branches: bool, device: torch.device) -> BlockMask:
        """FlexAttention's mask for a :class:`Part`, built once for all layers."""
        key = (has_prompts, has_branches, device)
        if key not in self._block_masks:
            which = {"has_prompts": has_prompts, "has_branches": has_branches}
            self._block_masks[key] = flex.block_mask(self, **which, device=device)
        return self._block_masks[key]


def causal(length: int) -> int:
    """Pairs of a token and one that it attends to, itself included, in a text of ``length`` tokens."""
    return length * (length + 1) // 2


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
        if flex.serves(query, key, value):
            mask = self.layout.block_mask(self.has_prompts, self.has_branches, query.device)
            return flex.attend(query, key, value, mask, scale=scale, softcap=softcap)
        return self._run_by_run(query, key, value, scale, softcap)

    def _run_by_run(
        self, query: Tensor, key: Tensor, value: Tensor, scale: float | None, softcap: float | None
    ) -> Tensor:
        prompts = self.layout.prompts
        groups = self.layout.branch_groups if self.has_branches else []
        lengths = [sum(group) for _, group in groups]
        # Splitting, not slicing: a slice's gradient is as large as the row, and there would be one a run.
        queries = query.split([*(prompts if self.has_prompts else ()), *lengths], dim=2)
        keys, values = key.split([*prompts, *lengths], dim=2), value.split([*prompts, *lengths], dim=2)
        out = []
        if self.has_prompts:
            for t in range(len(prompts)):
                out.append(_attend(queries[t], keys[t], values[t], None, scale, softcap))
        group_queries = queries[len(prompts) if self.has_prompts else 0 :]
        for (t, group), own_query, own_key, own_value in zip(
            groups, group_queries, keys[len(prompts) :], values[len(prompts) :], strict=True
        ):
            whole_key, whole_value = torch.cat([keys[t], own_key], dim=2), torch.cat([values[t], own_value], dim=2)
            mask = self.layout.branch_mask(prompts[t], group, query.device)
            out.append(_attend(own_query, whole_key, whole_value, mask, scale, softcap))
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
    precise = torch.promote_types(scores.dtype, torch.float32)
    # Not minus infinity: a padding token sees no key, and its NaN would reach every row that shares a product with it.
    unseen = torch.finfo(scores.dtype).min
    return scores.masked_fill(~mask, unseen).softmax(-1, dtype=precise).to(value.dtype) @ value


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
