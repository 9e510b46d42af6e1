"""What is known of a run before it starts, and the page that says so."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from hypo_train.config import Config
from hypo_train.utils.errors import is_users_mistake


class PreflightError(ValueError):
    """Several reasons why a run cannot start, one a line."""


@dataclass
class Findings:
    """What the checks have found out."""

    config: Config
    problems: list[ValueError] = field(default_factory=list)  # a run is refused for them
    warnings: list[str] = field(default_factory=list)
    unchecked: list[str] = field(default_factory=list)
    model: list[str] = field(default_factory=list)
    steps: list[str] = field(default_factory=list)
    data: dict[str, list[str]] = field(default_factory=dict)  # of each split
    memory: list[str] = field(default_factory=list)
    time: list[str] = field(default_factory=list)
    disk: list[str] = field(default_factory=list)

    @contextmanager
    def collected(self) -> Iterator[None]:
        """A mistake of the user's becomes a problem, and the checks go on."""
        try:
            yield
        except ValueError as error:
            if not is_users_mistake(error):
                raise
            self.problems.append(error)

    def refuse(self) -> None:
        """Raise the problem there is; PreflightError where there are several."""
        if len(self.problems) == 1:
            raise self.problems[0]
        if self.problems:
            raise PreflightError("\n  ".join([f"{len(self.problems)} problems:", *map(str, self.problems)]))

    def page(self) -> list[str]:
        """Its lines."""
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
