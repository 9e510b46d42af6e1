"""Rollouts ahead: one draw of samples serves the optimizer steps that follow it.

Decoding reads all weights for every token it makes, whatever the number of sequences: n times the prompts in one
draw cost far less than n draws. But the second step of a window and those after it learn from samples of an
earlier policy, so each sample keeps its tokens' log-probs under the policy that drew it, for the loss's
``behavior_logps``. And a window cannot be drawn again once the weights have moved: what is left of it is part
of a checkpoint.

    steps           0  1  2 | 3  4  5 | 6 ...      num_steps = 3
    draws           0         3         6
    optimizer steps between a draw and its use
                    0  1  2   0  1  2   0
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from hypo_train.sampling import PromptKV, Sampler
from hypo_train.trees.tree import Tree
from hypo_train.utils.rank_share import SINGLE_PROCESS, RankShare


@dataclass(frozen=True)
class StepSamples:
    """The completions of a step's prompts, ``num_generations`` consecutive ones a prompt."""

    completions: list[list[int]]  # token ids, EOS included
    num_generations: int
    logps: Tensor | None  # fp32 (their tokens,), one completion after the other, under the policy that drew them;
    # None where the step itself drew them: there is nothing to correct

    def of_prompts(self, start: int, stop: int) -> StepSamples:
        """Those of a micro-batch: prompts ``start`` to ``stop`` of the step."""
        first, last = start * self.num_generations, stop * self.num_generations
        completions = self.completions[first:last]
        if self.logps is None:
            return StepSamples(completions, self.num_generations, None)
        before = _num_tokens(self.completions[:first])
        return StepSamples(completions, self.num_generations, self.logps[before : before + _num_tokens(completions)])

    def behavior_logps(self, tree: Tree) -> Tensor | None:
        """For the targets (T,) of the ``tree`` whose last sequences are these completions; 0 for what comes before."""
        if self.logps is None:
            return None
        others = len(tree.targets) - len(self.logps)
        logps = self.logps.to(tree.rows.device, non_blocking=True)
        return torch.cat([logps.new_zeros(others), logps])


class Rollouts:
    """The samples of each optimizer step, drawn for ``num_steps`` steps at once.

    With ``num_steps=1`` every step draws its own from the weights as they are: nothing is held or scored.

    Args:
        sampler: draws the samples; for more than one step it has to give their log-probs.
        num_steps: optimizer steps that a draw serves. A window begins at each step that it divides.
        total_steps: of the run; nothing is drawn beyond it.
        num_generations: samples a prompt.
        max_new_tokens: of a sample, EOS included.
        prompts_of: the prompts of a step, token ids, the same at every call; of all processes.
        seed_of: the seed of the draw that begins at a step.
        rank_share: which prompts this process samples from.

    Raises:
        ValueError: ``num_steps`` below 1.
    """

    def __init__(
        self,
        sampler: Sampler,
        *,
        num_steps: int,
        total_steps: int,
        num_generations: int,
        max_new_tokens: int,
        prompts_of: Callable[[int], list[list[int]]],
        seed_of: Callable[[int], int],
        rank_share: RankShare = SINGLE_PROCESS,
    ) -> None:
        if num_steps < 1:
            raise ValueError(f"num_steps={num_steps}: a draw serves at least 1 step")
        self.sampler = sampler
        self.num_steps = num_steps
        self.total_steps = total_steps
        self.num_generations = num_generations
        self.max_new_tokens = max_new_tokens
        self.prompts_of = prompts_of
        self.rank_share = rank_share
        self.seed_of = seed_of
        self._ahead: dict[int, StepSamples] = {}  # of the steps of this window that are still to come
        self._recent: dict[int, list[array[int]]] = {}  # token ids of the samples of steps since the last `forget`

    def of_step(self, step: int, prompt_kv: PromptKV | None = None) -> StepSamples:
        """The samples of ``step``, handed out once; draws its window where the step begins one.

        ``prompt_kv`` saves the prefill of the step's prompts, where a draw serves one step.

        Raises:
            ValueError: the window began earlier and its samples are not here, or the sampler gives no log-probs.
        """
        first = step - step % self.num_steps
        if step == first:
            self._ahead = self._draw(range(first, min(first + self.num_steps, self.total_steps)), prompt_kv)
        if step not in self._ahead:
            raise ValueError(
                f"the samples of step {step} were drawn at step {first} and are gone: the weights that drew them have "
                "moved on. Load the checkpoint's state of the rollouts, or continue from a step that "
                f"num_steps={self.num_steps} divides"
            )
        samples = self._ahead.pop(step)
        self._recent[step] = [array("i", completion) for completion in samples.completions]
        return samples

    def recent(self, step: int) -> list[list[list[int]]]:
        """The samples that ``step`` was given, prompt by prompt; nothing if it is longer ago than the last `forget`."""
        completions, k = self._recent.get(step, []), self.num_generations
        return [[list(ids) for ids in completions[i : i + k]] for i in range(0, len(completions), k)]

    def forget(self) -> None:
        """Of the samples so far, nobody will ask."""
        self._recent = {}

    def _draw(self, steps: range, prompt_kv: PromptKV | None) -> dict[int, StepSamples]:
        """One call of the sampler for this process's prompts of all ``steps``."""
        everywhere = [self.prompts_of(step) for step in steps]
        first = [0, *accumulate(len(of_step) for of_step in everywhere)]
        prompts = [self.rank_share.select(of_step) for of_step in everywhere]
        prompt_indices = [
            start + place
            for start, of_step in zip(first, everywhere, strict=False)
            for place in self.rank_share.indices(len(of_step))
        ]
        samples = self.sampler.sample(
            [prompt for of_step in prompts for prompt in of_step],
            self.num_generations,
            self.max_new_tokens,
            seed=self.seed_of(steps[0]),
            prompt_kv=prompt_kv,
            prompt_indices=prompt_indices,
        )
        completions = samples.completions()
        bounds = [0, *accumulate(len(of_step) for of_step in prompts)]
        if self.num_steps == 1:
            logps = None
        elif samples.logprobs is None:
            raise ValueError(
                f"num_steps={self.num_steps} needs the log-probs of the samples, which {type(self.sampler).__name__} "
                "did not give: build it to score what it draws"
            )
        else:
            logps = samples.logprobs[samples.mask]
        drawn = StepSamples(completions, self.num_generations, logps)
        return {step: drawn.of_prompts(*bounds[i : i + 2]) for i, step in enumerate(steps)}

    def state(self) -> list[dict[str, Any]]:
        """What is left of the window, as JSON: empty between two windows. fp32 numbers keep their bits."""
        return [
            {
                "step": step,
                "completions": samples.completions,
                "logps": None if samples.logps is None else samples.logps.tolist(),
            }
            for step, samples in self._ahead.items()
        ]

    def load(self, state: Sequence[dict[str, Any]]) -> None:
        """Take up a saved :meth:`state`, in the place of what is here."""
        self._ahead = {
            saved["step"]: StepSamples(
                saved["completions"],
                self.num_generations,
                None if saved["logps"] is None else torch.tensor(saved["logps"], dtype=torch.float32),
            )
            for saved in state
        }


def _num_tokens(completions: Sequence[Sequence[int]]) -> int:
    return sum(map(len, completions))
