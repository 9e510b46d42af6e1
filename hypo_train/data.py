"""Preference rows -> token ids.

`load_rows` reads a data set, `tokenize_pairs` turns its rows into `Pair`s (`tokenize_examples` into SFT
`Example`s) and reports every row it could not use, `batch_indices` says which rows a step trains on.

Every completion ends with exactly one EOS; a prompt has at most one BOS. Prompt and completion are
tokenised apart, so that the prompt a sample continues has the very ids the offline completions continue.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import datasets
from datasets.exceptions import DatasetsError
from jinja2 import TemplateError

from hypo_train.config import Config

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FILE_FORMATS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
TEXT_COLUMNS = ("prompt", "chosen", "rejected", "completion")
BLOCK = 1000  # rows tokenised in one call: fast tokenizers run a batch in parallel

Messages: TypeAlias = list[dict[str, Any]]
Rows: TypeAlias = "datasets.Dataset | Sequence[Mapping[str, Any]]"


class DataError(ValueError):
    """Data that cannot be trained on; the message names the file, split or column and what is there."""


class _Unusable(Exception):
    """One row that cannot be used; the message is the reason, to be read after "3 with"."""


@dataclass(frozen=True)
class Pair:
    """One preference row as token ids; both completions end with their only EOS."""

    row: int  # index in the source split
    prompt: tuple[int, ...]
    chosen: tuple[int, ...]
    rejected: tuple[int, ...]


@dataclass(frozen=True)
class Example:
    """One prompt and the completion to imitate, as token ids; the completion ends with its only EOS."""

    row: int  # index in the source split
    prompt: tuple[int, ...]
    completion: tuple[int, ...]


@dataclass(frozen=True)
class DataReport:
    """What became of the rows of a split. `lengths` are token counts: median, 95th percentile, largest."""

    rows: int
    used: int
    dropped: dict[str, list[int]]  # reason -> row indices
    completions: int  # used rows have one or two each
    truncated_prompts: int
    truncated_completions: int
    texts_cut_at_eos: int  # completions with text after an EOS of their own
    doubled_bos: int  # prompts whose second BOS was taken away
    lengths: dict[str, tuple[int, int, int]]

    def lines(self) -> list[str]:
        """The report as text, one finding a line."""
        lines = [f"{self.used} of {self.rows} rows used"]
        if self.dropped:
            reasons = [f"{len(rows)} with {why} ({_name_rows(rows)})" for why, rows in self.dropped.items()]
            lines.append(f"{self.rows - self.used} of {self.rows} rows dropped: {', '.join(reasons)}")
        for count, total, finding in (
            (self.truncated_prompts, self.used, "prompts cut to their last max_prompt_length tokens"),
            (self.truncated_completions, self.completions, "completions cut to max_completion_length tokens"),
            (self.texts_cut_at_eos, self.completions, "completions cut at an EOS inside their text"),
            (self.doubled_bos, self.used, "prompts had a second BOS, which was removed"),
        ):
            if count:
                lines.append(f"{count} of {total} ({count / total:.1%}) {finding}")
        for name, (median, high, largest) in self.lengths.items():
            lines.append(f"{name} tokens: median {median}, 95% {high}, largest {largest}")
        return lines


def _name_rows(rows: list[int]) -> str:
    shown = ", ".join(map(str, rows[:8])) + (", ..." if len(rows) > 8 else "")
    return f"row {shown}" if len(rows) == 1 else f"rows {shown}"


def load_rows(config: Config, split: str) -> datasets.Dataset:
    """The rows of one split of `config.dataset_name`: a file, a folder, a saved data set or a Hub name.

    Nothing is written beside a local file: what `datasets` caches goes to its own cache folder.
    Raises `DataError` for a missing file, an unknown split, a broken or an empty file.
    """
    name = config.dataset_name
    path = Path(name)
    try:
        if path.is_file():
            rows = _load_file(path, split)
        elif (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
            rows = _load_saved(path, split)
        elif path.exists() or not _looks_like_a_path(name):
            rows = datasets.load_dataset(name, config.dataset_config, split=split)
        else:
            raise DataError(f"dataset_name={name!r}: there is no such file or folder; {_listing(path.parent)}")
    except DataError:
        raise
    except (DatasetsError, OSError, ValueError, RuntimeError) as error:
        raise DataError(f"dataset_name={name!r}, split {split!r}: {_reason(error)}") from error
    if len(rows) == 0:
        raise DataError(f"dataset_name={name!r}, split {split!r}: there are no rows")
    return rows


def _looks_like_a_path(name: str) -> bool:
    return name.startswith((".", "~", os.sep)) or name.count("/") > 1 or Path(name).suffix in FILE_FORMATS


def _listing(folder: Path) -> str:
    if not folder.is_dir():
        return f"nor is there a folder {str(folder)!r}"
    names = sorted(path.name for path in folder.iterdir() if path.is_dir() or path.suffix in FILE_FORMATS)
    shown = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
    return f"in {str(folder)!r} there is {shown or 'no data file'}"


def _load_file(path: Path, split: str) -> datasets.Dataset:
    if path.suffix not in FILE_FORMATS:
        raise DataError(f"dataset_name={str(path)!r}: the name should end in one of {', '.join(FILE_FORMATS)}")
    if path.stat().st_size == 0:
        raise DataError(f"dataset_name={str(path)!r}: the file is empty")
    options: dict[str, Any] = {}
    if path.suffix == ".csv":
        # Every cell is text: a completion "NA" or "12" is neither a missing value nor a number.
        options = {"keep_default_na": False, "converters": dict.fromkeys(TEXT_COLUMNS, str)}
    try:
        return datasets.load_dataset(FILE_FORMATS[path.suffix], data_files=str(path), split=split, **options)
    except DatasetsError:
        if path.suffix == ".jsonl":
            _check_json_lines(path)
        raise


def _check_json_lines(path: Path) -> None:
    """Name the line that makes a file unreadable, which the reader's own error does not."""
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            try:
                row = json.loads(line) if line.strip() else {}
            except json.JSONDecodeError as error:
                raise DataError(f"dataset_name={str(path)!r}: line {number} is not JSON: {error}") from None
            if not isinstance(row, dict):
                raise DataError(f"dataset_name={str(path)!r}: line {number} is not an object of columns")


