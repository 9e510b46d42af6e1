"""Tokenize rows of text.

Every completion ends with exactly one EOS, or with the token that ends a turn in the chat template; a prompt has at
most one BOS. Prompt and completion together are the tokens of the whole text (:mod:`hypo_train.data.encoding`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING, Any

from hypo_train.data.chat import turn_end
from hypo_train.data.columns import choose_columns
from hypo_train.data.encoding import Encoded, Encoder
from hypo_train.data.errors import DataError, Unusable
from hypo_train.data.formats import Format, Preferences, RowText
from hypo_train.data.repeats import find_repeats
from hypo_train.data.report import DataReport, Lengths
from hypo_train.data.rows import Example, Ids, Pair, Prompt, Row
from hypo_train.data.table import Rows, column_names, each_row, with_columns
from hypo_train.data.tldr import Tldr

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FORMATS: dict[str, Format] = {"preferences": Preferences(), "tldr": Tldr()}
BLOCK = 1000  # rows in one call of the tokenizer; a fast tokenizer processes them in parallel


def tokenize(
    kind: type[Row],
    dataset: Rows,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_prompt_length: int,
    max_completion_length: int,
    eos_token_ids: Sequence[int],
    dataset_format: str = "preferences",
    first_row: int = 0,
) -> tuple[list[Row], DataReport]:
    """Return the usable rows as ``kind``, in order, and a report on all rows.

    With ``dataset_format`` "preferences", the columns are ``chosen``, ``rejected`` and ``prompt``, each text or a list
    of chat messages; without ``prompt``, the prompt is the common beginning. An ``Example`` is made of ``prompt`` and
    ``completion``, or of the chosen side of a preference; a ``Prompt`` of a preference, or of ``prompt`` alone.

    Args:
        max_prompt_length: in tokens.
        max_completion_length: in tokens, EOS included.
        eos_token_ids: the tokens that end a completion. A completion without any gets the tokenizer's EOS, or the first
            of these if the tokenizer's EOS is not among them.
        dataset_format: a key of ``FORMATS``.
        first_row: the index in the split of the first row.

    Raises:
        DataError: a column is missing, there are chat messages but no chat template, or no row can be used.
    """
    form = FORMATS[dataset_format]
    columns = choose_columns(dataset, form, parts_of(kind, form))
    parts, read = columns.parts, with_columns(dataset, {name: name for name in columns.read})
    wanted = {Pair: parts, Example: parts[:1], Prompt: ()}[kind]
    rules = _token_rules(tokenizer, eos_token_ids, max_prompt_length, max_completion_length)
    tokenized, report = _tokenize(read, form, rules, parts, wanted, first_row)
    rows: list[Row] = [kind(row, prompt, *completions) for row, prompt, completions in tokenized]
    return rows, replace(report, repeats=find_repeats(rows), columns=columns)


def parts_of(kind: type[Any], form: Format) -> Callable[[AbstractSet[str]], tuple[str, ...]]:
    """Return the function that names the parts that ``kind`` needs, given the columns."""
    return {Pair: form.pair_parts, Example: form.example_parts, Prompt: form.prompt_parts}[kind]


def kind_of(dataset: Rows, dataset_format: str, *, prefers_pairs: bool) -> type[Any]:
    """Return Pair for preferences if ``prefers_pairs``, Example for rows with a completion, else Prompt."""
    form, columns = FORMATS[dataset_format], dict.fromkeys(column_names(dataset)).keys()
    for kind in (Pair, Example) if prefers_pairs else (Example,):
        try:
            parts_of(kind, form)(columns)
        except DataError:
            continue
        return kind
    return Prompt


@dataclass(frozen=True)
class _TokenRules:
    """The special tokens and the length limits of prompts and completions."""

    tokenizer: PreTrainedTokenizerBase
    bos: int | None
    eos: int  # is added to a completion that has none of ``stops``
    stops: frozenset[int]
    max_prompt_length: int
    max_completion_length: int
    encoder: Encoder
    turn_end: int | None  # ends a completion that a chat template wrote, if none of ``stops`` does
    special: frozenset[int]  # without BOS and EOS; plain text with one of these was written for a chat template

    def stops_of(self, text: RowText) -> frozenset[int]:
        """Return the tokens that end the completions of a row."""
        return self.stops if self.turn_end is None or not text.rendered else self.stops | {self.turn_end}

    @property
    def adds_bos(self) -> bool:
        """Return whether the tokenizer adds a BOS to plain text."""
        return self.bos is not None and self.encoder.prefix[:1] == [self.bos]

    @property
    def unknown(self) -> int | None:
        """Return the token of characters that the tokenizer does not know, unless it has other meanings."""
        unknown = self.tokenizer.unk_token_id
        return None if unknown in {self.bos, self.tokenizer.eos_token_id, self.tokenizer.pad_token_id} else unknown


def _token_rules(
    tokenizer: PreTrainedTokenizerBase,
    eos_token_ids: Sequence[int],
    max_prompt_length: int,
    max_completion_length: int,
) -> _TokenRules:
    if not eos_token_ids:
        raise DataError("eos_token_ids is empty: without an EOS no completion ends")
    eos = tokenizer.eos_token_id if tokenizer.eos_token_id in eos_token_ids else eos_token_ids[0]
    if eos not in (known := tokenizer.get_vocab().values()):
        raise DataError(f"EOS id {eos} is not among the tokenizer's {len(known)} ids, up to {max(known)}")
    bos, stops = tokenizer.bos_token_id, frozenset(eos_token_ids)
    added = {token for token, what in tokenizer.added_tokens_decoder.items() if what.special}
    others = frozenset(added - {bos, tokenizer.eos_token_id, tokenizer.unk_token_id, tokenizer.pad_token_id})
    limits = (max_prompt_length, max_completion_length)
    return _TokenRules(tokenizer, bos, eos, stops, *limits, Encoder(tokenizer), turn_end(tokenizer, stops), others)


def _tokenize(
    dataset: Rows, form: Format, rules: _TokenRules, parts: Sequence[str], wanted: Sequence[str], first_row: int
) -> tuple[list[tuple[int, Ids, list[Ids]]], DataReport]:
    """Return (row, prompt, ``wanted`` completions) of each usable row, and the report."""
    dropped: dict[str, list[int]] = {}
    counts: Counter[str] = Counter()
    rows = []

    def texts() -> Iterator[RowText]:
        for row, example in enumerate(each_row(dataset), start=first_row):
            try:
                yield form.row_text(row, example, parts, rules.tokenizer)
            except Unusable as reason:
                dropped.setdefault(str(reason), []).append(row)

    usable = texts()
    while block := list(islice(usable, BLOCK)):
        encoded = rules.encoder.encode([(text.prompt, text.completions[: len(wanted)]) for text in block])
        for text, ids in zip(block, encoded, strict=True):
            try:
                rows.append((text.row, *_fit(text, ids, rules, wanted, counts)))
            except Unusable as reason:
                dropped.setdefault(str(reason), []).append(text.row)
    lengths = {"prompt": [len(prompt) for _, prompt, _ in rows]}
    for index, name in enumerate(wanted):
        lengths[name] = [len(completions[index]) for _, _, completions in rows]
    has_special = counts.pop("has_special", 0)
    tallies: dict[str, Any] = counts
    report = DataReport(
        rows=len(dataset),
        used=len(rows),
        dropped={reason: sorted(indices) for reason, indices in dropped.items()},
        completions=len(rows) * len(wanted),
        unused_template=rules.tokenizer.chat_template is not None and not counts["rendered"] + has_special,
        turn_end=_other_turn_end(rules.tokenizer),
        lengths={name: Lengths.of(values) for name, values in lengths.items() if values},
        **tallies,
    )
    if not rows:
        raise DataError(f"no row can be used: {report.lines()[1]}")
    return rows, report


def _other_turn_end(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Return the token that ends an answer in the chat template if it is not the tokenizer's EOS."""
    token = turn_end(tokenizer, [tokenizer.eos_token_id])
    return None if token is None else str(tokenizer.convert_ids_to_tokens(token))


