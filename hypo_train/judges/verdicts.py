"""Comparisons, verdicts on them, and their win-rate."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from hypo_train.metrics.standard_error import standard_error

Outcome = Literal["win", "tie", "loss"]
_SCORES = {"win": 1.0, "tie": 0.5, "loss": 0.0}


class JudgeError(ValueError):
    """Samples cannot be judged, or the judge cannot be used; the message says what to do."""


@dataclass(frozen=True)
class Comparison:
    """A sample and the response that it is compared with, as texts."""

    row: int  # index in the data's split
    sample: int  # number of the sample among those of its row, from 0
    prompt: str
    completion: str
    other: str
    ended: bool = True  # whether the completion has its EOS
    other_ended: bool = True


@dataclass(frozen=True)
class Verdict:
    """A judge's verdict on one comparison."""

    outcome: Outcome | None  # of the completion; None: the judge failed, see ``details``
    consistent: bool = True  # False: the two orders gave different verdicts, so it is a tie
    details: dict[str, Any] = field(default_factory=dict)  # scores or answers; "error" if there is no outcome


class PairwiseJudge(Protocol):
    """The interface of a judge, which chooses the better of two responses to a prompt."""

    def judge(self, comparisons: Sequence[Comparison]) -> list[Verdict]:
        """Return a verdict on each comparison. Raises JudgeError if the judge cannot be used at all."""

    def conditions(self) -> dict[str, Any]:
        """Return the judge and its settings. Only verdicts under equal conditions are comparable."""


def summary(comparisons: Sequence[Comparison], verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """Return counts, the win-rate (a tie is one half) with its standard error, and mean lengths in characters.

    All but ``failed`` count only comparisons with a verdict. A value is None if there are too few of them.
    """
    judged = [(c, v) for c, v in zip(comparisons, verdicts, strict=True) if v.outcome is not None]
    scores = [_SCORES[v.outcome] for _, v in judged if v.outcome is not None]
    counts: dict[str, Any] = {name: sum(v.outcome == name for v in verdicts) for name in _SCORES}
    return counts | {
        "failed": len(verdicts) - len(judged),
        "win_rate": statistics.fmean(scores) if scores else None,
        "win_rate_se": standard_error(scores, [c.row for c, _ in judged]),
        "inconsistent": sum(not v.consistent for _, v in judged) / len(judged) if judged else None,
        "length": statistics.fmean(len(c.completion.strip()) for c, _ in judged) if judged else None,
        "length_other": statistics.fmean(len(c.other.strip()) for c, _ in judged) if judged else None,
    }
