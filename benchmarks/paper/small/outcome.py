"""Evaluate a trained arm: its samples, judged by the world's true reward and by the learned one."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.paper.small.stages import REFERENCES, REWARD_MODEL
from hypo_train.judges.samples import read_comparisons
from hypo_train.judges.scores import FunctionJudge, RewardModelJudge
from hypo_train.judges.verdicts import Comparison, summary
from hypo_train.metrics.log import read_metrics

TRUE_REWARD = "hypo_train.demo.world:reward"


@dataclass(frozen=True)
class Evaluation:
    """The evaluation on held-out prompts after ``epoch`` epochs."""

    epoch: float
    kl: float  # reverse KL to the language model, in nats per response
    reward: float  # the true reward
    win_rate: float  # against a reviewer's text, by the true reward; a tie is half a win


@dataclass(frozen=True)
class Outcome:
    """The outcome of one arm and one seed."""

    evaluations: list[Evaluation]  # the first one is the language model's
    learned: tuple[float, float]  # at the start and the end, minus the mean of the reviewers' texts
    flops: float  # model FLOPs of a training step

    @property
    def first(self) -> Evaluation:
        return self.evaluations[0]

    @property
    def last(self) -> Evaluation:
        return self.evaluations[-1]


def read_outcomes(folder: Path, names: Sequence[str]) -> list[Outcome]:
    """Read the outcomes of the finished runs ``names`` in a seed's ``folder``."""
    samples = {name: _comparisons(folder, name) for name in names}
    ends = [comparisons[place] for comparisons in samples.values() for place in (0, -1)]
    learned = _learned_rewards(folder, ends)
    return [
        Outcome(_evaluations(folder / name, samples[name]), (learned[2 * i], learned[2 * i + 1]), _flops(folder / name))
        for i, name in enumerate(names)
    ]


def _comparisons(folder: Path, name: str) -> list[list[Comparison]]:
    """Return the samples of each evaluation of a run, paired with the reviewers' texts."""
    steps = [line["step"] for line in read_metrics(folder / name / "metrics.jsonl") if "eval_kl" in line]
    paths = [folder / name / "samples" / f"step-{step}.jsonl" for step in steps]
    return [read_comparisons(path, folder / REFERENCES, limit=None) for path in paths]


def _evaluations(run: Path, samples: Sequence[Sequence[Comparison]]) -> list[Evaluation]:
    lines = read_metrics(run / "metrics.jsonl")
    last = next(line for line in reversed(lines) if "epoch" in line)
    judge = FunctionJudge(TRUE_REWARD)
    found = []
    for line, comparisons in zip((line for line in lines if "eval_kl" in line), samples, strict=True):
        verdicts = judge.judge(comparisons)
        reward = statistics.fmean(verdict.details["score"] for verdict in verdicts)
        epoch = line["step"] / last["step"] * last["epoch"]
        found.append(Evaluation(epoch, line["eval_kl"], reward, summary(comparisons, verdicts)["win_rate"]))
    return found


def _learned_rewards(folder: Path, samples: Sequence[Sequence[Comparison]]) -> list[float]:
    """Return the mean learned reward of each of ``samples``, minus that of the reviewers' texts."""
    judge = RewardModelJudge(str(folder / REWARD_MODEL / "final"), batch_size=128)
    verdicts = iter(judge.judge([comparison for comparisons in samples for comparison in comparisons]))
    means = []
    for comparisons in samples:
        details = [next(verdicts).details for _ in comparisons]
        means.append(statistics.fmean(d["score"] - d["score_other"] for d in details))
    return means


def _flops(run: Path) -> float:
    """Return the mean FLOPs of a training step."""
    lines = [line for line in read_metrics(run / "metrics.jsonl") if "epoch" in line]
    return statistics.fmean(sum(value for name, value in line.items() if name.startswith("flops/")) for line in lines)
