"""The problems, warnings and facts that preflight finds, and the page that shows them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from hypo_train.config import Config
from hypo_train.utils.errors import is_users_mistake


class PreflightError(ValueError):
    """Several reasons why a run cannot start, one on each line."""


@dataclass
class Findings:
    """Problems, warnings and facts about a run."""

    config: Config
    problems: list[ValueError] = field(default_factory=list)  # a run with one of them is refused
    warnings: list[str] = field(default_factory=list)
    unchecked: list[str] = field(default_factory=list)
    model: list[str] = field(default_factory=list)
    steps: list[str] = field(default_factory=list)
    data: dict[str, list[str]] = field(default_factory=dict)  # by split
    memory: list[str] = field(default_factory=list)
    time: list[str] = field(default_factory=list)
    disk: list[str] = field(default_factory=list)

    @contextmanager
    def collected(self) -> Iterator[None]:
        """Collect a mistake of the user as a problem, so that later checks still run."""
        try:
            yield
        except ValueError as error:
            if not is_users_mistake(error):
                raise
            self.problems.append(error)

    def refuse(self) -> None:
        """Raise the problem, or a PreflightError if there are several; do nothing if there is none."""
        if len(self.problems) == 1:
            raise self.problems[0]
        if self.problems:
            raise PreflightError("\n  ".join([f"{len(self.problems)} problems:", *map(str, self.problems)]))

    def page(self) -> list[str]:
        """Return the lines of the page."""
        parts = {
            "warnings": [*self.warnings, *self.config.warnings()],
            "model": self.model,
            "steps": self.steps,
            "data": [f"{split}: {line}" for split, lines in self.data.items() for line in lines],
            "memory": self.memory,
            "time": self.time,
            "disk": self.disk,
            "not checked": self.unchecked,
        }
        lines = []
        for title, part in parts.items():
            if part:
                lines += ["", title, *(f"  {line}" for line in part)]
        return lines[1:]
