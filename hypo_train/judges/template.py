"""The question to a chat model, and the verdict in its answer.

``tldr`` is the wording of GPT-4 judging in the summarisation code that the paper's experiments descend from
(vwxyzjn/summarize_from_feedback_details, REBEL), ``tldr-concise`` that of the DPO paper (its "GPT-4 (C)").
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from hypo_train.utils.errors import ConfigError

FOLDER = Path(__file__).parent / "templates"
PLACEHOLDERS = ("prompt", "response0", "response1")  # as TRL's judges name them
_PLACEHOLDER = re.compile(r"\{(\w+)\}")
# "Preferred: A" on its own line, with any quotes, brackets and stars.
_PREFERRED = re.compile(r"^\W*(?i:preferred)\W+(?:(?i:summary|response)\W+)?([AB])\W*$", re.MULTILINE)


@dataclass(frozen=True)
class Template:
    """A message with placeholders for a prompt and two responses."""

    name: str
    text: str

    def message(self, prompt: str, response0: str, response1: str) -> str:
        """Return the message for these texts, stripped of surrounding white space. A is ``response0``."""
        texts = {"prompt": prompt.strip(), "response0": response0.strip(), "response1": response1.strip()}
        # One pass, so that a placeholder inside a text is not replaced.
        return _PLACEHOLDER.sub(lambda match: texts[match[1]], self.text)


def load_template(name: str) -> Template:
    """Return the built-in template called ``name``, or the template in the file ``name``.

    Raises:
        ConfigError: the template is missing, or its placeholders are wrong.
    """
    path = FOLDER / f"{name}.txt"
    if not path.is_file():
        path = Path(name)
    try:
        text = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        names = ", ".join(sorted(file.stem for file in FOLDER.glob("*.txt")))
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"judge_template={name!r}: {reason} (a file, or one of {names})") from None
    used = set(_PLACEHOLDER.findall(text))
    listed = ", ".join(f"{{{placeholder}}}" for placeholder in PLACEHOLDERS)
    for wrong, problem in ((set(PLACEHOLDERS) - used, "lacks"), (used - set(PLACEHOLDERS), "has an unknown")):
        if wrong:
            raise ConfigError(f"judge_template={name!r} {problem} {{{min(wrong)}}}: the placeholders are {listed}")
    return Template(name, text)


def preferred(answer: str) -> Literal["A", "B"] | None:
    """Return the letter that the answer prefers, or None if it names none or both."""
    letters = set(_PREFERRED.findall(answer))
    return letters.pop() if len(letters) == 1 else None
