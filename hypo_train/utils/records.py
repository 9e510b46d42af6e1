"""Write records as JSON lines, which keep every text unchanged, and as CSV for spreadsheets."""

from __future__ import annotations

import csv
import io
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hypo_train.utils.atomic import write_file
from hypo_train.utils.errors import ConfigError, RecordError

# A spreadsheet runs a cell that begins with one of these as a formula. A model's sample may begin with any of them.
_FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r")


def make_folder(folder: Path, field: str) -> None:
    """Create ``folder``, the value of ``field``, if needed. Raises ConfigError if no file can be written in it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ConfigError(f"{field}={str(folder)!r} cannot be written to: {error.strerror}") from error


@contextmanager
def record_errors(path: Path) -> Iterator[None]:
    """Turn an OSError inside the ``with`` block, which writes the run's record ``path``, into a RecordError."""
    try:
        yield
    except OSError as error:
        raise RecordError(
            f"cannot write {path}: {error.strerror or error}; the checkpoints are unchanged: fix the cause, then "
            "--resume_from_checkpoint auto continues from the newest one"
        ) from error


def write_json(path: Path, record: Mapping[str, Any]) -> None:
    """Write an indented JSON object as UTF-8, atomically. A lone surrogate becomes a question mark."""
    write_file(path, json.dumps(record, indent=2, ensure_ascii=False).encode(errors="replace") + b"\n")


def write_json_lines(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """Write one JSON object per line as UTF-8, atomically. A lone surrogate becomes a question mark."""
    text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    write_file(path, text.encode(errors="replace"))


def write_csv(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """Write one row per record and one column per name, quoted as in RFC 4180, atomically.

    The file begins with a byte order mark: without it, Excel reads UTF-8 as another encoding. A text that a spreadsheet
    would run as a formula gets an apostrophe in front.
    """
    columns = list(dict.fromkeys(name for record in records for name in record))
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(columns)
    writer.writerows([_cell(record.get(name)) for name in columns] for record in records)
    write_file(path, text.getvalue().encode("utf-8-sig", errors="replace"))


def _cell(value: Any) -> Any:
    if not isinstance(value, str):
        return value  # a negative number is no formula
    text = value.replace("\0", "\ufffd")  # many readers stop at a NUL
    return "'" + text if text.startswith(_FORMULA_STARTS) else text
