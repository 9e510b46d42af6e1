"""A prompt and its completions as one tree of tokens, several trees to a row.

A row reads `[prompt | branch | branch ...]`: the prompt is computed once, whatever the number of completions.
Each branch restarts its positions after the prompt, and a token sees its prompt and its own branch, causally,
so every hidden state equals that of the plain row `prompt + completion`.

    row     A  B  C | d  e | f  g        prompt A B C, completions d e x and f g y
    pos     0  1  2 | 3  4 | 3  4        x and y predict nothing, so the row does without them
    rows    C d e     C f g              which hidden states predict ...
    targets d e x     f g y              ... which tokens
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor

_PADDING = -1  # the tree and segment of the tokens that fill a row up


@dataclass(frozen=True)
class Tree:
    """The trees of a batch, laid out for one forward pass: R rows of N tokens, T counted tokens, S sequences.

    `input_ids`, `position_ids` and `attention_mask` go to the decoder; `hidden.flatten(0, 1)[rows]` (T, D),
    `targets` and `cu_seqlens` go to the loss.
    """

    input_ids: Tensor  # int64 (R, N)
    position_ids: Tensor  # int64 (R, N)
    attention_mask: Tensor  # bool (R, 1, N, N), True = may attend
    rows: Tensor  # int64 (T,) indices into the R * N hidden states, sequence after sequence
    targets: Tensor  # int64 (T,) the counted tokens, on the CPU
    cu_seqlens: Tensor  # int64 (S + 1,) where each sequence starts in rows and targets, on the CPU
    num_tokens: int  # tokens in the rows, padding left out

    def to(self, device: torch.device | str) -> Tree:
        """The tree on `device`; `targets` and `cu_seqlens` stay, because the loss plans on the host."""
        return replace(
            self,
            input_ids=self.input_ids.to(device, non_blocking=True),
            position_ids=self.position_ids.to(device, non_blocking=True),
            attention_mask=self.attention_mask.to(device, non_blocking=True),
            rows=self.rows.to(device, non_blocking=True),
        )


def pack(
    prompts: Sequence[Sequence[int]],
    sequences: Sequence[tuple[int, Sequence[int]]],
    *,
    pad_token_id: int,
    max_tokens_per_row: int | None = None,
) -> Tree:
    """Lay prompts and their completions out as trees.

    Args:
        prompts: token ids of each prompt, at least one token each.
        sequences: (index of its prompt, completion token ids) in the order the loss wants them. A completion
            of no tokens becomes a sequence of length 0. A prompt that no sequence names is left out.
        pad_token_id: what fills the ends of rows; nothing attends to it.
        max_tokens_per_row: trees share a row up to this many tokens; None = as many as the longest tree has.
            A longer tree sets the width of all rows.

    Raises:
        ValueError: an empty prompt, a sequence without its prompt, no sequences, or a budget below 1.
    """
    _check(prompts, sequences, max_tokens_per_row)
    # The last token of a completion predicts nothing: it is a target but never an input.
    branches = [completion[:-1] for _, completion in sequences]
    children: dict[int, list[int]] = {}
    for s, (prompt, _) in enumerate(sequences):
        children.setdefault(prompt, []).append(s)
    sizes = {p: len(prompts[p]) + sum(len(branches[s]) for s in members) for p, members in children.items()}
    starts, shape = _place(sizes, max_tokens_per_row)

    segments: list[_Segment] = []
    branch_start = [0] * len(sequences)
    for p, members in children.items():
        segments.append(_Segment(prompts[p], start=starts[p], position=0, tree=p, is_prompt=True))
        cursor = starts[p] + len(prompts[p])
        for s in members:
            branch_start[s] = cursor
            segments.append(_Segment(branches[s], cursor, position=len(prompts[p]), tree=p, is_prompt=False))
            cursor += len(branches[s])

    lengths = torch.tensor([len(segment.tokens) for segment in segments])
    within = _ramps(lengths)
    place = _spread([segment.start for segment in segments], lengths) + within

    def grid(values: Tensor, padding: int) -> Tensor:
        return torch.full(shape, padding, dtype=torch.long).view(-1).index_copy_(0, place, values).view(shape)

    counted = torch.tensor([len(completion) for _, completion in sequences])
    prompt_end = [starts[p] + len(prompts[p]) - 1 for p, _ in sequences]
    return Tree(
        input_ids=grid(_flat([segment.tokens for segment in segments]), pad_token_id),
        position_ids=grid(_spread([segment.position for segment in segments], lengths) + within, 0),
        attention_mask=_prefix_mask(
            tree=grid(_spread([segment.tree for segment in segments], lengths), _PADDING),
            segment=grid(_spread(range(len(segments)), lengths), _PADDING),
            is_prompt=grid(_spread([segment.is_prompt for segment in segments], lengths), 0).bool(),
        ),
        rows=_predicting_rows(counted, prompt_end, branch_start),
        targets=_flat([completion for _, completion in sequences]),
        cu_seqlens=torch.cat([counted.new_zeros(1), counted.cumsum(0)]),
        num_tokens=sum(sizes.values()),
    )


class _Segment(NamedTuple):
    """A prompt or a branch: a run of tokens that lie next to each other in a row."""

    tokens: Sequence[int]
    start: int  # among the R * N tokens
    position: int  # position id of the first token
    tree: int
    is_prompt: bool


def _place(sizes: dict[int, int], budget: int | None) -> tuple[dict[int, int], tuple[int, int]]:
    """First-fit decreasing: each tree's start among the R * N tokens, and (R, N)."""
    # A tree above the budget makes every row as wide as itself, so the others may use that width too.
    capacity = max(budget or 0, max(sizes.values()))
    used: list[int] = []
    slots: dict[int, tuple[int, int]] = {}
    for tree, size in sorted(sizes.items(), key=lambda item: -item[1]):
        row = next((r for r, taken in enumerate(used) if taken + size <= capacity), len(used))
        if row == len(used):
            used.append(0)
        slots[tree] = (row, used[row])
        used[row] += size
    width = max(used)
    return {tree: row * width + offset for tree, (row, offset) in slots.items()}, (len(used), width)


