"""Comparisons, a judge's verdicts on them, and the win-rate that these give."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from hypo_train.metrics.standard_error import standard_error

Outcome = Literal["win", "tie", "loss"]
_SCORES = {"win": 1.0, "tie": 0.5, "loss": 0.0}


class JudgeError(ValueError):
    """Samples that cannot be judged, or a judge that cannot be asked; the message says what to do."""


@dataclass(frozen=True)
class Comparison:
    """A sample and the response that it is compared with, as texts."""

    row: int  # index in the data's split
    sample: int  # which of the row's samples, from 0
    prompt: str
    completion: str
    other: str
    ended: bool = True  # whether the completion has its EOS
    other_ended: bool = True


@dataclass(frozen=True)
class Verdict:
    """A judge's verdict on one comparison."""

    outcome: Outcome | None  # for the completion; None: the judge failed, see ``details``
    consistent: bool = True  # False: the other order gave another verdict, which makes it a tie
    details: dict[str, Any] = field(default_factory=dict)  # scores or answers; "error" where there is no outcome


class PairwiseJudge(Protocol):
    """Anything that can say which of two responses to a prompt is better."""

    def judge(self, comparisons: Sequence[Comparison]) -> list[Verdict]:
        """Return a verdict on each comparison. Raises JudgeError where the judge cannot be asked at all."""

    def conditions(self) -> dict[str, Any]:
        """Return who judges, and how: verdicts under other conditions cannot be compared with these."""


def summary(comparisons: Sequence[Comparison], verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """Return counts, the win-rate (a tie is one half) and its standard error, inconsistent verdicts, mean characters.

    All but ``failed`` count only comparisons that have a verdict. None stands for a value that needs more of them.
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
