"""Read the rows of local files: JSON lines, JSON, CSV, TSV, parquet and Arrow, also compressed."""

from __future__ import annotations

import bz2
import codecs
import csv
import gzip
import importlib
import json
import lzma
import sys
import zlib
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import IO, Any

import datasets

from hypo_train.data.errors import DataError, quoted
from hypo_train.data.table import Rows

# Two bytes of UTF-32's mark are UTF-16's, so the longer marks come first.
_MARKS = {
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


class _Problem(ValueError):
    """A file cannot be read; the message is the reason."""


def read_file(path: Path) -> Rows:
    """Return the rows of a file, read by the ending of its name.

    Raises:
        DataError: the file is empty, damaged, or of another kind.
    """
    kind, compression = endings(path)
    if kind not in FILE_FORMATS or (compression and kind in _ARROW):
        raise DataError(f"dataset_name={str(path)!r}: the name should end in one of {', '.join(FILE_FORMATS)}")
    if path.stat().st_size == 0:
        raise DataError(f"dataset_name={str(path)!r}: the file is empty")
    try:
        return FILE_FORMATS[kind](path)
    except (_Problem, EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
        raise DataError(f"dataset_name={str(path)!r}: {error}") from None


def endings(path: Path) -> tuple[str, str]:
    """Return the ending that names the format, and that of a compression or "", both in lower case."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    compression = suffixes.pop() if suffixes and suffixes[-1] in _COMPRESSIONS else ""
    return (suffixes[-1] if suffixes else ""), compression


def is_data_file(path: Path) -> bool:
    """Return whether the name of the file ends as a data file's does."""
    return endings(path)[0] in FILE_FORMATS


def _open_zstd(path: Path, mode: str) -> IO[bytes]:
    for name in ("compression.zstd", "zstandard"):  # Python 3.14 has its own
        try:
            opened: IO[bytes] = importlib.import_module(name).open(path, mode)
            return opened
        except ModuleNotFoundError:
            continue
    raise _Problem("a .zst file needs the package zstandard: install it, or decompress the file")


_COMPRESSIONS: dict[str, Callable[..., Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": _open_zstd,
}


def _open(path: Path) -> IO[bytes]:
    opened: IO[bytes] = _COMPRESSIONS.get(endings(path)[1], open)(path, "rb")
    return opened


def _lines(path: Path) -> Iterator[str]:
    """Yield the lines of a text file, each with its line break, without a byte order mark."""
    with _open(path) as file:
        start = file.read(4)
    encoding = next((name for mark, name in _MARKS.items() if start.startswith(mark)), None)
    with _open(path) as file:
        if encoding is not None:
            try:
                text = file.read().decode(encoding)
            except UnicodeDecodeError as error:
                raise _Problem(f"the file begins as {encoding.upper()} and is not: save it as UTF-8") from error
            yield from (line + "\n" for line in text.split("\n"))
            return
        for number, line in enumerate(file, start=1):
            line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
            try:
                yield line.decode()
            except UnicodeDecodeError:
                raise _Problem(f"line {number} is not UTF-8: save the file as UTF-8") from None


# JSON


def _read_json(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a file of JSON lines, or of one JSON document that holds them."""
    if _is_of_lines(path):
        return _filled(list(_rows_of_lines(path)))
    try:
        document = json.loads("".join(_lines(path)))
    except json.JSONDecodeError as error:
        raise _Problem(f"line {error.lineno} is not JSON: {error.msg}") from None
    except (ValueError, RecursionError) as error:
        raise error if isinstance(error, _Problem) else _Problem(f"the file is not JSON: {_why(error)}") from None
    return _filled(_rows_of_document(document))


def _filled(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows with the columns of all rows; what a row does not have is None, as in parquet."""
    names = dict.fromkeys(name for row in rows for name in row)
    return [row if len(row) == len(names) else names | row for row in rows]


def _is_of_lines(path: Path) -> bool:
    """Return whether the file holds a row a line; files of one document are often called .jsonl, and the reverse."""
    first, second = [*islice((line for line in _lines(path) if line.strip()), 2), "", ""][:2]
    if first.lstrip().startswith("["):
        return False
    return endings(path)[0] != ".json" or _is_object(second) or (_is_object(first) and second != "")


def _is_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _rows_of_lines(path: Path) -> Iterator[dict[str, Any]]:
    number = 0
    problem = None
    for number, line in enumerate(_lines(path), start=1):
        if problem is not None and line.strip():
            raise _Problem(problem)
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            problem = f"line {number} is not JSON: {_why(error)}"
            continue
        if not isinstance(row, dict):
            raise _Problem(f"line {number} is {'null, ' if row is None else ''}not a JSON object")
        yield row
    if problem is not None:
        raise _Problem(f"{problem}; it is the last line, the file may be cut off")


def _why(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "it is nested too deep"
    return error.msg if isinstance(error, json.JSONDecodeError) else str(error)


def _rows_of_document(document: Any) -> list[dict[str, Any]]:
    """Return the rows of a JSON document: a list of them, an object with them as "data", or one of columns."""
    if isinstance(document, dict) and isinstance(document.get("data"), list):
        document = document["data"]
    if isinstance(document, dict):
        return _rows_of_object(document)
    if not isinstance(document, list):
        raise _Problem(f"the file holds {'null' if document is None else 'a single value'}, not a list of rows")
    for index, row in enumerate(document):
        if not isinstance(row, dict):
            raise _Problem(f"row {index} (counted from 0) is {'null, ' if row is None else ''}not a JSON object")
    return document


def _rows_of_object(document: dict[str, Any]) -> list[dict[str, Any]]:
    columns = list(document.values())
    if columns and all(isinstance(column, dict) and "0" in column for column in columns):
        raise _Problem(
            "columns as pandas' to_json writes them by default: write rows with to_json(..., orient='records', "
            "lines=True)"
        )
    if columns and all(isinstance(column, list) for column in columns):
        has_objects = [any(isinstance(item, dict) for item in column) for column in columns]
        if all(has_objects) and not _MESSAGES & document.keys():
            raise _Problem(f"an object with the lists {quoted(document)}: write each to a file of its own")
        if not any(has_objects) and len(set(map(len, columns))) == 1:
            return [dict(zip(document, values, strict=True)) for values in zip(*columns, strict=True)]
    return [document]  # a single row


_MESSAGES = {"prompt", "chosen", "rejected", "completion", "messages", "conversations"}


# CSV


def _read_csv(path: Path, delimiter: str = ",") -> list[dict[str, Any]]:
    """Return the rows of a CSV file. Every cell is text: "NA" is no missing value, and "007" no number."""
    csv.field_size_limit(sys.maxsize)
    reader = csv.reader(_lines(path), delimiter=delimiter, strict=True)
    rows: list[dict[str, Any]] = []
    header: list[str] | None = None
    try:
        for cells in reader:
            if header is None:
                header = _checked_header(cells, delimiter) if cells else None
            elif cells:
                if any(cells[len(header) :]):
                    raise _Problem(
                        f"line {reader.line_num} has {len(cells)} cells, and the header has {len(header)}: put quotes "
                        "around text with a comma or line break"
                    )
                rows.append(dict.fromkeys(header, "") | dict(zip(header, cells, strict=False)))
    except csv.Error as error:
        raise _Problem(f"line {reader.line_num}: {error} (a quote inside a cell is written twice)") from None
    return rows


def _checked_header(header: list[str], delimiter: str) -> list[str]:
    if repeated := [name for name in dict.fromkeys(header) if header.count(name) > 1]:
        raise _Problem(f"several columns are called {quoted(repeated)}")
    other = next((mark for mark in ";\t," if len(header) == 1 and mark in header[0]), None)
    if other is not None:
        raise _Problem(f"cells are separated by {other!r} and not by {delimiter!r}: save them as .csv or .tsv")
    return header


def _read_tsv(path: Path) -> list[dict[str, Any]]:
    return _read_csv(path, "\t")


# Arrow


def _read_arrow(path: Path) -> datasets.Dataset:
    kind = "parquet" if path.suffix.lower() == ".parquet" else "arrow"
    return datasets.load_dataset(kind, data_files=str(path), split="train")


_ARROW = (".parquet", ".arrow")
FILE_FORMATS: dict[str, Callable[[Path], Rows]] = {
    ".jsonl": _read_json,
    ".json": _read_json,
    ".parquet": _read_arrow,
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".ndjson": _read_json,
    ".arrow": _read_arrow,
}
