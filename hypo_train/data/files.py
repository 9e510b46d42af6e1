"""Read a split of a data set from a file, a folder or the Hub."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import datasets
from datasets.data_files import DataFilesDict, get_data_patterns
from datasets.exceptions import DatasetGenerationError, DatasetsError

from hypo_train.config import Config
from hypo_train.data.errors import DataError, quoted
from hypo_train.data.readers import FILE_FORMATS, is_data_file, read_file
from hypo_train.data.table import Rows, column_names, joined, part_of


def load_rows(config: Config, split: str) -> Rows:
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
        is_local = Path(name).expanduser().exists()
        if isinstance(error, DatasetGenerationError) and not is_local:
            reason += ": download its files and name their folder, where columns that nothing reads may hold anything"
        where = "" if is_local else "no local file or folder, and from the Hub: "
        raise DataError(f"dataset_name={name!r}, split {split!r}: {where}{reason}") from error
    if len(rows) == 0:
        raise DataError(f"dataset_name={name!r}, split {split!r}: there are no rows")
    names = _column_names(rows.features) if isinstance(rows, datasets.Dataset) else column_names(rows)
    if bad := next((column for column in names if "\0" in column), None):
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


def _open(path: Path, config: Config, split: str) -> Rows:
    if path.exists():
        with _no_telemetry():
            return _open_local(path, config, split)
    name = config.dataset_name
    if name.startswith((".", "~", os.sep)) or name.count("/") > 1 or is_data_file(path):
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


def _open_local(path: Path, config: Config, split: str) -> Rows:
    if path.is_file():
        return _split_of({"train": lambda: read_file(path)}, split)
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        return _open_saved(path, split)
    if any((path / file).is_file() for file in ("config.json", "adapter_config.json")):
        raise DataError(f"dataset_name={str(path)!r}: the folder is a saved model, not a data set")
    return _open_folder(path, config, split)


def _open_folder(path: Path, config: Config, split: str) -> Rows:
    """Return the rows of the folder's files of this split, which ``datasets`` finds by their names or a README.md."""
    card = path / "README.md"
    if config.dataset_config is not None or (card.is_file() and b"\nconfigs:" in card.read_bytes()):
        found = datasets.load_dataset_builder(str(path), config.dataset_config).config.data_files
    else:
        found = DataFilesDict.from_patterns(get_data_patterns(str(path)), base_path=str(path))
    files = {str(name): [Path(file) for file in listed if is_data_file(Path(file))] for name, listed in found.items()}
    if not any(files.values()):
        raise DataError(f"dataset_name={str(path)!r}: no file in the folder ends in one of {', '.join(FILE_FORMATS)}")
    return _split_of({name: partial(_read_files, listed) for name, listed in files.items()}, split)


def _read_files(files: Iterable[Path]) -> Rows:
    return joined(map(read_file, files))


def _listing(folder: Path) -> str:
    if not folder.is_dir():
        return f"nor is there a folder {str(folder)!r}"
    names = sorted(path.name for path in folder.glob("[!.]*") if path.is_dir() or is_data_file(path))
    shown = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
    return f"in {str(folder)!r} there is {shown or 'no data file'}"


def _split_of(splits: Mapping[str, Callable[[], Rows]], split: str) -> Rows:
    """Return the rows that ``split`` names, as in "train", "train[:90%]" and "train+test".

    Raises:
        ValueError: there is no such split.
    """
    read = {name: splits[name]() for name in splits if name in split}
    lengths = {name: len(read[name]) if name in read else 0 for name in splits}
    parts = datasets.ReadInstruction.from_spec(split).to_absolute(lengths)
    return joined(
        part_of(read[part.splitname], range(len(read[part.splitname]))[part.from_ : part.to]) for part in parts
    )


def _open_saved(path: Path, split: str) -> datasets.Dataset:
    saved = datasets.load_from_disk(str(path))
    # A single saved data set often has no split name; like a single file, it is "train".
    splits = saved if isinstance(saved, datasets.DatasetDict) else {str(saved.split or "train"): saved}
    if split not in splits:
        raise DataError(f"dataset_name={str(path)!r}: there is no split {split!r}, only {quoted(splits)}")
    return splits[split]
