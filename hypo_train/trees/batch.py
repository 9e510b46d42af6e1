"""Pairs and samples -> one tree, its sequences in the order of the loss: chosen, rejected, samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hypo_train.data.rows import Example, Pair
from hypo_train.trees.tree import Tree, pack, separate_rows

Completions = Sequence[Sequence[int]]


@dataclass(frozen=True)
class Batcher:
    """Lays batches out as the model can take them: prompts shared by their completions, or separate rows."""

    pad_token_id: int
    shares_prompts: bool = True

    def pairs(self, pairs: Sequence[Pair], completions: Completions) -> Tree:
        """P chosen, P rejected, then ``completions``, as many consecutive ones a prompt as there are (0 is fine)."""
        sequences = [(i, pair.chosen) for i, pair in enumerate(pairs)]
        sequences += [(i, pair.rejected) for i, pair in enumerate(pairs)]
        return self._tree([pair.prompt for pair in pairs], [*sequences, *_samples(completions, len(pairs))])

    def samples(self, prompts: Sequence[Sequence[int]], completions: Completions) -> Tree:
        """``completions``, as many consecutive ones a prompt as there are."""
        return self._tree(prompts, _samples(completions, len(prompts)))

    def scored(self, prompts: Sequence[Sequence[int]], completions: Completions) -> Tree:
        """``completions`` for a reward model: the last row of each sequence is its last token's own.

        Padding at its end is left out first, also where that is the EOS: transformers' classifiers read the hidden
        state of the last token that is no padding.
        """
        return self.samples(prompts, [[*self._unpadded(ids), self.pad_token_id] for ids in completions])

    def scored_pairs(self, pairs: Sequence[Pair]) -> Tree:
        """The same of each pair's chosen, then its rejected."""
        completions = [completion for pair in pairs for completion in (pair.chosen, pair.rejected)]
        return self.scored([pair.prompt for pair in pairs], completions)

    def _unpadded(self, ids: Sequence[int]) -> Sequence[int]:
        length = next((i for i in range(len(ids), 0, -1) if ids[i - 1] != self.pad_token_id), 0)
        return ids[:length]

    def examples(self, examples: Sequence[Example]) -> Tree:
        """One completion a prompt."""
        return self.samples([e.prompt for e in examples], [e.completion for e in examples])

    def prompts(self, prompts: Sequence[Sequence[int]]) -> Tree:
        """The prompts alone; a token that nothing is asked of stands for what may follow each."""
        return self._tree(prompts, [(p, [self.pad_token_id]) for p in range(len(prompts))])

    def _tree(self, prompts: Sequence[Sequence[int]], sequences: list[tuple[int, Sequence[int]]]) -> Tree:
        if self.shares_prompts:
            return pack(prompts, sequences)
        return separate_rows(prompts, sequences, pad_token_id=self.pad_token_id)


def _samples(completions: Completions, num_prompts: int) -> list[tuple[int, Sequence[int]]]:
    each = len(completions) // num_prompts
    return [(i // each, completion) for i, completion in enumerate(completions)]
