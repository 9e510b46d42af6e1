"""Find duplicate rows, and pairs that contradict an earlier pair, by hashes of token ids."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from hypo_train.data.rows import Example, Ids, Pair, Prompt


@dataclass(frozen=True)
class Repeats:
    """The repeated rows of a split, as indices in the source split, in order."""

    prompts: list[int] = field(default_factory=list)  # rows with the prompt of an earlier row
    rows: list[int] = field(default_factory=list)  # rows equal to an earlier row, completions included
    reversed_pairs: list[int] = field(default_factory=list)  # pairs that prefer what an earlier pair rejects


def find_repeats(rows: Iterable[Pair] | Iterable[Example] | Iterable[Prompt]) -> Repeats:
    """Return the rows that repeat or contradict an earlier row."""
    repeats = Repeats()
    prompts: set[Ids] = set()
    seen: set[tuple[Ids, ...]] = set()
    for row in rows:
        if row.prompt in prompts:
            repeats.prompts.append(row.row)
        prompts.add(row.prompt)
        if isinstance(row, Prompt):
            continue
        texts = _texts(row)
        if texts in seen:
            repeats.rows.append(row.row)
        if isinstance(row, Pair) and (row.prompt, row.rejected, row.chosen) in seen:
            repeats.reversed_pairs.append(row.row)
        seen.add(texts)
    return repeats


def _texts(row: Pair | Example) -> tuple[Ids, ...]:
    if isinstance(row, Pair):
        return row.prompt, row.chosen, row.rejected
    return row.prompt, row.completion


def prompts_in_both(
    train: Sequence[Pair] | Sequence[Example] | Sequence[Prompt],
    held_out: Sequence[Pair] | Sequence[Example] | Sequence[Prompt],
) -> list[int]:
    """Return the indices of the held-out rows whose prompt is also a training row's."""
    trained = {row.prompt for row in train}
    return [row.row for row in held_out if row.prompt in trained]
