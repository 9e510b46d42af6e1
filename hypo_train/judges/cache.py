"""A cache file of answers, so that a judging that is stopped and started again does not pay twice.

Each answer is appended as one line when it arrives: ``{"key": ..., "text": ..., "prompt_tokens": ..., ...}``. The key
is a hash of the request and the address. The API key is neither in the hash nor in the file.
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
    """An endpoint's answer, and its token counts (None if the endpoint sends none)."""

    text: str
    prompt_tokens: int | None
    completion_tokens: int | None


class AnswerCache:
    """Cached answers by request. Thread-safe."""

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
        """Return the cached answer to ``request``, or None."""
        return self._answers.get(_key(request))

    def put(self, request: Mapping[str, Any], answer: Answer) -> None:
        """Store an answer in memory and in the file."""
        key = _key(request)
        line = json.dumps({"key": key, **asdict(answer)}) + "\n"
        with self._lock:
            self._answers[key] = answer
            with self._path.open("a", encoding="utf-8") as file:
                file.write("\n" + line if self._torn else line)  # start a new line after an incomplete one
            self._torn = False


def _parse(line: bytes) -> dict[str, Any] | None:
    """Return the record of a line, or None if it is incomplete; then its request is sent again."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and set(record) == {"key", *Answer.__dataclass_fields__} else None


def _key(request: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()
