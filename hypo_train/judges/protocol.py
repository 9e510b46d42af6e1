"""What a judge takes and gives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

Outcome = Literal["win", "tie", "loss"]


class JudgeError(ValueError):
    """Samples that cannot be judged, or a judge that cannot be asked; the message says what to do."""


@dataclass(frozen=True)
class Comparison:
    """A sample and what it is held against, as texts."""

    row: int  # index in the data's split
    sample: int  # which of the row's samples, from 0
    prompt: str
    completion: str
    other: str
    ended: bool = True  # whether the completion came to its EOS
    other_ended: bool = True


@dataclass(frozen=True)
class Verdict:
    """What a judge says of one comparison."""

    outcome: Outcome | None  # of the completion; None: the judge could not tell, see ``details``
    consistent: bool = True  # False: the other order gave another verdict, which makes it a tie
    details: dict[str, Any] = field(default_factory=dict)  # scores or answers; "error" where there is no outcome


class PairwiseJudge(Protocol):
    """Anything that can say which of two responses to a prompt is better."""

    def judge(self, comparisons: Sequence[Comparison]) -> list[Verdict]:
        """A verdict on each. Raises JudgeError where the judge cannot be asked at all."""

    def conditions(self) -> dict[str, Any]:
        """Who judges, and how: verdicts under other conditions cannot be compared with these."""
