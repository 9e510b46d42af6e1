"""Rows that say again, or against, what others say: one pass over token ids, by hash."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from hypo_train.data.rows import Example, Ids, Pair, Prompt


@dataclass(frozen=True)
class Repeats:
    """Indices in the source split, in order."""

    prompts: list[int] = field(default_factory=list)  # rows with the prompt of an earlier one
    rows: list[int] = field(default_factory=list)  # rows equal to an earlier one, completions included
    reversed_pairs: list[int] = field(default_factory=list)  # pairs that prefer what an earlier one rejects


def find_repeats(rows: Iterable[Pair] | Iterable[Example] | Iterable[Prompt]) -> Repeats:
    """What comes more than once in a split."""
    found = Repeats()
    prompts: set[Ids] = set()
    seen: set[tuple[Ids, ...]] = set()
    for row in rows:
        if row.prompt in prompts:
            found.prompts.append(row.row)
        prompts.add(row.prompt)
        if isinstance(row, Prompt):
            continue
        whole = _texts(row)
        if whole in seen:
            found.rows.append(row.row)
        if isinstance(row, Pair) and (row.prompt, row.rejected, row.chosen) in seen:
            found.reversed_pairs.append(row.row)
        seen.add(whole)
    return found


def _texts(row: Pair | Example) -> tuple[Ids, ...]:
    if isinstance(row, Pair):
        return row.prompt, row.chosen, row.rejected
    return row.prompt, row.completion


def prompts_in_both(
    train: Sequence[Pair] | Sequence[Example] | Sequence[Prompt],
    held_out: Sequence[Pair] | Sequence[Example] | Sequence[Prompt],
) -> list[int]:
    """The held-out rows whose prompt a training row has too."""
    trained = {row.prompt for row in train}
    return [row.row for row in held_out if row.prompt in trained]
