"""Records for people and programs: JSON lines, which keep every text as it is, and CSV that a spreadsheet opens."""

from __future__ import annotations

import csv
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hypo_train.config import ConfigError

# A spreadsheet takes a cell that begins so for a formula and runs it; the text of a model's sample may begin with any.
_FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r")


def make_folder(folder: Path, field: str) -> None:
    """Make ``folder``, the value of ``field``, if need be. Raises ConfigError if nothing can be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ConfigError(f"{field}={str(folder)!r} cannot be written to: {error.strerror}") from error


class RecordError(ValueError):
    """What a run says of itself cannot be written, as on a full disk."""


@contextmanager
def written(path: Path) -> Iterator[None]:
    """Around whatever writes ``path``, a run's. Raises RecordError, in the place of the system's error."""
    try:
        yield
    except OSError as error:
        raise RecordError(
            f"cannot write {path}: {error.strerror or error}; checkpoints are kept as they were: mend that, then "
            "--resume_from_checkpoint auto goes on from the newest"
        ) from error


def write_json_lines(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """One object a line, UTF-8."""
    lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
    # A lone surrogate, which JSON can hold and UTF-8 cannot, becomes a question mark.
    path.write_text("".join(lines), encoding="utf-8", errors="replace")


def write_csv(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """A row a record, a column for every name that occurs, quoted as RFC 4180 asks; line breaks in a text stay.

    The file begins with a byte order mark, without which Excel reads UTF-8 as another encoding. A text that a
    spreadsheet would run as a formula gets an apostrophe in front; the JSON lines have it without.
    """
    columns = list(dict.fromkeys(name for record in records for name in record))
    with path.open("w", encoding="utf-8-sig", errors="replace", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows([_cell(record.get(name)) for name in columns] for record in records)


def _cell(value: Any) -> Any:
    if not isinstance(value, str):
        return value  # a negative number stays one
    text = value.replace("\0", "\ufffd")  # many readers stop at a NUL
    return "'" + text if text.startswith(_FORMULA_STARTS) else text
