"""What a trained arm is worth: read from what its run wrote, judged by the world's true reward and the learned one."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from hypo_train.demo import world
from hypo_train.log import read_metrics

Sample = dict[str, Any]


@dataclass(frozen=True)
class Evaluation:
    """The held-out prompts after so many epochs."""

    epoch: float
    kl: float  # reverse, to the language model, nats a response
    reward: float  # the true one
    win_rate: float  # against what a reviewer wrote, by the true reward; a tie is half a win
    score: float  # the learned reward, less its mean on what reviewers wrote


@dataclass(frozen=True)
class Outcome:
    """One arm, one seed."""

    evaluations: list[Evaluation]  # the first is the language model's own
    flops: float  # model FLOPs of a training step

    @property
    def first(self) -> Evaluation:
        return self.evaluations[0]

    @property
    def last(self) -> Evaluation:
        return self.evaluations[-1]


class Judge:
    """Both rewards of a seed's samples, the language model's and all arms'."""

    def __init__(self, references: Path, reward_model: Path) -> None:
        self._tokenizer = AutoTokenizer.from_pretrained(reward_model)
        self._model = AutoModelForSequenceClassification.from_pretrained(reward_model).eval()
        reviews = _read(references)
        self._references = {review["row"]: review["reward"] for review in reviews}
        self._baseline = statistics.fmean(self._scores([{**review, "ended": True} for review in reviews]))

    def evaluate(self, epoch: float, kl: float, samples: Sequence[Sample]) -> Evaluation:
        rewards = [world.reward(sample["prompt"], sample["completion"]) for sample in samples]
        wins = [_win(reward, self._references[s["row"]]) for reward, s in zip(rewards, samples, strict=True)]
        score = statistics.fmean(self._scores(samples)) - self._baseline
        return Evaluation(epoch, kl, statistics.fmean(rewards), statistics.fmean(wins), score)

    @torch.no_grad()
    def _scores(self, samples: Sequence[Sample]) -> list[float]:
        """The reward model's, of prompt and completion with the EOS that a sample ended with."""
        eos = [self._tokenizer.eos_token_id]
        ids = [
            self._tokenizer(f"{s['prompt']} {s['completion']}".strip()).input_ids + eos * bool(s["ended"])
            for s in samples
        ]
        batch = self._tokenizer.pad({"input_ids": ids}, padding_side="right", return_tensors="pt")
        return list(self._model(**batch).logits[:, 0].tolist())


def read_outcome(run: Path, judge: Judge) -> Outcome:
    """Of a finished ``run``."""
    lines = read_metrics(run / "metrics.jsonl")
    trained = [line for line in lines if "epoch" in line]
    steps_per_epoch = trained[-1]["step"] / trained[-1]["epoch"]
    evaluations = []
    for line in lines:
        if "eval_kl" in line:
            samples = _read(run / "samples" / f"step-{line['step']}.jsonl")
            evaluations.append(judge.evaluate(line["step"] / steps_per_epoch, line["eval_kl"], samples))
    flops = [sum(value for name, value in line.items() if name.startswith("flops/")) for line in trained]
    return Outcome(evaluations, statistics.fmean(flops))


def _win(reward: float, reference: float) -> float:
    return 0.5 if reward == reference else float(reward > reference)


def _read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
