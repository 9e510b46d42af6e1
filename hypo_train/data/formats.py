"""The formats of data sets, and the usual one, which reads preference data.

A format turns a row of a data set into the text of its prompt and completions. In the usual format, a row holds text or
chat messages, and its prompt is a column or the common beginning of the completions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from hypo_train.data.boundaries import check_answer, split_conversations
from hypo_train.data.chat import render
from hypo_train.data.dialogues import split_texts
from hypo_train.data.errors import DataError, Unusable, quoted, refuse_blank
from hypo_train.data.messages import text_or_messages

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

    def pair_parts(self, columns: AbstractSet[str]) -> tuple[str, ...]:
        """Return the parts of a preference pair: the chosen and the rejected completion."""

    def example_parts(self, columns: AbstractSet[str]) -> tuple[str, ...]:
        """Return the part to imitate, then a second part if it is needed to find the prompt."""

    def prompt_parts(self, columns: AbstractSet[str]) -> tuple[str, ...]:
        """Return the parts that a row must have if only its prompt is used."""

    def row_text(
        self, row: int, example: Mapping[str, Any], parts: Sequence[str], tokenizer: PreTrainedTokenizerBase
    ) -> RowText:
        """Return the text of ``example``'s prompt and of its ``parts``.

        Raises:
            Unusable: this row cannot be used.
            DataError: no row like this one can be used.
        """


class Preferences:
    """Reads the columns prompt, chosen, rejected and completion: text or chat messages."""

    def pair_parts(self, columns: AbstractSet[str]) -> tuple[str, ...]:
        if not {"chosen", "rejected"} <= columns:
            raise DataError(
                "preference data needs the columns 'chosen' and 'rejected', and 'prompt' unless it is their common "
                f"beginning; the columns are {quoted(columns)}"
            )
        return ("chosen", "rejected")

    def example_parts(self, columns: AbstractSet[str]) -> tuple[str, ...]:
        if {"prompt", "completion"} <= columns:
            return ("completion",)
        if {"prompt", "chosen"} <= columns:
            return ("chosen",)
        if {"chosen", "rejected"} <= columns:
            return ("chosen", "rejected")  # the prompt is their common beginning
        raise DataError(
            "SFT needs the columns 'prompt' and 'completion', or those of preference data ('chosen' and "
            f"'rejected'); the columns are {quoted(columns)}"
        )

    def prompt_parts(self, columns: AbstractSet[str]) -> tuple[str, ...]:
        if {"chosen", "rejected"} <= columns:
            return ("chosen", "rejected")  # so that rows and prompts are those of the pairs
        if "prompt" in columns:
            return ()
        raise DataError(
            "prompts are the column 'prompt', or the common beginning of 'chosen' and 'rejected'; the columns are "
            f"{quoted(columns)}"
        )

    def row_text(
        self, row: int, example: Mapping[str, Any], parts: Sequence[str], tokenizer: PreTrainedTokenizerBase
    ) -> RowText:
        values = {part: text_or_messages(example.get(part), part) for part in parts}
        needs_prompt = "prompt" in example or len(parts) < 2  # else it is the common beginning of two parts
        prompt = text_or_messages(example.get("prompt"), "prompt") if needs_prompt else None
        texts = [value for value in values.values() if isinstance(value, str)]
        if len(texts) == len(values) and not isinstance(prompt, list):
            found = split_texts(prompt, texts)
            for part, text in zip(parts, found.completions, strict=True):
                refuse_blank(text, part)
            return RowText(row, found.prompt, found.completions, rendered=False, notes=found.notes)
        conversations = [
            [{"role": "assistant", "content": value}] if isinstance(value, str) else value for value in values.values()
        ]
        split = split_conversations(prompt, conversations)
        for part, answer in zip(parts, split.answers, strict=True):
            check_answer(answer, part)
        start, endings, notes = render(split, tokenizer)
        return RowText(row, start, endings, rendered=True, notes=notes)
