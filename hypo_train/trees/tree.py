"""A prompt and its completions as one tree of tokens, all trees in one row without padding.

A row reads `[prompt | prompt ... | branch | branch ...]`: each prompt is computed once, whatever the number of
its completions. Each branch restarts its positions after its prompt, and a token sees its prompt and its own
branch, causally, so every hidden state equals that of the plain row `prompt + completion`.

    row     A  B  C | d  e | f  g        prompt A B C, completions d e x and f g y
    pos     0  1  2 | 3  4 | 3  4        x and y predict nothing, so the row does without them
    rows    C d e     C f g              which hidden states predict ...
    targets d e x     f g y              ... which tokens

A model whose attention cannot do that gets :func:`separate_rows`: a padded row for each completion.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain

import torch
from torch import Tensor

from hypo_train.trees.attention import Layout, causal


@dataclass(frozen=True)
class Tree:
    """The trees of a batch, laid out for one forward pass: R rows of N tokens, T counted tokens, S sequences.

    `hidden.flatten(0, 1)[rows]` (T, D), `targets` and `cu_seqlens` go to the loss.
    """

    input_ids: Tensor  # int64 (R, N)
    position_ids: Tensor  # int64 (R, N)
    layout: Layout | None  # of the trees in the one row; None = separate rows
    attention_mask: Tensor | None  # bool (R, N), False = padding, for separate rows
    rows: Tensor  # int64 (T,) indices into the R * N hidden states, sequence after sequence
    targets: Tensor  # int64 (T,) the counted tokens, on the CPU
    cu_seqlens: Tensor  # int64 (S + 1,) where each sequence starts in rows and targets, on the CPU
    num_tokens: int  # tokens in the rows, padding left out
    num_attended: int  # pairs of a token and one that it attends to, itself included

    def sequences_from(self, first: int) -> Tree:
        """The same rows, where only the tokens of sequences ``first`` and later count."""
        start = int(self.cu_seqlens[first])
        return replace(
            self,
            rows=self.rows[start:],
            targets=self.targets[start:],
            cu_seqlens=self.cu_seqlens[first:] - start,
        )

    def to(self, device: torch.device | str) -> Tree:
        """The tree on `device`; `targets` and `cu_seqlens` stay, because the loss plans on the host."""
        mask = self.attention_mask
        return replace(
            self,
            input_ids=self.input_ids.to(device, non_blocking=True),
            position_ids=self.position_ids.to(device, non_blocking=True),
            attention_mask=None if mask is None else mask.to(device, non_blocking=True),
            rows=self.rows.to(device, non_blocking=True),
        )


def pack(prompts: Sequence[Sequence[int]], sequences: Sequence[tuple[int, Sequence[int]]]) -> Tree:
    """Lay prompts and their completions out as trees in one row.

    Args:
        prompts: token ids of each prompt, at least one token each.
        sequences: (index of its prompt, completion token ids) in the order the loss wants them. A completion
            of no tokens becomes a sequence of length 0. A prompt that no sequence names is left out.

    Raises:
        ValueError: an empty prompt, a sequence without its prompt, or no sequences.
    """
    _check(prompts, sequences)
    # The last token of a completion predicts nothing: it is a target but never an input.
    inputs = [completion[:-1] for _, completion in sequences]
    children: dict[int, list[int]] = {}
    for s, (prompt, _) in enumerate(sequences):
        children.setdefault(prompt, []).append(s)
    order = [s for members in children.values() for s in members]
    prompt_lengths = torch.tensor([len(prompts[p]) for p in children])
    branch_lengths = torch.tensor([len(inputs[s]) for s in order])

    prompt_stop = dict(zip(children, prompt_lengths.cumsum(0).tolist(), strict=True))
    stops = prompt_lengths.sum() + branch_lengths.cumsum(0)
    branch_start = dict(zip(order, (stops - branch_lengths).tolist(), strict=True))
    offsets = torch.tensor([len(prompts[sequences[s][0]]) for s in order])  # a branch's first position
    counted = torch.tensor([len(completion) for _, completion in sequences])
    input_ids = _flat([*(prompts[p] for p in children), *(inputs[s] for s in order)])
    layout = Layout(
        prompts=tuple(prompt_lengths.tolist()),
        branches=tuple(tuple(len(inputs[s]) for s in members) for members in children.values()),
    )
    return Tree(
        input_ids=input_ids.unsqueeze(0),
        position_ids=torch.cat(
            [_ramps(prompt_lengths), offsets.repeat_interleave(branch_lengths) + _ramps(branch_lengths)]
        ).unsqueeze(0),
        layout=layout,
        attention_mask=None,
        rows=_predicting_rows(
            counted,
            [prompt_stop[p] - 1 for p, _ in sequences],
            [branch_start[s] for s in range(len(sequences))],
        ),
        targets=_flat([completion for _, completion in sequences]),
        cu_seqlens=torch.cat([counted.new_zeros(1), counted.cumsum(0)]),
        num_tokens=len(input_ids),
        num_attended=layout.num_attended,
    )


def separate_rows(
    prompts: Sequence[Sequence[int]], sequences: Sequence[tuple[int, Sequence[int]]], *, pad_token_id: int
) -> Tree:
    """The same from a right-padded row `prompt + completion` a sequence: any causal attention serves it."""
    _check(prompts, sequences)
    inputs = [[*prompts[p], *completion[:-1]] for p, completion in sequences]
    lengths = torch.tensor([len(row) for row in inputs])
    width = int(lengths.max())
    mask = torch.arange(width) < lengths.unsqueeze(1)
    input_ids = torch.full((len(inputs), width), pad_token_id).masked_scatter(mask, _flat(inputs))
    counted = torch.tensor([len(completion) for _, completion in sequences])
    ends = [s * width + len(prompts[p]) - 1 for s, (p, _) in enumerate(sequences)]
    return Tree(
        input_ids=input_ids,
        position_ids=torch.arange(width).expand(len(inputs), width).masked_fill(~mask, 0),
        layout=None,
        attention_mask=mask,
        rows=_predicting_rows(counted, ends, [end + 1 for end in ends]),
        targets=_flat([completion for _, completion in sequences]),
        cu_seqlens=torch.cat([counted.new_zeros(1), counted.cumsum(0)]),
        num_tokens=int(lengths.sum()),
        num_attended=sum(causal(len(row)) for row in inputs),
    )


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


def _check(prompts: Sequence[Sequence[int]], sequences: Sequence[tuple[int, Sequence[int]]]) -> None:
    if not sequences:
        raise ValueError("there are no sequences to pack: pass at least one (prompt index, completion)")
    for p, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise ValueError(f"prompt {p} is empty, so nothing predicts what follows it: give it at least a BOS")
    for s, (prompt_index, _) in enumerate(sequences):
        if not 0 <= prompt_index < len(prompts):
            raise ValueError(f"sequence {s} names prompt {prompt_index} of {len(prompts)} prompts")
