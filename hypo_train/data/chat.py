"""Write conversations with a tokenizer's chat template: where a prompt ends in it, and what ends an answer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from jinja2 import TemplateError

from hypo_train.data.boundaries import Conversations, num_shared, text_of
from hypo_train.data.errors import DataError, Unusable
from hypo_train.data.messages import Messages

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_TEMPLATE_ERRORS = (
    TemplateError,
    TypeError,
    ValueError,
    LookupError,
    ArithmeticError,
    AttributeError,
)  # a template is a program
_THOUGHTS = ("reasoning_content", "reasoning", "thinking")  # keys of messages that some templates write
_SHOWN = 16  # characters of a text in a message


class Rendered(NamedTuple):
    """The texts of a prompt and of its completions, and notes for the report."""

    prompt: str
    completions: list[str]
    notes: tuple[str, ...] = ()


def render(
    conversations: Conversations, tokenizer: PreTrainedTokenizerBase, arguments: Mapping[str, Any] | None = None
) -> Rendered:
    """Return the texts of the prompt and of the first message of each answer, written by the chat template.

    The prompt is what the template writes before an answer. Some templates write more if no answer follows, such as the
    beginning of a thinking block: this is left out, and noted. ``arguments`` are more arguments of the
    template, such as ``tools``.

    Raises:
        Unusable: the template refuses the messages, rewrites them, or writes another prompt if an answer follows.
        DataError: there is no chat template.
    """
    if tokenizer.chat_template is None:
        raise DataError(
            f"the data set has chat messages, but the tokenizer {tokenizer.name_or_path!r} has no chat template: "
            "use an instruction-tuned model's, or text columns"
        )
    prompt, is_open = conversations.prompt, conversations.is_open
    if not any(text_of(message).strip() for message in prompt):
        raise Unusable("an empty 'prompt'")
    answers = [answer[0] for answer in conversations.answers]
    template = _Template(tokenizer, arguments or {})
    if is_open:
        start = template.write(prompt, continue_final_message=True)
        texts = [template.write([*prompt[:-1], _joined(prompt[-1], answer)]) for answer in answers]
    else:
        start = template.write(prompt, add_generation_prompt=True)
        texts = [template.write([*prompt, answer]) for answer in answers]
    notes = list(conversations.notes)
    if not all(text.startswith(start) for text in texts):
        start = _before_answer(template, prompt, start, texts, is_open=is_open)
        notes.append("shortened_generation_prompts")
    completions = [text[len(start) :] for text in texts]
    for answer, completion in zip(answers, completions, strict=True):
        if not _holds(completion, answer):
            raise Unusable(
                "an answer that the chat template does not write as it is (a thinking block that it leaves out?): use "
                "a template that keeps it, or write prompt and completion as text"
            )
    _refuse_unwritten(prompt, template.arguments, start)
    for answer, completion in zip(answers, completions, strict=True):
        _refuse_unwritten([answer], {}, completion)
    if not all(_holds(start, message) for message in prompt if message["role"] != "assistant"):
        notes.append("unwritten_messages")
    return Rendered(start, completions, tuple(notes))


def turn_end(tokenizer: PreTrainedTokenizerBase, eos_token_ids: Iterable[int]) -> int | None:
    """Return the added token, such as <|im_end|>, that ends an assistant's message in the chat template.

    It is None if the template writes one of ``eos_token_ids`` or no added token there, and without a template.
    """
    if tokenizer.chat_template is None:
        return None
    content = "the answer"
    messages = [{"role": "user", "content": "the question"}, {"role": "assistant", "content": content}]
    try:
        text = _Template(tokenizer, {}).write(messages)
    except Unusable:  # it asks for other messages; then the rows say what is wrong
        return None
    _, found, rest = text.rpartition(content)
    if not found or not rest:
        return None
    ids = tokenizer(rest, add_special_tokens=False)["input_ids"]
    added = {token for token, what in tokenizer.added_tokens_decoder.items() if what.content.strip()}
    return None if set(eos_token_ids).intersection(ids) else next((token for token in ids if token in added), None)


class _Template(NamedTuple):
    """A chat template whose errors make a row unusable."""

    tokenizer: PreTrainedTokenizerBase
    arguments: Mapping[str, Any]

    def write(self, messages: Messages, **how: Any) -> str:
        try:
            return str(self.tokenizer.apply_chat_template(messages, tokenize=False, **how, **self.arguments))
        except _TEMPLATE_ERRORS as error:
            raise Unusable(f"messages that the chat template refuses: {error}") from None


def _before_answer(template: _Template, prompt: Messages, start: str, texts: Sequence[str], *, is_open: bool) -> str:
    """Return what the template writes before any answer, if ``start`` and all texts begin with it."""
    one, two = (template.write([*prompt, {"role": "assistant", "content": word}]) for word in ("a", "b"))
    header = one[: num_shared(one, two)]
    if not is_open and start.startswith(header) and all(text.startswith(header) for text in texts):
        return header
    other = next(text for text in texts if not text.startswith(start))
    part = num_shared(start, other)
    first = max(0, part - _SHOWN)
    raise Unusable(
        "a prompt that the chat template writes differently if an answer follows "
        f"({start[first : part + _SHOWN]!r} against {other[first : part + 4]!r}...): use a template that writes both "
        "alike, or write prompt and completion as text"
    )


def _joined(start: dict[str, Any], rest: dict[str, Any]) -> dict[str, Any]:
    return {**start, **rest, "content": text_of(start) + text_of(rest)}


def _holds(text: str, message: dict[str, Any]) -> bool:
    """Return whether a text holds what a message says and thinks, up to white space."""
    said = [text_of(message), *(message[name] for name in _THOUGHTS if isinstance(message.get(name), str))]
    return all(part in text or "".join(part.split()) in "".join(text.split()) for part in said)


def _refuse_unwritten(messages: Messages, arguments: Mapping[str, Any], text: str) -> None:
    """Raise ``Unusable`` if the template left out tools or tool calls, as one does that does not know them."""
    calls = [call["function"]["name"] for message in messages for call in message.get("tool_calls", [])]
    if unwritten := next((name for name in calls if name not in text), None):
        raise Unusable(f"tool calls ({unwritten!r}) that the chat template does not write: use a model whose does")
    functions = [tool.get("function", tool) for tool in arguments.get("tools") or []]
    names = [function.get("name") for function in functions if isinstance(function, Mapping)]
    if unwritten := next((name for name in names if isinstance(name, str) and name not in text), None):
        raise Unusable(
            f"'tools' ({unwritten!r}) that the chat template does not write: use a model whose does, or leave them out "
            "with column_mapping: {tools: null}"
        )
