"""Pairs and samples -> one tree, its sequences in the order of the loss: chosen, rejected, samples."""

from __future__ import annotations

from collections.abc import Sequence

from hypo_train.data import Example, Pair
from hypo_train.tree import Tree, pack


def pair_tree(pairs: Sequence[Pair], completions: Sequence[Sequence[int]], pad_token_id: int) -> Tree:
    """P chosen, P rejected, then ``completions``, as many consecutive ones a prompt as there are (0 is fine).

    Every prompt is computed once, for all of its completions.
    """
    sequences = [(i, pair.chosen) for i, pair in enumerate(pairs)]
    sequences += [(i, pair.rejected) for i, pair in enumerate(pairs)]
    return pack(
        [pair.prompt for pair in pairs],
        [*sequences, *_samples(completions, len(pairs))],
        pad_token_id=pad_token_id,
    )


def sample_tree(prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]], pad_token_id: int) -> Tree:
    """``completions``, as many consecutive ones a prompt as there are."""
    return pack(prompts, _samples(completions, len(prompts)), pad_token_id=pad_token_id)


def example_tree(examples: Sequence[Example], pad_token_id: int) -> Tree:
    """One completion a prompt."""
    return sample_tree([e.prompt for e in examples], [e.completion for e in examples], pad_token_id)


def _samples(completions: Sequence[Sequence[int]], num_prompts: int) -> list[tuple[int, Sequence[int]]]:
    each = len(completions) // num_prompts
    return [(i // each, completion) for i, completion in enumerate(completions)]