def _prefix_mask(tree: Tensor, segment: Tensor, is_prompt: Tensor) -> Tensor:
    """(R, N) ids of each token's tree and segment -> (R, 1, N, N), True where a query may see a key."""
    # Padding counts as a tree of its own: a query that sees nothing is NaN in SDPA, and reaches the gradients.
    width = tree.shape[1]
    same_tree = tree.unsqueeze(2) == tree.unsqueeze(1)
    same_segment = segment.unsqueeze(2) == segment.unsqueeze(1)
    allowed = same_tree & (same_segment | is_prompt.unsqueeze(1))
    allowed &= torch.ones(width, width, dtype=torch.bool).tril()
    return allowed.unsqueeze(1)


def _predicting_rows(counted: Tensor, prompt_end: list[int], branch_start: list[int]) -> Tensor:
    """(T,) which token predicts each target: its prompt's last for a branch's first, else the one before."""
    within = _ramps(counted)
    inside = _spread(branch_start, counted) + within - 1
    return torch.where(within == 0, _spread(prompt_end, counted), inside)


def _ramps(lengths: Tensor) -> Tensor:
    """[2, 0, 3] -> [0, 1, 0, 1, 2]"""
    first = lengths.cumsum(0) - lengths
    return torch.arange(int(lengths.sum())) - first.repeat_interleave(lengths)


def _spread(values: Sequence[int], lengths: Tensor) -> Tensor:
    """One value a segment -> one value a token."""
    return torch.tensor(values, dtype=torch.long).repeat_interleave(lengths)


def _flat(runs: Sequence[Sequence[int]]) -> Tensor:
    return torch.tensor(list(chain.from_iterable(runs)), dtype=torch.long)


def _check(
    prompts: Sequence[Sequence[int]], sequences: Sequence[tuple[int, Sequence[int]]], budget: int | None
) -> None:
    if budget is not None and budget < 1:
        raise ValueError(f"max_tokens_per_row is {budget}: it must be at least 1, or None for no budget")
    if not sequences:
        raise ValueError("there are no sequences to pack: pass at least one (prompt index, completion)")
    for p, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise ValueError(f"prompt {p} is empty, so nothing predicts what follows it: give it at least a BOS")
    for s, (prompt_index, _) in enumerate(sequences):
        if not 0 <= prompt_index < len(prompts):
            raise ValueError(f"sequence {s} names prompt {prompt_index} of {len(prompts)} prompts")
