"""Remove credentials from settings that others may see."""

from __future__ import annotations

import re
from typing import Any

_NAMES = "token|key|secret|password|passwd|signature|sig|credential"
_SECRETS = (
    (re.compile(r"(?<=://)[^/\s@]+(?=@)"), "***"),  # https://user:password@host
    (re.compile(rf"(?i)(?<=[?&;])([\w.-]*(?:{_NAMES})[\w.-]*=)[^&\s#]+"), r"\1***"),  # ?token=...
    (re.compile(r"\b(?:hf|ghp|gho|github_pat|glpat|xox[a-z])[_-][\w-]{16,}"), "***"),
    (re.compile(r"\bsk-[\w-]{16,}|\bAKIA[0-9A-Z]{16}\b"), "***"),
)


def redacted(value: Any) -> Any:
    """Return ``value`` with ``***`` for passwords in URLs, tokens in their queries and API keys of known forms.

    Lists, tuples and dicts are redacted recursively; a tuple becomes a list.
    """
    if isinstance(value, str):
        for pattern, replacement in _SECRETS:
            value = pattern.sub(replacement, value)
        return value
    if isinstance(value, (list, tuple)):
        return [redacted(item) for item in value]
    if isinstance(value, dict):
        return {redacted(name): redacted(item) for name, item in value.items()}
    return value
