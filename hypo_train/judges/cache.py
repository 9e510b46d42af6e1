"""A file of the answers so far, so that a judging that was stopped pays for no answer twice.

Each answer is appended as one line when it arrives: ``{"key": ..., "text": ..., "prompt_tokens": ..., ...}``. The key
is a hash of the request and the address; the API key is no part of it, nor of the file.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Answer:
    """An endpoint's answer, and the tokens that it counts (None: it counts none)."""

    text: str
    prompt_tokens: int | None
    completion_tokens: int | None


class AnswerCache:
    """Answers by request; several threads may use one cache."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._answers: dict[str, Answer] = {}
        content = path.read_bytes() if path.exists() else b""
        for line in content.split(b"\n"):
            if record := _parse(line):
                key = record.pop("key")
                self._answers[key] = Answer(**record)
        self._torn = bool(content) and not content.endswith(b"\n")

    def get(self, request: Mapping[str, Any]) -> Answer | None:
        """Return the answer to an equal request, or None."""
        return self._answers.get(_key(request))

    def put(self, request: Mapping[str, Any], answer: Answer) -> None:
        """Keep an answer; a killed process does not lose it once this returns."""
        key = _key(request)
        line = json.dumps({"key": key, **asdict(answer)}) + "\n"
        with self._lock:
            self._answers[key] = answer
            with self._path.open("a", encoding="utf-8") as file:
                file.write("\n" + line if self._torn else line)  # begin a new line after a half-written one
            self._torn = False


def _parse(line: bytes) -> dict[str, Any] | None:
    """Return the record of a complete line; None for a torn one, whose request is sent again."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and set(record) == {"key", *Answer.__dataclass_fields__} else None


def _key(request: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()
