"""Find where the prompt of a row ends and its answers begin and end, in chat messages.

An answer is one message of the assistant: what follows it, such as the user's next turn, is never trained on.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from hypo_train.data.errors import Unusable, refuse_blank
from hypo_train.data.messages import Messages


class Conversations(NamedTuple):
    """The messages of a prompt and of each of its answers, and notes for the report."""

    prompt: Messages
    answers: list[Messages]
    is_open: bool = False  # the last message of the prompt is the beginning of each answer's first message
    notes: tuple[str, ...] = ()


def split_conversations(prompt: str | Messages | None, conversations: list[Messages]) -> Conversations:
    """Return the messages of the prompt, and those of each answer.

    The prompt's messages are removed from a conversation that repeats them. If the prompt is not a list, it is the
    common beginning of the conversations (in UltraFeedback ``prompt`` repeats it as text), else a user's message.
    Messages that all answers have in common belong to the prompt.
    """
    found = _split(prompt, conversations)
    notes = list(found.notes)
    if any(len(answer) > 1 for answer in found.answers):
        notes.append("cut_turns")
    if found.is_open:
        notes.append("open_prompts")
    return found._replace(notes=tuple(notes))


def check_answer(messages: Messages, column: str) -> None:
    """Raise ``Unusable`` unless the messages begin and end with the assistant's, and the first one has content."""
    if not messages or messages[-1]["role"] != "assistant":
        raise Unusable(f"a {column!r} whose last message is not from the assistant")
    if messages[0]["role"] != "assistant":
        raise Unusable(f"a {column!r} that does not continue with the assistant's message")
    if not messages[0].get("tool_calls"):
        refuse_blank(text_of(messages[0]), column)


def text_of(message: dict[str, Any]) -> str:
    """Return the content of a message, empty if it has none."""
    return message.get("content") or ""


def num_shared(first: Sequence[Any], second: Sequence[Any]) -> int:
    """Return how many leading items two sequences have in common."""
    items = enumerate(zip(first, second, strict=False))
    return next((i for i, (a, b) in items if a != b), min(len(first), len(second)))


def _split(prompt: str | Messages | None, conversations: list[Messages]) -> Conversations:
    if isinstance(prompt, list):
        return _split_behind(prompt, conversations)
    # An answer keeps at least its last message.
    shared = num_shared(conversations[0][:-1], conversations[-1][:-1])
    if shared:
        start = conversations[0][:shared]
        # A single conversation trains on its last answer only.
        earlier = len(conversations) == 1 and any(message["role"] == "assistant" for message in start)
        notes = ("earlier_answers",) if earlier else ()
        return Conversations(start, [conversation[shared:] for conversation in conversations], notes=notes)
    if prompt is None:
        raise Unusable("no common first message of 'chosen' and 'rejected', which would be the prompt")
    return Conversations([{"role": "user", "content": prompt}], conversations)


def _split_behind(prompt: Messages, conversations: list[Messages]) -> Conversations:
    """Return the answers behind a prompt that is a list of messages."""
    size = len(prompt)
    if conversations and all(conversation[:size] == prompt for conversation in conversations):
        answers = [conversation[size:] for conversation in conversations]
    elif prompt[-1]["role"] == "assistant":
        if not text_of(prompt[-1]).strip():  # a place for the answer
            return _split_behind(prompt[:-1], conversations) if size > 1 else Conversations(prompt, conversations)
        return Conversations(prompt, [_without_start(prompt, answer) for answer in conversations], is_open=True)
    else:
        answers = conversations
    shared = num_shared(answers[0][:-1], answers[-1][:-1]) if len(answers) > 1 else 0
    return Conversations([*prompt, *answers[0][:shared]] if shared else prompt, [answer[shared:] for answer in answers])


def _without_start(prompt: Messages, conversation: Messages) -> Messages:
    """Return the messages behind a prompt whose last message the conversation continues, if it repeats the prompt."""
    *earlier, last = prompt
    size, start = len(earlier), text_of(last)
    if conversation[:size] == earlier and len(conversation) > size:
        message = conversation[size]
        if message["role"] == "assistant" and text_of(message).startswith(start):
            return [{**message, "content": text_of(message)[len(start) :]}, *conversation[size + 1 :]]
    return conversation
