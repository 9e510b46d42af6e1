"""Load the rows of a run: read and tokenize its splits, and report on them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from hypo_train.config import Config
from hypo_train.data.columns import choose_columns, renamed
from hypo_train.data.errors import DataError, Unusable
from hypo_train.data.files import load_rows
from hypo_train.data.repeats import prompts_in_both
from hypo_train.data.report import DataReport
from hypo_train.data.rows import Example, Pair, Prompt, Row
from hypo_train.data.table import Rows, each_row, part_of, with_columns
from hypo_train.data.tokens import FORMATS, kind_of, parts_of, tokenize

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ROW_TYPES: dict[str, type[Pair] | type[Example] | type[Prompt]] = {"pair": Pair, "example": Example, "prompt": Prompt}


def load_split_rows(
    kind: type[Row], config: Config, tokenizer: PreTrainedTokenizerBase, eos_token_ids: Sequence[int]
) -> tuple[list[Row], list[Row], dict[str, DataReport]]:
    """Return training rows, evaluation rows (empty if none are held out) and the reports "train" and "eval".

    Raises:
        DataError: the data cannot be read or no row can be used.
    """
    split_rows: dict[str, list[Row]] = {"eval": []}
    reports = {}
    for name, (rows, first_row) in _splits(config).items():
        with _named(config, name):
            split_rows[name], reports[name] = tokenize(
                kind, rows, tokenizer, first_row=first_row, **_limits(config, eos_token_ids)
            )
    if "eval" in reports:
        shared = prompts_in_both(split_rows["train"], split_rows["eval"])
        reports["eval"] = replace(reports["eval"], also_trained_on=shared)
    return split_rows["train"], split_rows["eval"], reports


def load_held_out(
    config: Config, tokenizer: PreTrainedTokenizerBase, eos_token_ids: Sequence[int]
) -> tuple[list[Any], DataReport]:
    """Return the rows to evaluate on and a report on them; their columns decide between Pair, Example and Prompt.

    SFT always evaluates on examples, a reward model on pairs. The training split is read only if evaluation rows are
    held out from it.

    Raises:
        DataError: the data cannot be read, no row can be used, or the settings name no rows to evaluate on.
    """
    if config.dataset_test_split is not None:
        rows, first_row = _read(config, config.dataset_test_split), 0
    elif config.num_eval_rows:
        rows, first_row = _splits(config)["eval"]
    else:
        raise DataError("no rows to evaluate on: set dataset_test_split or num_eval_rows")
    with _named(config, "eval"):
        kind: type[Any] = Pair
        if not config.spec.trains_reward_model:
            kind = kind_of(rows, config.dataset_format, prefers_pairs=config.spec.row_type != "example")
        return tokenize(kind, rows, tokenizer, first_row=first_row, **_limits(config, eos_token_ids))


def _limits(config: Config, eos_token_ids: Sequence[int]) -> dict[str, Any]:
    return {
        "max_prompt_length": config.max_prompt_length,
        "max_completion_length": config.max_completion_length,
        "eos_token_ids": eos_token_ids,
        "dataset_format": config.dataset_format,
    }


def check_texts(config: Config) -> dict[str, DataReport]:
    """Return a report on each split without a tokenizer: which rows have usable texts, but no lengths.

    Chat messages are checked except for what only a chat template can show.

    Raises:
        DataError: the data cannot be read or no row can be used.
    """
    form, kind = FORMATS[config.dataset_format], ROW_TYPES[config.spec.row_type]
    reports = {}
    for name, (rows, first_row) in _splits(config).items():
        dropped: dict[str, list[int]] = {}
        with _named(config, name):
            columns = choose_columns(rows, form, parts_of(kind, form))
            read = with_columns(rows, {name: name for name in columns.read})
            for row, example in enumerate(each_row(read), start=first_row):
                try:
                    form.row_text(row, example, columns.parts, _AnyTemplate())  # type: ignore[arg-type]
                except Unusable as reason:
                    dropped.setdefault(str(reason), []).append(row)
        used = len(rows) - sum(map(len, dropped.values()))
        reports[name] = DataReport(len(rows), used, dropped, columns=columns)
        if not used:
            raise DataError(f"{name}: no row can be used: {reports[name].lines()[1]}")
    return reports


class _AnyTemplate:
    """A substitute for a tokenizer's chat template, so that the rest of a row can be checked."""

    chat_template = ""

    def apply_chat_template(self, messages: Sequence[Mapping[str, Any]], tools: Any = None, **_: Any) -> str:
        return str(tools or "") + "".join(f"{message['content']}{message.get('tool_calls')}" for message in messages)


def _splits(config: Config) -> dict[str, tuple[Rows, int]]:
    """Return the rows of "train" and, if there are any, of "eval", each with the index of its first row."""
    train = _read(config, config.dataset_train_split)
    if config.dataset_test_split is not None:
        return {"train": (train, 0), "eval": (_read(config, config.dataset_test_split), 0)}
    if not config.num_eval_rows:
        return {"train": (train, 0)}
    first_row = len(train) - config.num_eval_rows
    if first_row <= 0:
        raise DataError(
            f"num_eval_rows={config.num_eval_rows} leaves none of the {len(train)} rows of split "
            f"{config.dataset_train_split!r} for training"
        )
    held_out = part_of(train, range(first_row, len(train)))
    return {"train": (part_of(train, range(first_row)), 0), "eval": (held_out, first_row)}


def _read(config: Config, split: str) -> Rows:
    """Return the rows of a split with the names of columns that ``config.column_mapping`` gives them."""
    rows = load_rows(config, split)
    try:
        return renamed(rows, config.column_mapping, FORMATS[config.dataset_format].targets)
    except DataError as error:
        raise DataError(f"dataset_name={config.dataset_name!r}, split {split!r}: {error}") from None


@contextmanager
def _named(config: Config, name: str) -> Iterator[None]:
    """Add the data set and the split to the message of a data error."""
    split = (config.dataset_test_split if name == "eval" else None) or config.dataset_train_split
    try:
        yield
    except (DataError, UnicodeDecodeError) as error:  # the readers do not check that a text is UTF-8
        raise DataError(f"dataset_name={config.dataset_name!r}, split {split!r}: {error}") from None
