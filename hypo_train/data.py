"""Preference rows -> token ids.

``load_rows`` reads a data set, ``tokenize_pairs`` turns its rows into ``Pair``s (``tokenize_examples`` into SFT
``Example``s) and reports every row it could not use, ``batch_indices`` says which rows a step trains on.

Every completion ends with exactly one EOS; a prompt has at most one BOS. Prompt and completion are
tokenised apart, so that the prompt a sample continues has the very ids the offline completions continue.
"""

from __future__ import annotations

import json
import os
import random
from collections import Counter
from collections.abc import Callable, Iterator, KeysView, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import datasets
from datasets.exceptions import DatasetGenerationError, DatasetsError

from hypo_train.config import Config
from hypo_train.formats import DataError, Format, Preferences, RowText, Unusable, quoted
from hypo_train.tldr import Tldr

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FORMATS: dict[str, Format] = {"preferences": Preferences(), "tldr": Tldr()}
FILE_FORMATS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
MEGA_BATCH_AT_MOST, MEGA_BATCHES_AT_LEAST = 50, 4  # batches in one, and how many an epoch has; transformers' choice
BLOCK = 1000  # rows tokenised in one call: a fast tokenizer runs a batch in parallel

Ids: TypeAlias = tuple[int, ...]
Rows: TypeAlias = "datasets.Dataset | Sequence[Mapping[str, Any]]"
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


