"""The formats of data sets, and the usual one, which reads preference data.

A format turns a row of a data set into the text of its prompt and completions. In the usual format, a row holds text or
chat messages, and its prompt is a column or the common beginning of the completions.
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
    """The data cannot be trained on; the message names the file, split or column and what it holds."""


class Unusable(Exception):
    """A row cannot be used; the message is a reason that can follow "3 rows with"."""


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
        values = {part: _text_or_messages(example.get(part), part) for part in parts}
        needs_prompt = "prompt" in example or len(parts) < 2  # else it is the common beginning of two parts
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
    """Return the names in quotes, separated by commas, for an error message."""
    return ", ".join(map(repr, names))


def refuse_blank(text: str, part: str) -> None:
    """Raise ``Unusable`` if the text of a part is empty or white space."""
    if not text.strip():
        raise Unusable(f"an empty {part!r}")


def _text_or_messages(value: Any, column: str) -> str | Messages:
    """Return the value if it is text or well-formed messages, without the keys that Arrow filled with None."""
    if value is None or value == []:
        raise Unusable(f"an empty {column!r}")
    if isinstance(value, str):
        refuse_blank(value, column)
        return value
    if isinstance(value, Mapping):
        raise Unusable(f"a {column!r} that is one message, but should be a list of messages")
    if not isinstance(value, list):
        raise Unusable(f"a {column!r} that is neither text nor chat messages")
    for message in value:
        fields = message if isinstance(message, Mapping) else {}
        if isinstance(fields.get("content"), list):
            raise Unusable(f"a {column!r} with a message in parts, but should be text (images are not supported)")
        if isinstance(fields.get("from"), str) and "value" in fields:
            raise Unusable(
                f"a {column!r} with 'from' and 'value' in its messages, but should have 'role' and 'content'"
            )
        if not (isinstance(fields.get("role"), str) and isinstance(fields.get("content"), str)):
            raise Unusable(f"a {column!r} with a message without a 'role' and a 'content' text")
    return [{key: item for key, item in message.items() if item is not None} for message in value]


def _split_texts(chosen: str, rejected: str) -> tuple[str, list[str]]:
    """Return the common beginning, cut at white space, and the rests of both texts; a space goes to the rests."""
    cut = _num_shared(chosen, rejected)
    while cut > 0 and not chosen[cut - 1].isspace():  # no word is split between prompt and completion
        cut -= 1
    if chosen[:cut].endswith(" "):
        cut -= 1
    if not chosen[:cut].strip():
        raise Unusable("no common beginning of 'chosen' and 'rejected', which would be the prompt")
    return chosen[:cut], [chosen[cut:], rejected[cut:]]


def _num_shared(first: Sequence[Any], second: Sequence[Any]) -> int:
    """Return how many leading items (characters or messages) two sequences have in common."""
    items = enumerate(zip(first, second, strict=False))
    return next((i for i, (a, b) in items if a != b), min(len(first), len(second)))


def _split_conversations(
    prompt: str | Messages | None, conversations: list[Messages]
) -> tuple[Messages, list[Messages]]:
    """Return the messages of the prompt, and those of each answer.

    The prompt's messages are removed from a conversation that repeats them. If the prompt is not a list, it is the
    common beginning of the conversations (in UltraFeedback ``prompt`` repeats it as text), else a user's message.
    """
    if isinstance(prompt, list):
        repeated = all(conversation[: len(prompt)] == prompt for conversation in conversations)
        return prompt, [conversation[len(prompt) * repeated :] for conversation in conversations]
    # An answer keeps at least its last message.
    shared = _num_shared(conversations[0][:-1], conversations[-1][:-1])
    if shared:
        return conversations[0][:shared], [conversation[shared:] for conversation in conversations]
    if prompt is None:
        raise Unusable("no common first message of 'chosen' and 'rejected', which would be the prompt")
    return [{"role": "user", "content": prompt}], conversations


def _check_answer(messages: Messages, column: str) -> None:
    if not messages or messages[-1]["role"] != "assistant":
        raise Unusable(f"a {column!r} whose last message is not from the assistant")
    if messages[0]["role"] != "assistant":
        raise Unusable(f"a {column!r} that does not continue with the assistant's message")
    refuse_blank(messages[-1]["content"], column)


def _render(prompt: Messages, answers: list[Messages], tokenizer: PreTrainedTokenizerBase) -> tuple[str, list[str]]:
    """Return the texts of prompt and completions, written by the chat template."""
    if tokenizer.chat_template is None:
        raise DataError(
            f"the data set has chat messages, but the tokenizer {tokenizer.name_or_path!r} has no chat template: "
            "use an instruction-tuned model's, or text columns"
        )
    if not any(message["content"].strip() for message in prompt):
        raise Unusable("an empty 'prompt'")
    try:
        start = str(tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True))
        texts = [str(tokenizer.apply_chat_template(prompt + answer, tokenize=False)) for answer in answers]
    except (TemplateError, TypeError, ValueError, LookupError, ArithmeticError) as error:  # a template is a program
        raise Unusable(f"messages that the chat template refuses: {error}") from None
    if not all(text.startswith(start) for text in texts):
        raise Unusable("a prompt that the chat template writes differently if an answer follows")
    return start, [text[len(start) :] for text in texts]