def _fit(
    text: RowText, encoded: Encoded, rules: _TokenRules, names: Sequence[str], counts: Counter[str]
) -> tuple[Ids, list[Ids]]:
    """Return prompt and completions with correct BOS, EOS and lengths; ``counts`` records the changes."""
    prompt = encoded.prompt if text.rendered else rules.encoder.prefix + encoded.prompt
    ended = [_end_with_eos(ids, text, rules, name) for ids, name in zip(encoded.completions, names, strict=True)]
    if len(set(ended)) < len(ended):
        raise Unusable("the same tokens in 'chosen' and 'rejected'")
    limit = rules.max_completion_length
    short = [ids if len(ids) <= limit else ids[: limit - 1] + ids[-1:] for ids in ended]
    if len(set(short)) < len(short):
        raise Unusable("the same tokens in 'chosen' and 'rejected' up to max_completion_length")
    clean = _clean_prompt(prompt, text.rendered, rules)
    kept = _shortened(text, clean, rules)
    _count_prompt(text, prompt, clean, rules, counts)
    _count_completions(text, encoded.completions, ended, rules, counts)
    counts.update(text.notes)
    counts["inside_token"] += encoded.num_split
    counts["not_as_text"] += encoded.num_altered
    counts["unknown"] += any(rules.unknown in ids for ids in (prompt, *encoded.completions))
    if len(kept) < len(clean):
        counts["truncated_prompts" if text.shorten is None else "shortened_prompts"] += 1
    return kept, short


