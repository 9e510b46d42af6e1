"""One row of a data set as text: its prompt and its completions. What a format of data is, and the usual one.

In the usual one a row is text, or chat messages that the tokenizer's template writes. Its prompt is a column of its
own, or what the completions have in common.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from jinja2 import TemplateError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Messages: TypeAlias = list[dict[str, Any]]
Encode: TypeAlias = Callable[[str], tuple[int, ...]]  # a prompt's text -> its token ids


class DataError(ValueError):
    """Data that cannot be trained on; the message names the file, split or column and what is there."""


class Unusable(Exception):
    """A row that cannot be used; the message is the reason, in words that follow "3 rows with"."""


@dataclass(frozen=True)
class RowText:
    """One row as text, before tokenising."""

    row: int  # index in the source split
    prompt: str
    completions: list[str]  # in the order of the parts asked for
    rendered: bool  # by a chat template, which writes the special tokens itself
    # (encode, limit) -> ids of the prompt cut to ``limit`` tokens, where the format has a way of its own to cut one; it
    # raises Unusable where that is not enough. None: a prompt that is too long loses its beginning.
    shorten: Callable[[Encode, int], tuple[int, ...]] | None = None

    def __post_init__(self) -> None:
        """Raises ``Unusable`` for what tokenizers fail on."""
        try:
            "".join([self.prompt, *self.completions]).encode()
        except UnicodeEncodeError:
            raise Unusable("text that is no valid Unicode (half of a surrogate pair)") from None


class Format(Protocol):
    """One way to write the rows of a data set.

    The first three name the parts of a row that ``row_text`` has to find, from the columns that there are. They raise
    ``DataError`` where the columns are not those of the format.
    """

    def pair_parts(self, columns: AbstractSet[str]) -> tuple[str, ...]:
        """The preferred completion and the other one."""

    def example_parts(self, columns: AbstractSet[str]) -> tuple[str, ...]:
        """The completion to imitate first; any other one only to find the prompt."""

    def prompt_parts(self, columns: AbstractSet[str]) -> tuple[str, ...]:
        """Completions that a row must have although its prompt alone is asked for."""

    def row_text(
        self, row: int, example: Mapping[str, Any], parts: Sequence[str], tokenizer: PreTrainedTokenizerBase
    ) -> RowText:
        """The text of ``example``'s prompt and of the ``parts``.

        Raises ``Unusable`` with the reason, or ``DataError`` where no such row could be used.
        """


class Preferences:
    """Columns prompt, chosen, rejected or completion: text, or chat messages."""

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
            return ("chosen", "rejected")  # the prompt is what the two share
        raise DataError(
            "SFT needs the columns 'prompt' and 'completion', or those of preference data ('chosen' and "
            f"'rejected'); the columns are {quoted(columns)}"
        )

    def prompt_parts(self, columns: AbstractSet[str]) -> tuple[str, ...]:
        if {"chosen", "rejected"} <= columns:
            return ("chosen", "rejected")  # the same rows and prompts as of the pairs
        if "prompt" in columns:
            return ()
        raise DataError(
            "prompts are the column 'prompt', or the common beginning of 'chosen' and 'rejected'; the columns are "
            f"{quoted(columns)}"
        )

    def row_text(
        self, row: int, example: Mapping[str, Any], parts: Sequence[str], tokenizer: PreTrainedTokenizerBase
    ) -> RowText:
        values = {part: _text_or_messages(example.get(part), part) for part in parts}
        needs_prompt = "prompt" in example or len(parts) < 2  # which two have in common otherwise
        prompt = _text_or_messages(example.get("prompt"), "prompt") if needs_prompt else None
        texts = [value for value in values.values() if isinstance(value, str)]
        if len(texts) == len(values) and not isinstance(prompt, list):
            if prompt is None:
                prompt, texts = _split_texts(*texts)
            for part, text in zip(parts, texts, strict=True):
                refuse_blank(text, part)
            return RowText(row, prompt, texts, rendered=False)
        conversations = [
            [{"role": "assistant", "content": value}] if isinstance(value, str) else value for value in values.values()
        ]
        messages, answers = _split_conversations(prompt, conversations)
        for part, answer in zip(parts, answers, strict=True):
            _check_answer(answer, part)
        start, endings = _render(messages, answers, tokenizer)
        return RowText(row, start, endings, rendered=True)


def quoted(names: Iterable[str]) -> str:
    """Names as an error message lists them."""
    return ", ".join(map(repr, names))


def refuse_blank(text: str, part: str) -> None:
    """Raise ``Unusable`` where the text of a part is nothing but white space."""
    if not text.strip():
        raise Unusable(f"an empty {part!r}")


def _text_or_messages(value: Any, column: str) -> str | Messages:
    """The value, if it is text or well-formed messages; keys that Arrow filled with None are left out."""
    if value is None or value == []:
        raise Unusable(f"an empty {column!r}")
    if isinstance(value, str):
        refuse_blank(value, column)
        return value
    if isinstance(value, Mapping):
        raise Unusable(f"a {column!r} that is one message, and should be a list of them")
    if not isinstance(value, list):
        raise Unusable(f"a {column!r} that is neither text nor chat messages")
    for message in value:
        fields = message if isinstance(message, Mapping) else {}
        if isinstance(fields.get("content"), list):
            raise Unusable(f"a {column!r} with a message in parts, and should be text (images are not served)")
        if isinstance(fields.get("from"), str) and "value" in fields:
            raise Unusable(
                f"a {column!r} with 'from' and 'value' in its messages, and should have 'role' and 'content'"
            )
        if not (isinstance(fields.get("role"), str) and isinstance(fields.get("content"), str)):
            raise Unusable(f"a {column!r} with a message without a 'role' and a 'content' text")
    return [{key: item for key, item in message.items() if item is not None} for message in value]


def _split_texts(chosen: str, rejected: str) -> tuple[str, list[str]]:
    """The common beginning up to white space, and what follows it; a space goes with what follows."""
    cut = _num_shared(chosen, rejected)
    while cut > 0 and not chosen[cut - 1].isspace():  # no word is split between prompt and completion
        cut -= 1
    if chosen[:cut].endswith(" "):
        cut -= 1
    if not chosen[:cut].strip():
        raise Unusable("no beginning shared by 'chosen' and 'rejected' to be the prompt")
    return chosen[:cut], [chosen[cut:], rejected[cut:]]


def _num_shared(first: Sequence[Any], second: Sequence[Any]) -> int:
    """How many leading items (characters, messages) the two have in common."""
    places = enumerate(zip(first, second, strict=False))
    return next((place for place, (a, b) in places if a != b), min(len(first), len(second)))


def _split_conversations(
    prompt: str | Messages | None, conversations: list[Messages]
) -> tuple[Messages, list[Messages]]:
    """The messages of the prompt, and those of each answer.

    A conversation that repeats the prompt's messages loses them. Where the prompt is no list, it is what the
    conversations share (as in UltraFeedback, whose ``prompt`` repeats it as text), else the text as the user's.
    """
    if isinstance(prompt, list):
        repeated = all(conversation[: len(prompt)] == prompt for conversation in conversations)
        return prompt, [conversation[len(prompt) * repeated :] for conversation in conversations]
    # An answer keeps at least its last message.
    shared = _num_shared(conversations[0][:-1], conversations[-1][:-1])
    if shared:
        return conversations[0][:shared], [conversation[shared:] for conversation in conversations]
    if prompt is None:
        raise Unusable("no message shared by 'chosen' and 'rejected' to be the prompt")
    return [{"role": "user", "content": prompt}], conversations


def _check_answer(messages: Messages, column: str) -> None:
    if not messages or messages[-1]["role"] != "assistant":
        raise Unusable(f"a {column!r} whose last message is not from the assistant")
    if messages[0]["role"] != "assistant":
        raise Unusable(f"a {column!r} that does not go on with the assistant's message")
    refuse_blank(messages[-1]["content"], column)


def _render(prompt: Messages, answers: list[Messages], tokenizer: PreTrainedTokenizerBase) -> tuple[str, list[str]]:
    """Prompt and completions as the chat template writes them."""
    if tokenizer.chat_template is None:
        raise DataError(
            f"the data set has chat messages, but the tokenizer {tokenizer.name_or_path!r} has no chat template: "
            "use an instruction-tuned model's, or text columns"
        )
    if not any(message["content"].strip() for message in prompt):
        raise Unusable("an empty 'prompt'")
    try:
        start = str(tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True))
        whole = [str(tokenizer.apply_chat_template(prompt + answer, tokenize=False)) for answer in answers]
    except (TemplateError, TypeError, ValueError, LookupError, ArithmeticError) as error:  # a program
        raise Unusable(f"messages that the chat template refuses: {error}") from None
    if not all(text.startswith(start) for text in whole):
        raise Unusable("a prompt that the chat template writes differently once an answer follows")
    return start, [text[len(start) :] for text in whole]
