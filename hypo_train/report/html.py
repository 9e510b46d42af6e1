"""HTML in which nothing but our own markup is markup: every other text is escaped where it enters an element."""

from __future__ import annotations

import html
import json
import re
from base64 import b64encode
from collections.abc import Iterable
from hashlib import sha256
from typing import Any

# Shown by their number: controls, what UTF-8 cannot hold, and what turns the direction of the text behind it. The
# joiners of emoji and of Indic scripts stay. Line feed and tab do too, and nothing else that breaks lines.
_INVISIBLE = re.compile(
    "[\\x00-\\x08\\x0b-\\x1f\\x7f-\\x9f\\u2028\\u2029\\u202a-\\u202e\\u2066-\\u2069\\ud800-\\udfff\\ufeff\\ufffe\\uffff]"
)
_VOID = {"br", "link", "meta"}


class Html(str):
    """Markup that is ready to be written as it is."""


def element(tag: str, *children: Any, **attributes: Any) -> Html:
    """``<tag attributes>children</tag>``; what is not ``Html`` is text.

    A name's trailing underscore is dropped and the others become hyphens; a value of None or False leaves the attribute
    out, True leaves its value out.
    """
    written = "".join(_attribute(name, value) for name, value in attributes.items() if value not in (None, False))
    if tag in _VOID:
        return Html(f"<{tag}{written}>")
    return Html(f"<{tag}{written}>{join(children)}</{tag}>")


def join(parts: Iterable[Any]) -> Html:
    """Markup and texts, one after the other; None is nothing."""
    return Html("".join(part if isinstance(part, Html) else text(part) for part in parts if part is not None))


def text(value: Any) -> Html:
    """A text whose every character is seen: what is invisible is shown by its number."""
    return Html(_INVISIBLE.sub(_code_point, html.escape(str(value))))


def foreign(value: Any, tag: str = "bdi", **attributes: Any) -> Html:
    """A text of somebody else's (data, samples, paths), whose direction ends with it."""
    return element(tag, value, dir="auto", **attributes)


def data(name: str, value: Any) -> Html:
    """JSON for a page's script, in an element with this id; nothing in it can end the element."""
    written = json.dumps(value, allow_nan=False).replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
    return Html(f'<script type="application/json" id="{name}">{written}</script>')


def document(title: str, body: Html, *, style: str, script: str) -> str:
    """A whole page. Its policy runs ``script`` alone, whatever the body says, and loads nothing from anywhere."""
    policy = (
        f"default-src 'none'; style-src '{_digest(style)}'; script-src '{_digest(script)}'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )
    head = [
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=policy),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("meta", name="generator", content=GENERATOR),
        element("meta", name="referrer", content="no-referrer"),
        element("link", rel="icon", href="data:,"),
        Html(f"<title>{html.escape(_INVISIBLE.sub(_REPLACEMENT, title))}</title>"),
        Html(f"<style>{style}</style>"),
    ]
    opening = ["<!DOCTYPE html>", '<html lang="en">', "<head>", *head, "</head>", "<body>"]
    return "\n".join([*opening, body, f"<script>{script}</script>", "</body>", "</html>", ""])


GENERATOR = "hypo_train report"
_REPLACEMENT = "\ufffd"


def _attribute(name: str, value: Any) -> str:
    name = name.rstrip("_").replace("_", "-")
    if value is True:
        return f" {name}"
    return f' {name}="{html.escape(_INVISIBLE.sub(_REPLACEMENT, str(value)))}"'


def _code_point(found: re.Match[str]) -> str:
    return f'<span class="code-point">U+{ord(found[0]):04X}</span>'


def _digest(content: str) -> str:
    return f"sha256-{b64encode(sha256(content.encode()).digest()).decode()}"
