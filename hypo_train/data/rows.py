"""What a run trains on, as token ids."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, TypeAlias, TypeVar

Ids: TypeAlias = tuple[int, ...]
Row = TypeVar("Row", "Pair", "Example", "Prompt")


@dataclass(frozen=True)
class Pair:
    """One preference row as token ids; both completions end with their only EOS."""

    row: int  # index in the source split
    prompt: Ids
    chosen: Ids
    rejected: Ids

    @property
    def num_tokens(self) -> int:
        """Of the prompt, once, and both completions."""
        return len(self.prompt) + len(self.chosen) + len(self.rejected)


@dataclass(frozen=True)
class Example:
    """One prompt and the completion to imitate, as token ids; the completion ends with its only EOS."""

    row: int  # index in the source split
    prompt: Ids
    completion: Ids

    @property
    def num_tokens(self) -> int:
        """Of prompt and completion."""
        return len(self.prompt) + len(self.completion)


@dataclass(frozen=True)
class Prompt:
    """One prompt to sample from, as token ids."""

    row: int  # index in the source split
    prompt: Ids

    @property
    def num_tokens(self) -> int:
        return len(self.prompt)


def rows_hash(rows: Sequence[Any]) -> str:
    """SHA-256 of every token of every row, in order, each list of them told from the next by its length."""
    digest = hashlib.sha256()
    names = [field.name for field in fields(rows[0]) if field.name != "row"] if rows else []
    for row in rows:
        for name in names:
            ids = getattr(row, name)
            digest.update(array("q", (len(ids), *ids)).tobytes())
    return digest.hexdigest()
