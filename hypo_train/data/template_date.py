"""The date that a chat template writes into prompts, as those of Llama 3.2 and gpt-oss do.

All prompts of a run have the date of the day it began: if it is resumed the next day, its rows are the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import date, datetime, time
from functools import wraps
from typing import Any

from transformers.utils import chat_template_utils

_DATE = "{{ strftime_now('%Y-%m-%d') }}"


def writes_date(tokenizer: Any) -> bool:
    """Return whether the tokenizer's chat template asks for the time."""
    return "strftime_now" in str(getattr(tokenizer, "chat_template", None))


def today() -> str:
    """Return the date (ISO) that chat templates see."""
    day: str = chat_template_utils.datetime.now().date().isoformat()
    return day


def fix_date(tokenizer: Any, day: str) -> None:
    """Let the tokenizer's chat template see the midnight with which ``day`` (ISO) begins, whenever it is used.

    Raises:
        RuntimeError: this version of transformers has its clock elsewhere.
    """
    original, moment = tokenizer.apply_chat_template, datetime.combine(date.fromisoformat(day), time())

    @wraps(original)
    def apply_chat_template(*args: Any, **options: Any) -> Any:
        with _clock_at(moment):
            return original(*args, **options)

    tokenizer.apply_chat_template = apply_chat_template
    message = {"role": "user", "content": ""}
    if (found := tokenizer.apply_chat_template([message], chat_template=_DATE, tokenize=False)) != day:
        raise RuntimeError(f"the date of chat templates stays {found} with this version of transformers, not {day}")


@contextmanager
def _clock_at(moment: datetime) -> Iterator[None]:
    """Stop the clock of transformers' chat templates in a block."""

    class Stopped(datetime):
        now: Callable[..., datetime] = staticmethod(lambda tz=None: moment)  # type: ignore[assignment]

    running = chat_template_utils.datetime
    chat_template_utils.datetime = Stopped  # type: ignore[misc]
    try:
        yield
    finally:
        chat_template_utils.datetime = running  # type: ignore[misc]