def _count_prompt(text: RowText, ids: list[int], clean: Ids, rules: _TokenRules, counts: Counter[str]) -> None:
    counts["rendered"] += text.rendered
    counts["longest_prompt"] = max(counts["longest_prompt"], len(clean))
    counts["doubled_bos"] += rules.bos is not None and ids[:2] == [rules.bos] * 2
    counts["missing_bos"] += rules.adds_bos and clean[0] != rules.bos
    counts["eos_behind_prompt"] += len(ids) - len(clean) > _num_doubled(ids, rules)
    counts["has_special"] += bool(rules.special.intersection(clean))


def _count_completions(
    text: RowText, completions: list[list[int]], ended: list[Ids], rules: _TokenRules, counts: Counter[str]
) -> None:
    for ids, with_eos, completion in zip(completions, ended, text.completions, strict=False):
        counts["longest_completion"] = max(counts["longest_completion"], len(with_eos))
        counts["truncated_completions"] += len(with_eos) > rules.max_completion_length
        start = text.prompt.strip()  # a short prompt can be repeated by chance
        counts["begins_with_prompt"] += len(start) >= 10 and completion.lstrip().startswith(start)
        counts["bos_in_completion"] += rules.bos not in rules.stops and ids[:1] == [rules.bos]
        # Ignore the line break that a template writes after the EOS.
        rest = ids[len(with_eos) :]
        counts["cut_at_eos"] += bool(rest and str(rules.tokenizer.decode(rest, skip_special_tokens=True)).strip())


def _end_with_eos(ids: list[int], text: RowText, rules: _TokenRules, column: str) -> Ids:
    """Return the ids up to the first token that ends a completion, or with an EOS added."""
    stops = rules.stops_of(text)
    end = next((i for i, token in enumerate(ids) if token in stops), len(ids))
    if end == 0:
        raise Unusable(f"an empty {column!r}")
    return (*ids[:end], ids[end] if end < len(ids) else rules.eos)


def _clean_prompt(ids: list[int], rendered: bool, rules: _TokenRules) -> Ids:
    """Return the ids with at most one BOS at the start and, if they are plain text's, without an EOS at the end."""
    start, end = _num_doubled(ids, rules), len(ids)
    while not rendered and end - start > 1 and ids[end - 1] in {*rules.stops, rules.tokenizer.eos_token_id}:
        end -= 1
    if end == start:
        raise Unusable("an empty 'prompt'")
    return tuple(ids[start:end])


def _num_doubled(ids: list[int], rules: _TokenRules) -> int:
    """Return how many BOS tokens the prompt has too many at its start."""
    count = 0
    while rules.bos is not None and ids[count : count + 2] == [rules.bos] * 2:
        count += 1
    return count


def _shortened(text: RowText, ids: Ids, rules: _TokenRules) -> Ids:
    """Return at most max_prompt_length ids of the prompt."""
    if len(ids) <= rules.max_prompt_length:
        return ids
    if text.shorten is None:
        return _keep_end(ids, rules)

    def encode(prompt: str) -> Ids:
        (ids,) = rules.encoder.ids([prompt])
        return _clean_prompt(ids if text.rendered else rules.encoder.prefix + ids, text.rendered, rules)

    return text.shorten(encode, rules.max_prompt_length)


def _keep_end(ids: Ids, rules: _TokenRules) -> Ids:
    """Return the last max_prompt_length ids; if the prompt began with a BOS, the result begins with it too."""
    excess = len(ids) - rules.max_prompt_length
    start = ids[:1] if ids[0] == rules.bos else ()
    return start + ids[excess + len(start) :]