@dataclass(frozen=True)
class DataReport:
    """What became of the rows of a split; counts other than ``rows`` and ``dropped`` are of used rows."""

    rows: int
    used: int
    dropped: dict[str, list[int]]  # reason -> indices in the source split
    completions: int  # none, one or two in a row
    truncated_prompts: int
    shortened_prompts: int  # in the way of the format
    truncated_completions: int
    cut_at_eos: int  # completions that had text after an EOS of their own
    doubled_bos: int  # prompts that had a second BOS
    lengths: dict[str, tuple[int, int, int]]  # tokens of prompt, chosen, ...: median, 95 %, largest

    def lines(self) -> list[str]:
        """The report as text, one finding a line."""
        lines = [f"{self.used} of {self.rows} rows used"]
        if self.dropped:
            reasons = [f"{len(rows)} with {why} ({_name_rows(rows)})" for why, rows in self.dropped.items()]
            lines.append(f"{self.rows - self.used} of {self.rows} rows dropped: {', '.join(reasons)}")
        for count, total, finding in (
            (self.truncated_prompts, self.used, "prompts cut to their last max_prompt_length tokens"),
            (self.shortened_prompts, self.used, "prompts with their text shortened to have max_prompt_length tokens"),
            (self.truncated_completions, self.completions, "completions cut to max_completion_length tokens"),
            (self.cut_at_eos, self.completions, "completions cut at an EOS inside their text"),
            (self.doubled_bos, self.used, "prompts had a second BOS, now removed"),
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
    """One split of ``config.dataset_name``: a file, a folder of files, a saved data set or a Hub name.

    Nothing is written beside a local file: what ``datasets`` caches goes to its own cache folder.
    Raises ``DataError`` for what is missing, broken or empty, and for an unknown split.
    """
    name = config.dataset_name
    try:
        rows = _open(Path(name).expanduser(), config, split)
    except DataError:
        raise
    except (DatasetsError, OSError, ValueError, RuntimeError) as error:
        # A build error says only that there was one; what went wrong is its cause.
        cause = error.__cause__ if isinstance(error, DatasetGenerationError) else None
        reason = " ".join(str(cause or error).split())
        if "corresponds to no data" in reason:
            reason = "there are no rows"
        where = "" if Path(name).expanduser().exists() else "no local file or folder, and from the Hub: "
        raise DataError(f"dataset_name={name!r}, split {split!r}: {where}{reason}") from error
    if len(rows) == 0:
        raise DataError(f"dataset_name={name!r}, split {split!r}: there are no rows")
    return rows


def _open(path: Path, config: Config, split: str) -> datasets.Dataset:
    if path.is_file():
        return _open_file(path, split)
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        return _open_saved(path, split)
    if path.exists():
        return datasets.load_dataset(str(path), config.dataset_config, split=split)
    name = config.dataset_name
    if name.startswith((".", "~", os.sep)) or name.count("/") > 1 or path.suffix in FILE_FORMATS:
        raise DataError(f"dataset_name={name!r}: there is no such file or folder; {_listing(path.parent)}")
    return datasets.load_dataset(name, config.dataset_config, split=split)


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
    options: dict[str, Any] = {}
    if path.suffix == ".csv":
        # Every cell is text: the completion "NA" is no missing value, "007" is no number.
        columns = ("prompt", "chosen", "rejected", "completion", "subreddit", "title", "post", "summary")
        options = {"keep_default_na": False, "converters": dict.fromkeys(columns, str)}
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
                raise DataError(f"dataset_name={str(path)!r}: line {number} is not JSON: {error.msg}") from None
            if not isinstance(row, dict):
                raise DataError(f"dataset_name={str(path)!r}: line {number} is not a JSON object")


def _open_saved(path: Path, split: str) -> datasets.Dataset:
    saved = datasets.load_from_disk(str(path))
    # A data set that was saved alone often has no split name; it is "train", as a single file is.
    splits = saved if isinstance(saved, datasets.DatasetDict) else {str(saved.split or "train"): saved}
    if split not in splits:
        raise DataError(f"dataset_name={str(path)!r}: there is no split {split!r}, only {quoted(splits)}")
    return splits[split]


def load_pairs(
    config: Config, tokenizer: PreTrainedTokenizerBase, eos_token_ids: Sequence[int]
) -> tuple[list[Pair], list[Pair], dict[str, DataReport]]:
    """Training pairs, evaluation pairs (none where the config holds out no rows) and a report on each.

    The reports' keys are "train" and "eval". Raises ``DataError``.
    """
    return _load(config, tokenizer, eos_token_ids, tokenize_pairs)


def load_examples(
    config: Config, tokenizer: PreTrainedTokenizerBase, eos_token_ids: Sequence[int]
) -> tuple[list[Example], list[Example], dict[str, DataReport]]:
    """As ``load_pairs``, for SFT."""
    return _load(config, tokenizer, eos_token_ids, tokenize_examples)


def load_prompts(
    config: Config, tokenizer: PreTrainedTokenizerBase, eos_token_ids: Sequence[int]
) -> tuple[list[Prompt], list[Prompt], dict[str, DataReport]]:
    """As ``load_pairs``, for algorithms that learn from samples alone."""
    return _load(config, tokenizer, eos_token_ids, tokenize_prompts)


def load_held_out(
    config: Config, tokenizer: PreTrainedTokenizerBase, eos_token_ids: Sequence[int]
) -> tuple[list[Any], DataReport]:
    """The rows to evaluate on and a report on them, as what their columns make of them: ``Pair``, ``Example`` or
    ``Prompt``; SFT's are examples, a reward model's pairs.

    Rows to train on are not needed where ``dataset_test_split`` names others. Raises ``DataError``.
    """
    tokenize: Callable[..., tuple[list[Any], DataReport]] = tokenize_pairs
    if config.algorithm != "reward":
        tokenize = partial(_tokenize_what_there_is, preferences=config.algorithm != "sft")
    if config.dataset_test_split is not None:
        alone = config.model_copy(
            update={"dataset_train_split": config.dataset_test_split, "dataset_test_split": None, "num_eval_rows": 0}
        )
        rows, _, reports = _load(alone, tokenizer, eos_token_ids, tokenize)
        return rows, reports["train"]
    if not config.num_eval_rows:
        raise DataError("no rows to evaluate on: set dataset_test_split or num_eval_rows")
    _, rows, reports = _load(config, tokenizer, eos_token_ids, tokenize)
    return rows, reports["eval"]


def _load(
    config: Config,
    tokenizer: PreTrainedTokenizerBase,
    eos_token_ids: Sequence[int],
    tokenize: Callable[..., tuple[list[Row], DataReport]],
) -> tuple[list[Row], list[Row], dict[str, DataReport]]:
    options: dict[str, Any] = {
        "max_prompt_length": config.max_prompt_length,
        "max_completion_length": config.max_completion_length,
        "eos_token_ids": eos_token_ids,
        "dataset_format": config.dataset_format,
    }
    found: dict[str, list[Row]] = {"eval": []}
    reports = {}
    for name, (rows, first_row) in _splits(config).items():
        with _named(config, name):
            found[name], reports[name] = tokenize(rows, tokenizer, first_row=first_row, **options)
    return found["train"], found["eval"], reports


def check_texts(config: Config) -> dict[str, DataReport]:
    """What can be said of the rows without a tokenizer: which have texts that can be used, and not how long they are.

    Chat messages are checked as far as no template is asked. Raises ``DataError``.
    """
    form = FORMATS[config.dataset_format]
    parts_of = {"sft": form.example_parts, "rloo": form.prompt_parts}.get(config.algorithm, form.pair_parts)
    reports = {}
    for name, (rows, first_row) in _splits(config).items():
        dropped: dict[str, list[int]] = {}
        with _named(config, name):
            parts = parts_of(_columns(rows))
            for row, example in enumerate(rows, start=first_row):
                try:
                    form.row_text(row, example, parts, _AnyTemplate())  # type: ignore[arg-type]
                except Unusable as reason:
                    dropped.setdefault(str(reason), []).append(row)
        used = len(rows) - sum(map(len, dropped.values()))
        reports[name] = DataReport(len(rows), used, dropped, 0, 0, 0, 0, 0, 0, {})
        if not used:
            raise DataError(f"{name}: no row can be used: {reports[name].lines()[1]}")
    return reports


class _AnyTemplate:
    """Stands in for a chat template that is not there, so that the rest of a row is checked."""

    chat_template = ""

    def apply_chat_template(self, messages: Sequence[Mapping[str, Any]], **_: Any) -> str:
        return "".join(message["content"] for message in messages)


def _splits(config: Config) -> dict[str, tuple[datasets.Dataset, int]]:
    """The rows of "train" and, where some are held out, of "eval", with the index in the split of the first."""
    train = load_rows(config, config.dataset_train_split)
    if config.dataset_test_split is not None:
        return {"train": (train, 0), "eval": (load_rows(config, config.dataset_test_split), 0)}
    if not config.num_eval_rows:
        return {"train": (train, 0)}
    first_row = len(train) - config.num_eval_rows
    if first_row <= 0:
        raise DataError(
            f"num_eval_rows={config.num_eval_rows} leaves none of the {len(train)} rows of split "
            f"{config.dataset_train_split!r} for training"
        )
    held_out = train.select(range(first_row, len(train)))
    return {"train": (train.select(range(first_row)), 0), "eval": (held_out, first_row)}


@contextmanager
def _named(config: Config, name: str) -> Iterator[None]:
    """Data errors say of which data set and split they are."""
    split = (config.dataset_test_split if name == "eval" else None) or config.dataset_train_split
    try:
        yield
    except (DataError, UnicodeDecodeError) as error:  # the readers do not check that a text is UTF-8
        raise DataError(f"dataset_name={config.dataset_name!r}, split {split!r}: {error}") from None


def tokenize_pairs(
    dataset: Rows,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_prompt_length: int,
    max_completion_length: int,
    eos_token_ids: Sequence[int],
    dataset_format: str = "preferences",
    first_row: int = 0,
) -> tuple[list[Pair], DataReport]:
    """Token ids of the preference rows that can be used, in order, and a report on all of them.

    ``dataset_format`` is a key of ``FORMATS``: of "preferences", the columns are ``chosen``, ``rejected`` and, unless
    it is their common beginning, ``prompt``; each is text or a list of chat messages. Lengths are in tokens, EOS
    included; ``first_row`` is the index in the split of the first row. A completion without an EOS gets the
    tokenizer's, or the first of ``eos_token_ids`` if the tokenizer's is not among them. Raises ``DataError`` when a
    column is missing, when chat messages meet a tokenizer without a chat template, and when no row can be used.
    """
    form = FORMATS[dataset_format]
    parts = form.pair_parts(_columns(dataset))
    rules = _token_rules(tokenizer, eos_token_ids, max_prompt_length, max_completion_length)
    rows, report = _tokenize(dataset, form, rules, parts, parts, first_row)
    return [Pair(row, prompt, *completions) for row, prompt, completions in rows], report


def tokenize_examples(
    dataset: Rows,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_prompt_length: int,
    max_completion_length: int,
    eos_token_ids: Sequence[int],
    dataset_format: str = "preferences",
    first_row: int = 0,
) -> tuple[list[Example], DataReport]:
    """As ``tokenize_pairs``, for SFT: rows with ``prompt`` and ``completion``, or the chosen side of preferences."""
    form = FORMATS[dataset_format]
    parts = form.example_parts(_columns(dataset))
    rules = _token_rules(tokenizer, eos_token_ids, max_prompt_length, max_completion_length)
    rows, report = _tokenize(dataset, form, rules, parts, parts[:1], first_row)
    return [Example(row, prompt, *completions) for row, prompt, completions in rows], report


def tokenize_prompts(
    dataset: Rows,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_prompt_length: int,
    max_completion_length: int,
    eos_token_ids: Sequence[int],
    dataset_format: str = "preferences",
    first_row: int = 0,
) -> tuple[list[Prompt], DataReport]:
    """As ``tokenize_pairs``, for the prompts alone: of preference data, or rows with nothing but a ``prompt``."""
    form = FORMATS[dataset_format]
    parts = form.prompt_parts(_columns(dataset))
    rules = _token_rules(tokenizer, eos_token_ids, max_prompt_length, max_completion_length)
    rows, report = _tokenize(dataset, form, rules, parts, (), first_row)
    return [Prompt(row, prompt) for row, prompt, _ in rows], report


def _tokenize_what_there_is(
    dataset: Rows, tokenizer: PreTrainedTokenizerBase, *, preferences: bool, **options: Any
) -> tuple[list[Any], DataReport]:
    """Pairs where there are ``preferences`` and they matter, examples where there are completions, else prompts."""
    form, columns = FORMATS[options["dataset_format"]], _columns(dataset)
    if preferences and _has(form.pair_parts, columns):
        return tokenize_pairs(dataset, tokenizer, **options)
    if _has(form.example_parts, columns):
        return tokenize_examples(dataset, tokenizer, **options)
    return tokenize_prompts(dataset, tokenizer, **options)


def _has(parts: Callable[[KeysView[str]], Any], columns: KeysView[str]) -> bool:
    """Whether the columns hold these parts of a row."""
    try:
        parts(columns)
    except DataError:
        return False
    return True


def _columns(dataset: Rows) -> KeysView[str]:
    if len(dataset) == 0:
        raise DataError("there are no rows")
    return dataset[0].keys()


@dataclass(frozen=True)
class _TokenRules:
    """What the ids of a prompt and of a completion have to keep to."""

    tokenizer: PreTrainedTokenizerBase
    bos: int | None
    eos: int  # ends a completion that has none of ``stops``
    stops: frozenset[int]
    max_prompt_length: int
    max_completion_length: int


def _token_rules(
    tokenizer: PreTrainedTokenizerBase,
    eos_token_ids: Sequence[int],
    max_prompt_length: int,
    max_completion_length: int,
) -> _TokenRules:
    if not eos_token_ids:
        raise DataError("eos_token_ids is empty: without an EOS no completion ends")
    eos = tokenizer.eos_token_id if tokenizer.eos_token_id in eos_token_ids else eos_token_ids[0]
    if not 0 <= eos < len(tokenizer):
        raise DataError(f"EOS id {eos} is not among the tokenizer's {len(tokenizer)} ids")
    limits = (max_prompt_length, max_completion_length)
    return _TokenRules(tokenizer, tokenizer.bos_token_id, eos, frozenset(eos_token_ids), *limits)


def _tokenize(
    dataset: Rows, form: Format, rules: _TokenRules, parts: Sequence[str], wanted: Sequence[str], first_row: int
) -> tuple[list[tuple[int, Ids, list[Ids]]], DataReport]:
    """(row, prompt, the ``wanted`` ones of the ``parts``) of each usable row, and the report."""
    dropped: dict[str, list[int]] = {}
    counts: Counter[str] = Counter()
    rows = []

    def texts() -> Iterator[RowText]:
        for row, example in enumerate(dataset, start=first_row):
            try:
                yield form.row_text(row, example, parts, rules.tokenizer)
            except Unusable as reason:
                dropped.setdefault(str(reason), []).append(row)

    usable = texts()
    while block := list(islice(usable, BLOCK)):
        for text, prompt, completions in _encode(block, rules.tokenizer, len(wanted)):
            try:
                rows.append((text.row, *_fit(text, prompt, completions, rules, wanted, counts)))
            except Unusable as reason:
                dropped.setdefault(str(reason), []).append(text.row)
    lengths = {"prompt": [len(prompt) for _, prompt, _ in rows]}
    for index, name in enumerate(wanted):
        lengths[name] = [len(completions[index]) for _, _, completions in rows]
    report = DataReport(
        rows=len(dataset),
        used=len(rows),
        dropped={reason: sorted(indices) for reason, indices in dropped.items()},
        completions=len(rows) * len(wanted),
        truncated_prompts=counts["truncated_prompts"],
        shortened_prompts=counts["shortened_prompts"],
        truncated_completions=counts["truncated_completions"],
        cut_at_eos=counts["cut_at_eos"],
        doubled_bos=counts["doubled_bos"],
        lengths={name: _quantiles(values) for name, values in lengths.items() if values},
    )
    if not rows:
        raise DataError(f"no row can be used: {report.lines()[1]}")
    return rows, report


def _quantiles(values: list[int]) -> tuple[int, int, int]:
    ordered = sorted(values)
    return ordered[len(ordered) // 2], ordered[len(ordered) * 95 // 100], ordered[-1]


def _encode(
    block: list[RowText], tokenizer: PreTrainedTokenizerBase, num_wanted: int
) -> Iterator[tuple[RowText, list[int], list[list[int]]]]:
    """Each row with the ids of its prompt and completions; special tokens come with plain prompts alone."""
    prompts = {
        rendered: _ids(tokenizer, [text.prompt for text in block if text.rendered is rendered], special=not rendered)
        for rendered in (False, True)
    }
    texts = [completion for text in block for completion in text.completions[:num_wanted]]
    completions = _ids(tokenizer, texts, special=False)
    for text in block:
        yield text, next(prompts[text.rendered]), list(islice(completions, num_wanted))


def _ids(tokenizer: PreTrainedTokenizerBase, texts: list[str], *, special: bool) -> Iterator[list[int]]:
    if not texts:  # tokenizers fail on an empty batch
        return iter(())
    batch = tokenizer(
        texts,
        add_special_tokens=special,
        padding=False,
        truncation=False,
        return_attention_mask=False,
        verbose=False,
    )
    return iter(batch["input_ids"])


def _fit(
    text: RowText,
    prompt: list[int],
    completions: list[list[int]],
    rules: _TokenRules,
    names: Sequence[str],
    counts: Counter[str],
) -> tuple[Ids, list[Ids]]:
    """Prompt and completions with BOS, EOS and lengths put right; ``counts`` notes what was done."""
    ended = [_end_with_eos(ids, rules, name) for ids, name in zip(completions, names, strict=True)]
    if len(set(ended)) < len(ended):
        raise Unusable("the same tokens in 'chosen' and 'rejected'")
    limit = rules.max_completion_length
    short = [ids if len(ids) <= limit else ids[: limit - 1] + ids[-1:] for ids in ended]
    if len(set(short)) < len(short):
        raise Unusable("the same tokens in 'chosen' and 'rejected' up to max_completion_length")
    clean = _clean_prompt(prompt, text.rendered, rules)
    kept = _shortened(text, clean, rules)
    counts["doubled_bos"] += rules.bos is not None and prompt[:2] == [rules.bos] * 2
    if len(kept) < len(clean):
        counts["truncated_prompts" if text.shorten is None else "shortened_prompts"] += 1
    counts["truncated_completions"] += sum(len(ids) > limit for ids in ended)
    for ids, whole in zip(completions, ended, strict=True):
        # A template's line break after the EOS is no loss, text is.
        rest = ids[len(whole) :]
        counts["cut_at_eos"] += bool(rest and str(rules.tokenizer.decode(rest, skip_special_tokens=True)).strip())
    return kept, short


def _end_with_eos(ids: list[int], rules: _TokenRules, column: str) -> Ids:
    """The ids up to their first EOS, or with one added."""
    end = next((place for place, token in enumerate(ids) if token in rules.stops), len(ids))
    if end == 0:
        raise Unusable(f"an empty {column!r}")
    return (*ids[:end], ids[end] if end < len(ids) else rules.eos)


def _clean_prompt(ids: list[int], rendered: bool, rules: _TokenRules) -> Ids:
    """At most one BOS in front; no EOS behind a plain prompt, where some tokenizers put one."""
    start, end = 0, len(ids)
    while rules.bos is not None and ids[start : start + 2] == [rules.bos] * 2:
        start += 1
    while not rendered and end - start > 1 and ids[end - 1] in {*rules.stops, rules.tokenizer.eos_token_id}:
        end -= 1
    if end == start:
        raise Unusable("an empty 'prompt'")
    return tuple(ids[start:end])


def _shortened(text: RowText, ids: Ids, rules: _TokenRules) -> Ids:
    """A prompt's ids, at most max_prompt_length of them."""
    if len(ids) <= rules.max_prompt_length:
        return ids
    if text.shorten is None:
        return _keep_end(ids, rules)

    def encode(prompt: str) -> Ids:
        (found,) = _ids(rules.tokenizer, [prompt], special=not text.rendered)
        return _clean_prompt(found, text.rendered, rules)

    return text.shorten(encode, rules.max_prompt_length)


def _keep_end(ids: Ids, rules: _TokenRules) -> Ids:
    """The last max_prompt_length ids, the first of them the BOS if the prompt had one."""
    excess = len(ids) - rules.max_prompt_length
    start = ids[:1] if ids[0] == rules.bos else ()
    return start + ids[excess + len(start) :]


def batches_per_epoch(num_rows: int, batch_size: int) -> int:
    """Batches in one pass: whole ones only, unless the rows do not fill a single one."""
    return max(1, num_rows // batch_size)


def batch_indices(
    num_rows: int, batch_size: int, step: int, seed: int, lengths: tuple[int, ...] | None = None
) -> list[int]:
    """The rows of batch number ``step``, counted from 0 over all epochs.

    A pure function: a resumed run needs no cursor. Each epoch has its own order, drawn from (seed, epoch), and
    leaves out what does not fill its last batch. With ``lengths``, one a row, a batch holds rows of like length,
    and the batches come in random order. Raises ``ValueError`` when there is no row.
    """
    if num_rows < 1:
        raise ValueError(f"num_rows={num_rows}: there is nothing to train on")
    epoch, place = divmod(step, batches_per_epoch(num_rows, batch_size))
    return list(_epoch_order(num_rows, batch_size, seed, epoch, lengths)[place * batch_size : (place + 1) * batch_size])


def longest_first(indices: Sequence[int], lengths: Sequence[int]) -> list[int]:
    """``indices`` by the length of their rows.

    A step whose rows are cut into micro-batches in this order trains on the same rows with less padding, and
    runs out of memory, if it does, at once.
    """
    return sorted(indices, key=lambda i: -lengths[i])


@lru_cache(maxsize=2)  # an epoch asks for its order once a step
def _epoch_order(
    num_rows: int, batch_size: int, seed: int, epoch: int, lengths: tuple[int, ...] | None
) -> tuple[int, ...]:
    rng = random.Random(f"{seed},{epoch}")
    order = list(range(num_rows))
    rng.shuffle(order)
    return tuple(order if lengths is None else _grouped(order, batch_size, lengths, rng))


def _grouped(order: list[int], batch_size: int, lengths: Sequence[int], rng: random.Random) -> list[int]:
    """A random order whose batches are of like length, in the way of transformers' ``group_by_length``.

    Rows are sorted within mega-batches of the random order, so that who shares a batch still changes every epoch.
    """
    count = batches_per_epoch(len(order), batch_size)
    mega = batch_size * max(1, min(count // MEGA_BATCHES_AT_LEAST, MEGA_BATCH_AT_MOST))
    kept = order[: count * batch_size]  # after the sorting, what does not fill a batch would always be the shortest
    parts = [longest_first(kept[start : start + mega], lengths) for start in range(0, len(kept), mega)]
    batches = [part[start : start + batch_size] for part in parts for start in range(0, len(part), batch_size)]
    rng.shuffle(batches)
    return list(chain.from_iterable(batches))
