"""Read a split of a data set from a file, a folder or the Hub."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
from datasets.exceptions import DatasetGenerationError, DatasetsError

from hypo_train.config import Config
from hypo_train.data.errors import DataError, quoted

FILE_FORMATS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}


def load_rows(config: Config, split: str) -> datasets.Dataset:
    """Return one split of ``config.dataset_name``: a file, a folder of files, a saved data set or a Hub name.

    Nothing is written next to a local file: ``datasets`` writes to its own cache folder.

    Raises:
        DataError: the data set is missing, broken or empty, or has no such split.
    """
    name = config.dataset_name
    try:
        rows = _open(Path(name).expanduser(), config, split)
    except DataError:
        raise
    except (DatasetsError, OSError, ValueError, RuntimeError) as error:
        # The message of a DatasetGenerationError is always the same; its cause says what went wrong.
        cause = error.__cause__ if isinstance(error, DatasetGenerationError) else None
        reason = " ".join(str(cause or error).split())
        if "corresponds to no data" in reason:
            reason = "there are no rows"
        reason = reason if len(reason) <= 300 else f"{reason[:280]}..."
        where = "" if Path(name).expanduser().exists() else "no local file or folder, and from the Hub: "
        raise DataError(f"dataset_name={name!r}, split {split!r}: {where}{reason}") from error
    if len(rows) == 0:
        raise DataError(f"dataset_name={name!r}, split {split!r}: there are no rows")
    if bad := next((column for column in _column_names(rows.features) if "\0" in column), None):
        raise DataError(f"dataset_name={name!r}, split {split!r}: the column or key {bad!r} has a NUL character")
    return rows


def _column_names(features: Any) -> Iterator[str]:
    """Yield the names of the columns and of the keys inside them."""
    if isinstance(features, dict):
        for name, inner in features.items():
            yield name
            yield from _column_names(inner)
    elif isinstance(features, list):
        yield from _column_names(features[0])
    elif hasattr(features, "feature"):
        yield from _column_names(features.feature)


def _open(path: Path, config: Config, split: str) -> datasets.Dataset:
    if path.exists():
        with _no_telemetry():
            return _open_local(path, config, split)
    name = config.dataset_name
    if name.startswith((".", "~", os.sep)) or name.count("/") > 1 or path.suffix in FILE_FORMATS:
        raise DataError(f"dataset_name={name!r}: there is no such file or folder; {_listing(path.parent)}")
    return datasets.load_dataset(name, config.dataset_config, split=split)


@contextmanager
def _no_telemetry() -> Iterator[None]:
    """Do not report to the Hub that a local file was opened; without a network, that costs seconds."""
    before = datasets.config.HF_UPDATE_DOWNLOAD_COUNTS
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False
    try:
        yield
    finally:
        datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = before


def _open_local(path: Path, config: Config, split: str) -> datasets.Dataset:
    if path.is_file():
        return _open_file(path, split)
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        return _open_saved(path, split)
    if any((path / file).is_file() for file in ("config.json", "adapter_config.json")):
        raise DataError(f"dataset_name={str(path)!r}: the folder is a saved model, not a data set")
    for file in path.rglob("*.json*"):
        _refuse_null_rows(file)
    return datasets.load_dataset(str(path), config.dataset_config, split=split)


def _listing(folder: Path) -> str:
    if not folder.is_dir():
        return f"nor is there a folder {str(folder)!r}"
    names = sorted(path.name for path in folder.glob("[!.]*") if path.is_dir() or path.suffix in FILE_FORMATS)
    shown = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
    return f"in {str(folder)!r} there is {shown or 'no data file'}"


def _open_file(path: Path, split: str) -> datasets.Dataset:
    if path.suffix not in FILE_FORMATS:
        raise DataError(f"dataset_name={str(path)!r}: the name should end in one of {', '.join(FILE_FORMATS)}")
    if path.stat().st_size == 0:
        raise DataError(f"dataset_name={str(path)!r}: the file is empty")
    _refuse_null_rows(path)
    options: dict[str, Any] = {}
    if path.suffix == ".csv":
        # Read every cell as text: the completion "NA" is not a missing value, and "007" is not a number.
        columns = ("prompt", "chosen", "rejected", "completion", "subreddit", "title", "post", "summary")
        options = {"keep_default_na": False, "converters": dict.fromkeys(columns, str)}
    try:
        return datasets.load_dataset(FILE_FORMATS[path.suffix], data_files=str(path), split=split, **options)
    except DatasetsError:
        if path.suffix == ".jsonl":
            _check_json_lines(path)
        raise


def _refuse_null_rows(path: Path) -> None:
    """Raise ``DataError`` for a row that is null, because pyarrow's reader would crash the process."""
    if path.suffix == ".jsonl":
        with path.open("rb") as file:
            row = next((number for number, line in enumerate(file, start=1) if line.strip() == b"null"), None)
        if row is not None:
            raise DataError(f"dataset_name={str(path)!r}: line {row} is null, not a JSON object")
    elif path.suffix == ".json" and b"null" in (content := path.read_bytes()):
        try:
            rows = json.loads(content)
        except (ValueError, RecursionError):
            lines = [line.strip() for line in content.splitlines()]
            rows = [None] if b"null" in lines else []  # the reader will name any other error
        if rows is None or (isinstance(rows, list) and None in rows):
            raise DataError(f"dataset_name={str(path)!r}: a row is null, not a JSON object")


def _check_json_lines(path: Path) -> None:
    """Raise ``DataError`` with the number of the line that is not a JSON object; the reader does not name it."""
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            try:
                row = json.loads(line) if line.strip() else {}
            except json.JSONDecodeError as error:
                raise DataError(f"dataset_name={str(path)!r}: line {number} is not JSON: {error.msg}") from None
            if not isinstance(row, dict):
                raise DataError(f"dataset_name={str(path)!r}: line {number} is not a JSON object")


def _open_saved(path: Path, split: str) -> datasets.Dataset:
    saved = datasets.load_from_disk(str(path))
    # A single saved data set often has no split name; like a single file, it is "train".
    splits = saved if isinstance(saved, datasets.DatasetDict) else {str(saved.split or "train"): saved}
    if split not in splits:
        raise DataError(f"dataset_name={str(path)!r}: there is no split {split!r}, only {quoted(splits)}")
    return splits[split]
