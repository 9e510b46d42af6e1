"""One entry of a table of other trainers' settings: its names, and what to write here instead."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

_OFF = (None, False, "none", "null", "no", "false", "", 0)


@dataclass(frozen=True)
class Advice:
    """An answer to settings of another trainer: what to write here. Names of ``Config`` are in backticks."""

    names: str  # separated by white space
    text: str
    is_served: bool = True  # False: a value that is not ``neutral`` would train something else
    neutral: tuple[Any, ...] = ()  # values, besides none and false, with which training is the same as here
    values: Mapping[str, str] = field(default_factory=dict)  # value -> the text for it

    def __iter__(self) -> Iterator[str]:
        return iter(self.names.split())

    def on(self, value: Any) -> str:
        """Return the advice for one value of the setting, as a message that ends in plain text."""
        return (self.values.get(key(value)) or self._on_other(value)).replace("`", "")

    def _on_other(self, value: Any) -> str:
        is_switch = not self.is_served or (" for true" in self.text and " for false" not in self.text)
        if value is None or (is_switch and _is_among(value, (*_OFF, *self.neutral))):
            return "with this value nothing is different here, leave it out"
        return self.text


def use(names: str, text: str, **values: str) -> Advice:
    """Return the entry of settings that have a counterpart here."""
    return Advice(names, f"{'set' if text.startswith('`use_') else 'use'} {text}", values=values)


def unneeded(names: str, why: str) -> Advice:
    """Return the entry of settings without which training is the same."""
    return Advice(names, f"{why}, leave it out")


def not_served(names: str, what: str, do: str = "leave it out", neutral: tuple[Any, ...] = (), **values: str) -> Advice:
    """Return the entry of settings that have no counterpart, and would change what is trained."""
    return Advice(names, f"{what} not served, {do}", is_served=False, neutral=neutral, values=values)


def key(value: Any) -> str:
    """Return a value as YAML and a command line write it; that of a list with one item is the item's."""
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    is_huge = isinstance(value, int) and abs(value) >= 2**63  # Python refuses to write thousands of digits
    return "" if is_huge else str(value).lower()


def _is_among(value: Any, values: tuple[Any, ...]) -> bool:
    return value in ([], {}) or key(value) in map(key, values)
