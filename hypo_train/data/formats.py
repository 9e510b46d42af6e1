"""The formats of data sets, and the usual one, which reads preference data.

A format turns a row of a data set into the text of its prompt and completions. In the usual format, a row holds text or
chat messages, and its prompt is a column or the common beginning of the completions.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from hypo_train.data.boundaries import check_answer, split_conversations
from hypo_train.data.chat import render
from hypo_train.data.columns import suggestion
from hypo_train.data.dialogues import split_texts
from hypo_train.data.errors import DataError, Unusable, quoted, refuse_blank
from hypo_train.data.messages import Messages, text_or_messages, value_or_json, without_answer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Encode: TypeAlias = Callable[[str], tuple[int, ...]]  # a prompt's text -> its token ids


@dataclass(frozen=True)
class RowText:
    """One row as text, before it is tokenized.

    Raises:
        Unusable: the text is not valid Unicode, on which tokenizers fail.
    """

    row: int  # index in the source split
    prompt: str
    completions: list[str]  # one for each requested part, in order
    rendered: bool  # written by a chat template, which writes the special tokens itself
    # (encode, limit) -> ids of the prompt, shortened to ``limit`` tokens in the way of the format. It raises Unusable
    # if the prompt cannot be shortened so far. None: a prompt that is too long loses its beginning.
    shorten: Callable[[Encode, int], tuple[int, ...]] | None = None
    notes: tuple[str, ...] = ()  # counts of the report (fields of ``DataReport``) that this row adds one to

    def __post_init__(self) -> None:
        try:
            "".join([self.prompt, *self.completions]).encode()
        except UnicodeEncodeError:
            raise Unusable("text that is not valid Unicode (half of a surrogate pair)") from None


class Format(Protocol):
    """One way to write the rows of a data set.

    The first three methods return the names of the completions (parts) that ``row_text`` has to find in a row. They
    raise ``DataError`` if the columns are not those of the format.
    """

    @property
    def targets(self) -> AbstractSet[str]:
        """Return all columns that the format knows."""

    @property
    def guards_columns(self) -> bool:
        """Return whether columns that nothing reads are searched for what the answers depend on."""

    def pair_parts(self, columns: AbstractSet[str]) -> tuple[str, ...]:
        """Return the parts of a preference pair: the chosen and the rejected completion."""

    def example_parts(self, columns: AbstractSet[str]) -> tuple[str, ...]:
        """Return the part to imitate, then a second part if it is needed to find the prompt."""

    def prompt_parts(self, columns: AbstractSet[str]) -> tuple[str, ...]:
        """Return the parts that a row must have if only its prompt is used."""

    def columns_read(self, parts: Sequence[str], columns: Sequence[str]) -> list[str]:
        """Return the columns that ``row_text`` reads for these ``parts``."""

    def row_text(
        self, row: int, example: Mapping[str, Any], parts: Sequence[str], tokenizer: PreTrainedTokenizerBase
    ) -> RowText:
        """Return the text of ``example``'s prompt and of its ``parts``.

        Raises:
            Unusable: this row cannot be used.
            DataError: no row like this one can be used.
        """


# Columns that only a chat template writes, and those that hold a whole conversation.
TEMPLATE_COLUMNS = ("system", "tools", "chat_template_kwargs")
CONVERSATIONS = ("messages", "conversations")
_SET_HERE = {"tools", "tokenize", "add_generation_prompt", "continue_final_message", "conversation"}


class Preferences:
    """Reads the columns prompt, chosen, rejected and completion, or a whole conversation: text or chat messages."""

    guards_columns = True
    targets = frozenset(("prompt", "chosen", "rejected", "completion", "label", *CONVERSATIONS, *TEMPLATE_COLUMNS))

    def pair_parts(self, columns: AbstractSet[str]) -> tuple[str, ...]:
        if not {"chosen", "rejected"} <= columns:
            unpaired = "; rows with one completion and a label are no pairs" if "label" in columns else ""
            raise DataError(
                "preference data needs the columns 'chosen' and 'rejected', and 'prompt' unless it is their common "
                f"beginning; the columns are {quoted(columns)}"
                f"{suggestion(columns, ('prompt', 'chosen', 'rejected')) or unpaired}"
            )
        return ("chosen", "rejected")

    def example_parts(self, columns: AbstractSet[str]) -> tuple[str, ...]:
        has_prompt = not columns.isdisjoint(("prompt", *CONVERSATIONS))
        if has_prompt and "completion" in columns:
            return ("completion",)
        if {"prompt", "chosen"} <= columns:
            return ("chosen",)
        if {"chosen", "rejected"} <= columns:
            return ("chosen", "rejected")  # the prompt is their common beginning
        if conversation := _conversation(columns):
            return conversation
        raise DataError(
            "SFT needs the columns 'prompt' and 'completion', or 'messages', or those of preference data ('chosen' and "
            f"'rejected'); the columns are {quoted(columns)}"
            f"{suggestion(columns, ('prompt', 'completion')) or suggestion(columns, ('messages',))}"
        )

    def prompt_parts(self, columns: AbstractSet[str]) -> tuple[str, ...]:
        if {"chosen", "rejected"} <= columns:
            return ("chosen", "rejected")  # so that rows and prompts are those of the pairs
        if not columns.isdisjoint(("prompt", *CONVERSATIONS)):
            return ()
        raise DataError(
            "prompts are the column 'prompt', or the common beginning of 'chosen' and 'rejected'; the columns are "
            f"{quoted(columns)}{suggestion(columns, ('prompt',))}"
        )

    def columns_read(self, parts: Sequence[str], columns: Sequence[str]) -> list[str]:
        prompt = ("prompt",) if "prompt" in columns else _conversation(columns)
        needed = {*parts, *TEMPLATE_COLUMNS, *(() if parts and parts[0] in CONVERSATIONS else prompt)}
        return [name for name in columns if name in needed]

    def row_text(
        self, row: int, example: Mapping[str, Any], parts: Sequence[str], tokenizer: PreTrainedTokenizerBase
    ) -> RowText:
        prompt, values = _prompt_and_values(example, parts)
        texts = [value for value in values if isinstance(value, str)]
        if len(texts) == len(values) and not isinstance(prompt, list):
            found = split_texts(prompt, texts)
            for part, text in zip(parts, found.completions, strict=True):
                refuse_blank(text, part)
            return RowText(row, found.prompt, found.completions, rendered=False, notes=found.notes)
        conversations = [
            [{"role": "assistant", "content": value}] if isinstance(value, str) else value for value in values
        ]
        split = split_conversations(prompt, conversations)
        for part, answer in zip(parts, split.answers, strict=True):
            check_answer(answer, part)
        split = split._replace(prompt=_with_system(split.prompt, example.get("system")))
        start, endings, notes = render(split, tokenizer, _template_arguments(example))
        return RowText(row, start, endings, rendered=True, notes=notes)


def _conversation(columns: Container[str]) -> tuple[str, ...]:
    """Return the name of the column with whole conversations, if there is one."""
    return next(((name,) for name in CONVERSATIONS if name in columns), ())


def _prompt_and_values(
    example: Mapping[str, Any], parts: Sequence[str]
) -> tuple[str | Messages | None, list[str | Messages]]:
    """Return the prompt, None if it is the beginning of the parts, and the value of each part."""
    values = [text_or_messages(example.get(part), part) for part in parts]
    if parts and parts[0] in CONVERSATIONS:
        (messages,) = values
        if isinstance(messages, str):
            raise Unusable(f"a {parts[0]!r} that is text, but should be a list of messages")
        if len(messages) < 2:
            raise Unusable(f"a {parts[0]!r} of a single message")
        return None, [messages]
    if "prompt" in example:
        return text_or_messages(example["prompt"], "prompt"), values
    for column in _conversation(example):
        if not parts:
            whole = text_or_messages(example[column], column)
            return whole if isinstance(whole, str) else without_answer(whole), values
        if all(isinstance(value, str) or len(value) == 1 for value in values):  # else they begin with the prompt
            return text_or_messages(example[column], column), values
    if len(parts) < 2:
        raise Unusable("an empty 'prompt'")
    return None, values


def _with_system(messages: Messages, system: Any) -> Messages:
    """Return the messages after a system message with the text of the column 'system'."""
    if system is None or (isinstance(system, str) and not system.strip()):
        return messages
    if not isinstance(system, str):
        raise Unusable("a 'system' that is not text")
    turn = {"role": "system", "content": system}
    if messages[0]["role"] != "system":
        return [turn, *messages]
    if messages[0]["content"].strip() != system.strip():
        raise Unusable("a 'system' that differs from the system message of the prompt")
    return messages


def _template_arguments(example: Mapping[str, Any]) -> dict[str, Any]:
    """Return the chat template's arguments in the columns 'tools' and 'chat_template_kwargs'."""
    tools = value_or_json(example.get("tools"), "tools")
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, Mapping) for tool in tools)):
        raise Unusable("a 'tools' that is not a list of dictionaries")
    others = value_or_json(example.get("chat_template_kwargs"), "chat_template_kwargs") or {}
    if not isinstance(others, Mapping):
        raise Unusable("a 'chat_template_kwargs' that is not a dictionary")
    if taken := sorted(_SET_HERE & others.keys()):
        raise Unusable(f"a 'chat_template_kwargs' with {quoted(taken)}, which is set here")
    return dict(others) if tools is None else {"tools": tools, **others}
