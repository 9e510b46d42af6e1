"""Check and expand the paths in settings: no shell does it for the values in a file."""

from __future__ import annotations

import os
import re


def usable_path(text: str) -> str:
    """Return a path or a Hub name with a leading ``~`` replaced by the home folder.

    Raises:
        ValueError: the path has white space at an end, a line break, an environment variable, or no home folder.
    """
    if text != text.strip():
        raise ValueError("should be a path without white space before or after it")
    if "\n" in text or "\r" in text:
        raise ValueError("should be a path on one line")
    if (variable := re.search(r"\$(\w+|\{\w+\})", text)) and not os.path.exists(text):
        raise ValueError(
            f"should be a path without {variable[0]}: variables are not replaced here, write its value or ~"
        )
    expanded = os.path.expanduser(text)
    if text.startswith("~") and expanded == text and not os.path.exists(text):
        raise ValueError("should be a path in full: there is no such home folder (./~ names a folder that is called ~)")
    return expanded
