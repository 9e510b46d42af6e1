"""The rows that a run trains on, as token ids: pairs, examples and prompts."""

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
    """A preference pair as token ids; each completion has one EOS, at its end."""

    row: int  # index in the source split
    prompt: Ids
    chosen: Ids
    rejected: Ids

    @property
    def num_tokens(self) -> int:
        """Return the number of tokens of the prompt and both completions."""
        return len(self.prompt) + len(self.chosen) + len(self.rejected)


@dataclass(frozen=True)
class Example:
    """A prompt and the completion to imitate, as token ids; the completion has one EOS, at its end."""

    row: int  # index in the source split
    prompt: Ids
    completion: Ids

    @property
    def num_tokens(self) -> int:
        return len(self.prompt) + len(self.completion)


@dataclass(frozen=True)
class Prompt:
    """A prompt to sample from, as token ids."""

    row: int  # index in the source split
    prompt: Ids

    @property
    def num_tokens(self) -> int:
        return len(self.prompt)


def rows_hash(rows: Sequence[Any]) -> str:
    """Return the SHA-256 of all tokens of all rows, in order; lengths separate the lists of tokens."""
    digest = hashlib.sha256()
    names = [field.name for field in fields(rows[0]) if field.name != "row"] if rows else []
    for row in rows:
        for name in names:
            ids = getattr(row, name)
            digest.update(array("q", (len(ids), *ids)).tobytes())
    return digest.hexdigest()
