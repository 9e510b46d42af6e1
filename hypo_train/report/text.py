"""Format texts of a report: readable numbers, and untrusted text without invisible characters."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

from markupsafe import Markup, escape

# Control characters, lone surrogates, and characters that change the text direction. Line feed, tab, and the joiners of
# emoji and Indic scripts are allowed.
_INVISIBLE = re.compile(
    "[\\x00-\\x08\\x0b-\\x1f\\x7f-\\x9f\\u2028\\u2029\\u202a-\\u202e\\u2066-\\u2069\\ud800-\\udfff\\ufeff\\ufffe\\uffff]"
)
_SUFFIXES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k"))


def visible(value: Any) -> Markup:
    """Return ``value`` as escaped HTML, with the code points of invisible characters; Markup is unchanged.

    The template applies this to every expression. The spans contain no quotes, so they cannot end an attribute.
    """
    if isinstance(value, Markup):
        return value
    return Markup(_INVISIBLE.sub(lambda found: f"<span class=code-point>U+{ord(found[0]):04X}</span>", escape(value)))


def plain(value: Any) -> str:
    """Return ``value`` as text with U+FFFD for invisible characters: for attributes, titles and JSON."""
    return _INVISIBLE.sub("\ufffd", str(value))


def short(value: float) -> str:
    """Return a number with at most four significant digits: 0.6931, 12.5, 98.8k, 1e-06."""
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else ("∞" if value > 0 else "-∞")
    for size, suffix in _SUFFIXES:
        if abs(value) >= size:
            scale = 1e3 if suffix == "k" else size
            return f"{value / scale:.4g}{suffix}"
    return "0" if abs(value) < 1e-300 else f"{value:.4g}"


def with_error(value: float, error: float | None) -> str:
    """Return ``12.35 ± 0.41``: the standard error with two digits, the value with as many decimals."""
    if error is None or not math.isfinite(error) or not math.isfinite(value) or error == 0:
        return short(value)
    places = min(max(0, 1 - math.floor(math.log10(error))), 8)
    return f"{value:.{places}f} ± {error:.{places}f}"


def duration(seconds: float) -> str:
    """Return a time as ``3 d 4 h``, ``2 h 05 min``, ``1 min 05 s`` or ``41.0 s``."""
    rounded = round(seconds)
    days, hours, minutes = rounded // 86400, rounded // 3600 % 24, rounded // 60 % 60
    if days:
        return f"{days} d {hours} h"
    if hours:
        return f"{hours} h {minutes:02} min"
    return f"{minutes} min {rounded % 60:02} s" if minutes else f"{seconds:.1f} s"


def first_of(numbers: Sequence[int]) -> str:
    """Return the first five numbers as text, and "…" if there are more."""
    return ", ".join(map(str, numbers[:5])) + (" …" if len(numbers) > 5 else "")
