"""Which columns of a split are read, and what the others may mean.

A column that nothing reads may hold what the answers depend on: the question, a system prompt, a label. Its name or its
content tells, and what is read already (a question that the prompt repeats) is no loss.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hypo_train.data.errors import DataError, Unusable, quoted
from hypo_train.data.messages import looks_like_messages, text_or_messages
from hypo_train.data.table import Rows, column, column_names, spread, with_columns

if TYPE_CHECKING:
    from hypo_train.data.formats import Format

SAMPLE = 1000  # rows whose unread columns are looked at
_FEW = 0.05  # a smaller part of the rows is no reason to refuse or warn

# our name -> names that data sets have for it, the likeliest first
_MEANINGS = {
    "prompt": (
        *("question", "instruction", "query", "input", "problem", "user_prompt", "user_input", "history"),
        *("human", "post", "source_text"),
    ),
    "chosen": (
        "chosen_response",
        "response_chosen",
        "preferred",
        "preferred_response",
        "accepted",
        "response_accepted",
    ),
    "rejected": ("rejected_response", "response_rejected", "dispreferred", "non_preferred", "dispreferred_response"),
    "completion": ("response", "output", "answer", "answers", "solution", "target", "reply", "model_output"),
    "system": ("system", "system_prompt", "system_message"),
    "messages": ("messages", "conversations", "conversation", "dialog", "dialogue", "turns", "trajectory"),
    "tools": ("tools", "functions", "available_tools"),
    "media": ("image", "images", "audio", "audios", "video", "videos"),
    "label": ("label", "labels"),
}
_MEANING_OF = {name: ours for ours, names in _MEANINGS.items() for name in names}
_TEMPLATE_COLUMNS = ("system", "tools", "chat_template_kwargs")


@dataclass(frozen=True)
class Columns:
    """The columns of a split."""

    parts: tuple[str, ...] = ()  # the completions that a row must have
    read: tuple[str, ...] = ()
    unread: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()  # one line for each unread column that may be missed


def renamed(rows: Rows, mapping: Mapping[str, str | None] | None, targets: AbstractSet[str]) -> Rows:
    """Return the rows with columns renamed as {name: new name}; a column whose new name is None is left out.

    Raises:
        DataError: there is no such column, or a new name is unknown or that of another column.
    """
    if not mapping:
        return rows
    names = column_names(rows)
    if unknown := [name for name in mapping if name not in names]:
        raise DataError(
            f"column_mapping renames {quoted(unknown)}, and the columns are {quoted(names)}: take it out of the mapping"
        )
    if useless := [new for new in mapping.values() if new is not None and new not in targets]:
        raise DataError(
            f"column_mapping renames a column to {quoted(useless)}, which nothing reads: the names are "
            f"{quoted(sorted(targets))}, or null to leave a column out"
        )
    if taken := [new for name, new in mapping.items() if new in names and new not in mapping]:
        raise DataError(
            f"column_mapping renames a column to {quoted(taken)}, and there is one of that name: leave it out "
            f"({taken[0]}: null), or rename it too"
        )
    kept = {name: mapping.get(name, name) for name in names}
    return with_columns(rows, {name: new for name, new in kept.items() if new is not None})


def suggestion(columns: Iterable[str], wanted: Sequence[str]) -> str:
    """Return the end of an error message: the column_mapping that gives all ``wanted`` columns, if one is likely."""
    names = list(columns)
    known = {_plain(name): name for name in reversed(names)}
    found = {ours: next((known[name] for name in (ours, *_MEANINGS[ours]) if name in known), None) for ours in wanted}
    needed = [ours for ours in wanted if ours != "prompt" or "chosen" not in wanted]  # pairs may begin with the prompt
    mapping = {theirs: ours for ours, theirs in found.items() if theirs not in (None, ours)}
    return f": set column_mapping: {_flow(mapping)}" if mapping and all(found[ours] for ours in needed) else ""


def choose_columns(rows: Rows, form: Format, parts_of: Callable[[AbstractSet[str]], tuple[str, ...]]) -> Columns:
    """Return which columns are read for the parts that ``parts_of`` names.

    Raises:
        DataError: a column is missing, or the rows without the unread columns would be nonsense.
    """
    if len(rows) == 0:
        raise DataError("there are no rows")
    names = column_names(rows)
    parts = parts_of(dict.fromkeys(names).keys())
    read = form.columns_read(parts, names)
    if not form.guards_columns:
        return Columns(parts, tuple(read), tuple(name for name in names if name not in read), ())
    sample = spread(rows, SAMPLE)
    others = [name for name in read if name not in _TEMPLATE_COLUMNS]
    if not any(_is_chat(value) for name in others for value in column(sample, name)):
        read = others  # only a chat template writes the rest
    unread = [name for name in names if name not in read]
    if len(parts) == 1:
        _check_label(rows, parts[0])
    warnings = [*_judged(sample, parts, read, unread), *_contradicted(rows, unread)]
    return Columns(parts, tuple(read), tuple(unread), tuple(warnings))


def _judged(sample: Rows, parts: Sequence[str], read: Sequence[str], unread: Sequence[str]) -> list[str]:
    """Return a warning for each unread column that may be missed. Raises DataError if it surely is."""
    texts = ["\n".join(_texts(values)) for values in zip(*(column(sample, name) for name in read), strict=True)]
    missed: dict[str, str] = {}  # column -> what it seems to be
    for name in unread:
        values = column(sample, name)
        meaning = _MEANING_OF.get(_plain(name))
        if meaning is None and any(looks_like_messages(value) for value in values):
            meaning = "messages"
        if meaning in ("prompt", "system", "messages", "tools", "media") and _is_missed(values, texts, meaning):
            missed[name] = meaning
        if meaning == "label" and parts == ("chosen", "rejected") and len(set(map(str, values))) == 2:
            missed[name] = meaning
    if media := [name for name, meaning in missed.items() if meaning == "media"]:
        raise DataError(
            f"the columns {quoted(media)} hold images or sound, and only text is supported{_or_leave(media)}"
        )
    guessed = "prompt" not in read and not any(name in read for name in ("messages", "conversations"))
    prompts = [name for name, meaning in missed.items() if meaning in ("prompt", "messages")]
    if guessed and prompts:
        ours = "messages" if missed[prompts[0]] == "messages" else "prompt"
        raise DataError(
            f"nothing reads the columns {quoted(unread)}, and without them the prompt would be the common beginning of "
            f"'chosen' and 'rejected': set column_mapping: {_flow({prompts[0]: ours})}{_or_leave(prompts)}"
        )
    return [_warning(name, meaning) for name, meaning in missed.items()]


def _contradicted(rows: Rows, unread: Sequence[str]) -> Iterator[str]:
    """Yield a warning for each two columns of scores that call rejected answers better than the chosen ones."""
    for name in unread:
        other = name.replace("chosen", "rejected")
        if not re.search("score|rating", name) or other == name or other not in unread:
            continue
        scores = list(zip(column(rows, name), column(rows, other), strict=True))
        worse = sum(isinstance(a, (int, float)) and isinstance(b, (int, float)) and a < b for a, b in scores)
        if worse > _FEW * len(scores):
            yield f"{worse} of {len(scores)} pairs have a lower {name!r} than {other!r}: leave them out or swap the two"


def _warning(name: str, meaning: str) -> str:
    if meaning == "label":
        return f"nothing reads the column {name!r}: 'chosen' is preferred in every row{_or_leave([name])}"
    if meaning in _TEMPLATE_COLUMNS and _plain(name) == meaning:
        fix = "write prompt and completions as chat messages, for plain text has no place for it"
    elif meaning in ("system", "tools"):
        fix = f"set column_mapping: {_flow({name: meaning})}"
    else:
        fix = "write its text into the prompt"
    return f"nothing reads the column {name!r}, which the prompt does not repeat: {fix}{_or_leave([name])}"


def _or_leave(names: Sequence[str]) -> str:
    return f", or leave out what is not needed: column_mapping: {_flow(dict.fromkeys(names))}"


def _check_label(rows: Rows, part: str) -> None:
    """Raise DataError if the rows have a label that calls some completions bad: examples are imitated."""
    if "label" not in column_names(rows):
        return
    labels = [str(label).lower() for label in column(rows, "label")]
    if set(labels) <= {"true", "false", "1", "0", "none"} and (bad := len([x for x in labels if x in ("false", "0")])):
        raise DataError(
            f"the column 'label' calls {bad} of {len(labels)} completions bad, and training would imitate them: keep "
            f"the rows whose label is true{_or_leave(['label'])}"
        )


def _is_missed(values: Sequence[Any], texts: Sequence[str], meaning: str) -> bool:
    """Return whether what a column holds is missing from the texts that are read, in more than a few rows."""
    if meaning == "media":
        lost = sum(bool(value) for value in values)
    else:
        held = (_texts(value) for value in values)
        lost = sum(any(part not in read for part in parts) for parts, read in zip(held, texts, strict=True))
    return lost > _FEW * len(values)


def _texts(value: Any) -> list[str]:
    """Return the texts in a value that are not blank: itself, the contents of messages, or what lists hold."""
    if looks_like_messages(value):
        try:
            value = text_or_messages(value, "")
        except Unusable:
            return [str(value)]
        value = [value] if isinstance(value, str) else [message["content"] for message in value]
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        return [text for item in value for text in _texts(item)]
    text = "" if value is None else str(value).strip()
    return [text] if text else []


def _is_chat(value: Any) -> bool:
    return isinstance(value, (list, dict)) or looks_like_messages(value)


def _plain(name: str) -> str:
    return re.sub(r"\W+", "_", name.strip().lower())


def _flow(mapping: dict[str, Any]) -> str:
    """Return a mapping as YAML writes it on one line."""
    return "{" + ", ".join(f"{name}: {'null' if ours is None else ours}" for name, ours in mapping.items()) + "}"
