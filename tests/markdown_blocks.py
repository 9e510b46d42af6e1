"""The code blocks and shell commands of README and the documentation."""

from __future__ import annotations

import functools
import re
import shlex
from dataclasses import dataclass

from stand_in import ROOT

PAGES = [
    "README.md",
    "CONTRIBUTING.md",
    "hypo_train/recipes/README.md",
    *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")),
]


@dataclass(frozen=True)
class Block:
    """A fenced block of a page: its language, its text, and the number of its first line."""

    page: str
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}, line {self.line}"


@functools.cache
def text_of(page: str) -> str:
    """Return the text of a page."""
    return (ROOT / page).read_text(encoding="utf-8")


@functools.cache
def blocks(language: str | None = None, page: str | None = None) -> list[Block]:
    """Return the fenced blocks of all pages, or of one page or language."""
    found = [block for name in ([page] if page else PAGES) for block in _blocks_of(name)]
    return [block for block in found if language in (None, block.language)]


def _blocks_of(page: str) -> list[Block]:
    text = text_of(page)
    fences = re.finditer(r"^( *)```(\w*)[^\n]*\n(.*?)^\1```$", text, flags=re.MULTILINE | re.DOTALL)
    return [Block(page, text[: match.start(3)].count("\n") + 1, match[2], match[3]) for match in fences]


def commands(page: str | None = None) -> list[list[str]]:
    """Return the commands of the bash blocks, each once, as words without comments and variables in front.

    A script (a block that begins with ``#!``) is no list of commands.
    """
    lines: list[tuple[str, ...]] = []
    for block in blocks("bash", page):
        if not block.text.startswith("#!"):
            joined = block.text.replace("\\\n", " ")
            lines += [_words(line) for line in joined.splitlines() if _words(line)]
    return [list(words) for words in dict.fromkeys(lines)]


def _words(line: str) -> tuple[str, ...]:
    words = shlex.split(line, comments=True)
    start = next((i for i, word in enumerate(words) if not re.match(r"\w+=", word)), len(words))
    return tuple(word.removeprefix(".venv/bin/") for word in words[start:])


def commands_that(start: str, page: str | None = None) -> list[list[str]]:
    """Return the rest of each command that begins with the words of ``start``."""
    words = start.split()
    return [line[len(words) :] for line in commands(page) if line[: len(words)] == words]


def flags(words: list[str]) -> list[str]:
    """Return the names of the flags among words, as ``--name``."""
    return [word.partition("=")[0] for word in words if word.startswith("--") and word != "--"]
