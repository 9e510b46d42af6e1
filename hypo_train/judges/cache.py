"""Answers that were paid for, kept on disk, so that judging can go on where it was stopped.

A line an answer, appended when it comes in: ``{"key": ..., "text": ..., "prompt_tokens": ..., ...}``. The key is a
hash of all that was asked and of whom; the API key is no part of it, nor of the file.
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
    """What an endpoint said, and the tokens that it counts for it (None: it says nothing of them)."""

    text: str
    prompt_tokens: int | None
    completion_tokens: int | None


class AnswerCache:
    """Answers by what was asked; for several threads."""

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
        """The answer to an equal request."""
        return self._answers.get(_key(request))

    def put(self, request: Mapping[str, Any], answer: Answer) -> None:
        """Keep an answer; it is on the disk when this returns, as far as a killed process goes."""
        key = _key(request)
        line = json.dumps({"key": key, **asdict(answer)}) + "\n"
        with self._lock:
            self._answers[key] = answer
            with self._path.open("a", encoding="utf-8") as file:
                file.write("\n" + line if self._torn else line)  # after what a killed run left half-written
            self._torn = False


def _parse(line: bytes) -> dict[str, Any] | None:
    """A whole line's record; None for one that is torn, which is asked again."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and set(record) == {"key", *Answer.__dataclass_fields__} else None


def _key(request: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()
