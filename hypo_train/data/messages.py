"""Chat messages in the forms that data sets store them in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

from hypo_train.data.errors import Unusable, refuse_blank

Messages: TypeAlias = list[dict[str, Any]]


def text_or_messages(value: Any, column: str) -> str | Messages:
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
