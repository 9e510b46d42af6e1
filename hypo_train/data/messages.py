"""Chat messages in the forms that data sets store them in.

Read are lists of {"role": ..., "content": ...}, sharegpt's lists of {"from": ..., "value": ...}, one message alone, a
dictionary of lists, and the text of any of these, as a CSV file has it. All become lists of messages with "role" and
"content", as chat templates want them.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping
from typing import Any, TypeAlias

from hypo_train.data.errors import Unusable, refuse_blank

Messages: TypeAlias = list[dict[str, Any]]

# sharegpt's names, and those of models -> the roles that chat templates know
_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "function-call": "assistant",
    "function": "tool",
    "function_response": "tool",
    "function-response": "tool",
    "observation": "tool",
}
_CALLS = ("function_call", "function-call")
_KNOWN = {"system", "developer", "user", "assistant", "tool", *_ROLES}
_TEXT_PARTS = (None, "text", "input_text", "output_text")
_LOOKS_LIKE_MESSAGES = re.compile(r"""\s*\[?\s*\{\s*["'](role|content|from|value)["']\s*:""")


def text_or_messages(value: Any, column: str) -> str | Messages:
    """Return the value if it is text, else its chat messages.

    A message's keys without a value are left out.

    Raises:
        Unusable: the value is empty, or neither text nor chat messages.
    """
    if isinstance(value, str) and looks_like_messages(value):
        value = _parsed(value, column)
    if value is None or value == [] or value == {}:
        raise Unusable(f"an empty {column!r}")
    if isinstance(value, str):
        refuse_blank(value, column)
        return value
    if isinstance(value, Mapping):
        value = _of_lists(value, column) if any(isinstance(item, list) for item in _turn(value)) else [value]
    if not isinstance(value, list):
        raise Unusable(f"a {column!r} that is neither text nor chat messages")
    return [_message(message if isinstance(message, Mapping) else {}, column) for message in value]


def looks_like_messages(value: Any) -> bool:
    """Return whether a value is meant as chat messages, well-formed or not; it may be their text."""
    if isinstance(value, str):
        return _LOOKS_LIKE_MESSAGES.match(value) is not None
    first = value[0] if isinstance(value, list) and value else value
    return isinstance(first, Mapping) and ("role" in first or ("from" in first and "value" in first))


def without_answer(messages: Messages) -> Messages:
    """Return a conversation without the assistant's messages at its end."""
    end = len(messages)
    while end and messages[end - 1]["role"] == "assistant":
        end -= 1
    return messages[:end]


def value_or_json(value: Any, column: str) -> Any:
    """Return the value of a column that may be JSON text; None if it is empty.

    Raises:
        Unusable: the text is not JSON.
    """
    if isinstance(value, str):
        if not value.strip():
            return None
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise Unusable(f"a {column!r} that is text, but not JSON") from None
    return value or None


def _parsed(text: str, column: str) -> Any:
    """Return the messages that JSON's or Python's text stands for."""
    # NumPy's text has no comma between two dictionaries; a line break inside their texts is written as "\\n".
    with_commas = re.sub(r"\}\s*\n\s*\{", "}, {", text)
    for parse, content in ((json.loads, text), (ast.literal_eval, text), (ast.literal_eval, with_commas)):
        try:
            return parse(content)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            continue
    raise Unusable(
        f"a {column!r} that is the text of messages, but neither JSON nor Python: save the data as JSON lines"
    )


def _turn(message: Mapping[str, Any]) -> tuple[Any, Any]:
    """Return the role and the content of a message, which sharegpt calls "from" and "value"."""
    role = message.get("role") if message.get("role") is not None else message.get("from")
    return role, message.get("content") if message.get("content") is not None else message.get("value")


def _of_lists(value: Mapping[str, Any], column: str) -> list[dict[str, Any]]:
    """Return the messages of a dictionary with a list of roles, a list of contents, and perhaps more lists."""
    lists = {key: items for key, items in value.items() if items is not None}
    if not all(isinstance(items, list) for items in lists.values()) or len(set(map(len, lists.values()))) > 1:
        raise Unusable(f"a {column!r} that is a dictionary of lists, but not of equally long ones")
    return [dict(zip(lists, items, strict=True)) for items in zip(*lists.values(), strict=True)]


def _message(message: Mapping[str, Any], column: str) -> dict[str, Any]:
    role, content = _turn(message)
    calls = message.get("tool_calls") or None
    if calls is not None and not isinstance(calls, list):
        raise Unusable(f"a {column!r} with 'tool_calls' that are not a list")
    if not isinstance(role, str):
        raise Unusable(f"a {column!r} with a message without a 'role' and a 'content' text")
    if message.get("role") is None and role not in _KNOWN:
        raise Unusable(f"a {column!r} with a message from {role!r}, but should be one of {', '.join(sorted(_KNOWN))}")
    if isinstance(content, list):
        content = _text_of_parts(content, column)
    if role in _CALLS and isinstance(content, str):
        calls, content = _calls_of_text(content, column), None
    if not isinstance(content, str) and not (content is None and calls):
        raise Unusable(f"a {column!r} with a message without a 'role' and a 'content' text")
    others = {
        key: item
        for key, item in message.items()
        if item is not None and key not in ("role", "content", "from", "value", "tool_calls")
    }
    found = {"role": _ROLES.get(role, role), "content": content, **others}
    return found if calls is None else {**found, "tool_calls": [_call(call, column) for call in calls]}


def _text_of_parts(parts: list[Any], column: str) -> str:
    """Return the text of a message in parts. Raises Unusable if one of them is no text."""
    texts = []
    for part in parts:
        kind = part.get("type") if isinstance(part, Mapping) else None
        text = part.get("text") if isinstance(part, Mapping) else part
        if kind not in _TEXT_PARTS:
            raise Unusable(f"a {column!r} with a message that has {kind!r} in it, but only text is supported")
        if not isinstance(text, str):
            raise Unusable(f"a {column!r} with a message in parts without text")
        texts.append(text)
    return "".join(texts)


def _calls_of_text(text: str, column: str) -> list[Any]:
    """Return the calls of a sharegpt turn, whose value is the JSON text of one or several."""
    try:
        calls = json.loads(text)
    except (ValueError, RecursionError):
        raise Unusable(f"a {column!r} with a tool call that is not JSON") from None
    return calls if isinstance(calls, list) else [calls]


def _call(call: Any, column: str) -> dict[str, Any]:
    """Return a tool call as templates want it, with the arguments as a mapping and not as JSON text."""
    call = call if isinstance(call, Mapping) and "function" in call else {"type": "function", "function": call}
    function = call["function"]
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise Unusable(f"a {column!r} with a tool call without a function's name")
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments) if arguments.strip() else {}
        except (ValueError, RecursionError):
            raise Unusable(f"a {column!r} with a tool call whose arguments are not JSON") from None
    return {**call, "function": {**function, "arguments": arguments}}
