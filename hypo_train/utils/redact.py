"""Settings as they may be shown to others: credentials that somebody wrote into an address are left out."""

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
    """``value`` with ``***`` for passwords in addresses, tokens in their queries, and keys known by their form."""
    if isinstance(value, str):
        for pattern, shown in _SECRETS:
            value = pattern.sub(shown, value)
        return value
    if isinstance(value, (list, tuple)):
        return [redacted(item) for item in value]
    if isinstance(value, dict):
        return {redacted(name): redacted(item) for name, item in value.items()}
    return value