def _load_saved(path: Path, split: str) -> datasets.Dataset:
    saved = datasets.load_from_disk(str(path))
    # A data set saved alone has no split names to choose from.
    splits = saved if isinstance(saved, datasets.DatasetDict) else {"train": saved, str(saved.split): saved}
    if split not in splits:
        there = ", ".join(name for name in splits if name != "None")
        raise DataError(f"dataset_name={str(path)!r}: there is no split {split!r}, only {there}")
    return splits[split]


def _reason(error: BaseException) -> str:
    """One line of what `datasets` said; its build errors hide the cause in `__cause__`."""
    text = " ".join(str(error.__cause__ or error).split())
    if "corresponds to no data" in text:
        return "there are no rows"
    return text or type(error).__name__


def tokenize_pairs(
    dataset: Rows,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_prompt_length: int,
    max_completion_length: int,
    eos_token_ids: Sequence[int],
    first_row: int = 0,
) -> tuple[list[Pair], DataReport]:
    """Token ids of the preference rows that can be used, in order, and a report on all of them.

    Columns: `chosen`, `rejected` and, unless it is their common beginning, `prompt`; each text or a list of
    chat messages. `first_row` is the index of the first row in its split, for the report and `Pair.row`.
    Lengths are in tokens, EOS included. Raises `DataError` when a column is missing, when chat messages meet
    a tokenizer without a chat template, and when no row is left.
    """
    columns = _columns(dataset)
    if not {"chosen", "rejected"} <= columns:
        raise DataError(
            "preference data needs the columns 'chosen' and 'rejected' (and 'prompt', unless it is their common "
            f"beginning); the columns are {_quoted(columns)}"
        )
    limits = _Limits(max_prompt_length, max_completion_length)
    tokens = _Tokens.of(tokenizer, eos_token_ids)
    keys = ("chosen", "rejected")
    return _tokenize(dataset, keys, "prompt" in columns, tokens, limits, first_row, Pair)


def tokenize_examples(
    dataset: Rows,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_prompt_length: int,
    max_completion_length: int,
    eos_token_ids: Sequence[int],
    first_row: int = 0,
) -> tuple[list[Example], DataReport]:
    """As `tokenize_pairs`, for SFT: rows with `prompt` and `completion`, or preference rows' chosen side."""
