"""Judges that score each response: the higher score wins, equal scores tie."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from accelerate import Accelerator

from hypo_train.config import Config
from hypo_train.judges.verdicts import Comparison, Outcome, Verdict
from hypo_train.model.source import load_text_tokenizer
from hypo_train.rewards import Reward, RewardFunction, finite_score, load_function, load_reward


class FunctionJudge:
    """A judge that scores with a Python function of (prompt, completion), named as package.module:function."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.function: RewardFunction = load_function(path, "judge")

    def judge(self, comparisons: Sequence[Comparison]) -> list[Verdict]:
        """Return a verdict on each comparison. Raises RewardError if a score is not a finite number."""
        return [_higher(self._score(c.prompt, c.completion), self._score(c.prompt, c.other)) for c in comparisons]

    def conditions(self) -> dict[str, Any]:
        return {"judge": self.path}

    def _score(self, prompt: str, completion: str) -> float:
        return finite_score(f"judge={self.path!r}", self.function(prompt, completion), completion)


class RewardModelJudge:
    """A judge that scores with a sequence classifier of one label. Texts that ended get an EOS of its tokenizer."""

    def __init__(self, path: str, *, batch_size: int) -> None:
        self.path = path
        self.batch_size = batch_size

    def judge(self, comparisons: Sequence[Comparison]) -> list[Verdict]:
        """Return a verdict on each comparison. Raises ModelError if the reward model does not exist."""
        config = self._config()
        tokenizer = load_text_tokenizer(config, self.path, "judge_model")
        prompts = tokenizer([c.prompt for c in comparisons]).input_ids
        eos = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]

        def ids(texts: list[str], ended: list[bool]) -> list[list[int]]:
            rows = tokenizer(texts, add_special_tokens=False).input_ids
            # An empty text becomes an EOS, because a sequence needs at least one token.
            return [row + eos * (end or not row) for row, end in zip(rows, ended, strict=True)]

        sides = [
            ids([c.completion for c in comparisons], [c.ended for c in comparisons]),
            ids([c.other for c in comparisons], [c.other_ended for c in comparisons]),
        ]
        reward = self._reward(config, tokenizer, eos, prompts, [*sides[0], *sides[1]])
        scores = [reward(prompts, side).tolist() for side in sides]
        return [_higher(score, other) for score, other in zip(*scores, strict=True)]

    def conditions(self) -> dict[str, Any]:
        return {"judge": self.path}

    def _config(self, **changes: Any) -> Config:
        """Return a configuration with the settings that loading a reward model reads."""
        return Config(
            model_name_or_path=self.path,
            reward_model_path=self.path,
            dataset_name="samples",
            per_device_eval_batch_size=self.batch_size,
            **changes,
        )

    def _reward(
        self, config: Config, tokenizer: Any, eos: list[int], prompts: list[list[int]], completions: list[list[int]]
    ) -> Reward:
        longest = {
            "max_prompt_length": max(map(len, prompts)),
            "max_completion_length": max(2, *map(len, completions)),
        }
        reward, _ = load_reward(self._config(**longest), None, tokenizer, eos, Accelerator(mixed_precision="no"))
        assert reward is not None
        return reward


def _higher(score: float, other: float) -> Verdict:
    outcome: Outcome = "tie" if score == other else "win" if score > other else "loss"
    return Verdict(outcome, details={"score": score, "score_other": other})
