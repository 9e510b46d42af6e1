"""Verdicts -> a win-rate, with what it takes to trust it."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from hypo_train.judges.protocol import Comparison, Verdict
from hypo_train.metrics.standard_error import standard_error

_SCORES = {"win": 1.0, "tie": 0.5, "loss": 0.0}


def summary(comparisons: Sequence[Comparison], verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """Counts, the win-rate (a tie is one half) and its standard error, inconsistent verdicts, lengths in characters.

    All but ``failed`` are of the comparisons that have a verdict. None stands for what is not known of so few.
    """
    judged = [(c, v) for c, v in zip(comparisons, verdicts, strict=True) if v.outcome is not None]
    scores = [_SCORES[v.outcome] for _, v in judged if v.outcome is not None]
    found: dict[str, Any] = {name: sum(v.outcome == name for v in verdicts) for name in _SCORES}
    return found | {
        "failed": len(verdicts) - len(judged),
        "win_rate": statistics.fmean(scores) if scores else None,
        "win_rate_se": standard_error(scores, [c.row for c, _ in judged]),
        "inconsistent": sum(not v.consistent for _, v in judged) / len(judged) if judged else None,
        "length": statistics.fmean(len(c.completion.strip()) for c, _ in judged) if judged else None,
        "length_other": statistics.fmean(len(c.other.strip()) for c, _ in judged) if judged else None,
    }
