"""The errors of data that cannot be used, and helpers for their messages."""

from __future__ import annotations

from collections.abc import Iterable

MOST_NAMES = 30


class DataError(ValueError):
    """The data cannot be trained on; the message names the file, split or column and what it holds."""


class Unusable(Exception):
    """A row cannot be used; the message is a reason that can follow "3 rows with"."""


def quoted(names: Iterable[str]) -> str:
    """Return the names in quotes, separated by commas, for an error message; of many, the first ones."""
    listed = list(map(repr, names))
    more = f" and {len(listed) - MOST_NAMES} more" if len(listed) > MOST_NAMES else ""
    return ", ".join(listed[:MOST_NAMES]) + more


def refuse_blank(text: str, part: str) -> None:
    """Raise ``Unusable`` if the text of a part is empty or white space."""
    if not text.strip():
        raise Unusable(f"an empty {part!r}")
