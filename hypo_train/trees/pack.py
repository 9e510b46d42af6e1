"""Pack prompts and completions into a ``Tree``, the sequences in the loss's order: chosen, rejected, samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor

from hypo_train.data.rows import Example, Pair
from hypo_train.trees.layout import Layout
from hypo_train.trees.tree import Tree

TokenLists = Sequence[Sequence[int]]
Sequences = Sequence[tuple[int, Sequence[int]]]  # (index of the prompt, token ids of the completion)


@dataclass(frozen=True)
class Batcher:
    """Builds the ``Tree`` of a batch: completions share their prompt, or each is in a row of its own."""

    pad_token_id: int
    shares_prompts: bool = True

    def pairs(self, pairs: Sequence[Pair], completions: TokenLists, num_generations: int | None = None) -> Tree:
        """Return the tree of P chosen, P rejected, then ``completions``.

        ``num_generations`` of them belong to each of the first prompts in turn. None: they belong to all prompts.
        """
        sequences = [(i, pair.chosen) for i, pair in enumerate(pairs)]
        sequences += [(i, pair.rejected) for i, pair in enumerate(pairs)]
        samples = _with_prompts(completions, num_generations or len(completions) // len(pairs))
        return self._tree([pair.prompt for pair in pairs], [*sequences, *samples])

    def samples(self, prompts: TokenLists, completions: TokenLists) -> Tree:
        """Return the tree of ``completions``: equally many for each prompt in turn."""
        return self._tree(prompts, _with_prompts(completions, len(completions) // len(prompts)))

    def scored(self, prompts: TokenLists, completions: TokenLists) -> Tree:
        """Return the tree of ``completions`` for a reward model, which reads each sequence's last hidden state.

        Padding at the end of a completion is removed first, even if the pad token is the EOS: transformers' classifiers
        read the hidden state of the last token that is not padding. One token is then added, so that the last row of a
        sequence is its own last token.
        """
        return self.samples(prompts, [[*self._unpadded(ids), self.pad_token_id] for ids in completions])

    def scored_pairs(self, pairs: Sequence[Pair]) -> Tree:
        """Return the tree of each pair's chosen and rejected completion for a reward model (see :meth:`scored`)."""
        completions = [completion for pair in pairs for completion in (pair.chosen, pair.rejected)]
        return self.scored([pair.prompt for pair in pairs], completions)

    def examples(self, examples: Sequence[Example]) -> Tree:
        """Return the tree of one completion for each prompt."""
        return self.samples([e.prompt for e in examples], [e.completion for e in examples])

    def prompts(self, prompts: TokenLists) -> Tree:
        """Return the tree of the prompts alone; a pad token stands for the first token of a completion."""
        return self.samples(prompts, [[self.pad_token_id]] * len(prompts))

    def _unpadded(self, ids: Sequence[int]) -> Sequence[int]:
        length = next((i for i in range(len(ids), 0, -1) if ids[i - 1] != self.pad_token_id), 0)
        return ids[:length]

    def _tree(self, prompts: TokenLists, sequences: Sequences) -> Tree:
        if self.shares_prompts:
            return pack(prompts, sequences)
        return separate_rows(prompts, sequences, pad_token_id=self.pad_token_id)


def pack(prompts: TokenLists, sequences: Sequences) -> Tree:
    """Return prompts and their completions as trees in one row.

    Args:
        prompts: token ids of each prompt, at least one token each.
        sequences: (index of its prompt, completion token ids) in the loss's order. A completion without tokens is a
            sequence of length 0. A prompt without a sequence is left out.

    Raises:
        ValueError: an empty prompt, a sequence whose prompt does not exist, or no sequences.
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
    offsets = torch.tensor([len(prompts[sequences[s][0]]) for s in order])  # the first position of each branch
    input_ids = _concatenated([*(prompts[p] for p in children), *(inputs[s] for s in order)])
    layout = Layout(
        prompts=tuple(prompt_lengths.tolist()),
        branches=tuple(tuple(len(inputs[s]) for s in members) for members in children.values()),
    )
    positions = torch.cat([_ramps(prompt_lengths), offsets.repeat_interleave(branch_lengths) + _ramps(branch_lengths)])
    prompt_ends = [prompt_stop[p] - 1 for p, _ in sequences]
    rows, targets, cu_seqlens = _predictions(sequences, prompt_ends, [branch_start[s] for s in range(len(sequences))])
    return Tree(
        input_ids=input_ids.unsqueeze(0),
        position_ids=positions.unsqueeze(0),
        layout=layout,
        attention_mask=None,
        rows=rows,
        targets=targets,
        cu_seqlens=cu_seqlens,
        num_tokens=len(input_ids),
    )


def separate_rows(prompts: TokenLists, sequences: Sequences, *, pad_token_id: int) -> Tree:
    """Return a right-padded row ``prompt + completion`` for each sequence, which any causal attention can run.

    Arguments and errors are those of :func:`pack`.
    """
    _check(prompts, sequences)
    inputs = [[*prompts[p], *completion[:-1]] for p, completion in sequences]
    lengths = torch.tensor([len(row) for row in inputs])
    width = int(lengths.max())
    mask = torch.arange(width) < lengths.unsqueeze(1)
    prompt_ends = [s * width + len(prompts[p]) - 1 for s, (p, _) in enumerate(sequences)]
    rows, targets, cu_seqlens = _predictions(sequences, prompt_ends, [end + 1 for end in prompt_ends])
    return Tree(
        input_ids=torch.full((len(inputs), width), pad_token_id).masked_scatter(mask, _concatenated(inputs)),
        position_ids=torch.arange(width).expand(len(inputs), width).masked_fill(~mask, 0),
        layout=None,
        attention_mask=mask,
        rows=rows,
        targets=targets,
        cu_seqlens=cu_seqlens,
        num_tokens=int(lengths.sum()),
        row_lengths=tuple(lengths.tolist()),
    )


def _with_prompts(completions: TokenLists, per_prompt: int) -> list[tuple[int, Sequence[int]]]:
    return [(i // per_prompt, completion) for i, completion in enumerate(completions)]


def _predictions(
    sequences: Sequences, prompt_ends: Sequence[int], branch_starts: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``Tree``'s rows, targets and cu_seqlens.

    The last token of the prompt predicts the first token of a branch; any other target is predicted by the one before.
    """
    lengths = torch.tensor([len(completion) for _, completion in sequences])
    within = _ramps(lengths)
    inside = torch.tensor(branch_starts).repeat_interleave(lengths) + within - 1
    rows = torch.where(within == 0, torch.tensor(prompt_ends).repeat_interleave(lengths), inside)
    targets = _concatenated([completion for _, completion in sequences])
    return rows, targets, torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])


def _ramps(lengths: Tensor) -> Tensor:
    """Return [0, 1, 0, 1, 2] for lengths [2, 0, 3]."""
    first = lengths.cumsum(0) - lengths
    return torch.arange(int(lengths.sum())) - first.repeat_interleave(lengths)


def _concatenated(token_lists: TokenLists) -> Tensor:
    return torch.tensor(list(chain.from_iterable(token_lists)), dtype=torch.long)


def _check(prompts: TokenLists, sequences: Sequences) -> None:
    if not sequences:
        raise ValueError("there are no sequences to pack: pass at least one (prompt index, completion)")
    for p, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise ValueError(f"prompt {p} is empty, so no token predicts its completion: give it at least a BOS")
    for s, (prompt_index, _) in enumerate(sequences):
        if not 0 <= prompt_index < len(prompts):
            raise ValueError(f"sequence {s} has prompt index {prompt_index}, but there are {len(prompts)} prompts")
