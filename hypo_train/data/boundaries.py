"""Find where the prompt of a row ends and its completions begin, in text and in chat messages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from hypo_train.data.errors import DataError, Unusable, refuse_blank
from hypo_train.data.messages import Messages

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def split_texts(chosen: str, rejected: str) -> tuple[str, list[str]]:
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


def split_conversations(
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


def check_answer(messages: Messages, column: str) -> None:
    """Raise ``Unusable`` unless the messages begin and end with the assistant's."""
    if not messages or messages[-1]["role"] != "assistant":
        raise Unusable(f"a {column!r} whose last message is not from the assistant")
    if messages[0]["role"] != "assistant":
        raise Unusable(f"a {column!r} that does not continue with the assistant's message")
    refuse_blank(messages[-1]["content"], column)


def render(prompt: Messages, answers: list[Messages], tokenizer: PreTrainedTokenizerBase) -> tuple[str, list[str]]:
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
