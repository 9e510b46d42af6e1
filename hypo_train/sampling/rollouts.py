"""Rollouts: one draw of samples serves one or several optimizer steps (a window).

Decoding reads all weights for every token, whatever the number of sequences, so one draw for n steps costs far less
than n draws. But from the second step of a window on, the samples come from an earlier policy. Each sample therefore
keeps its tokens' log-probs under the policy that drew it, for the loss's ``behavior_logps``. A window cannot be drawn
again after the weights have changed, so the rest of a window is part of a checkpoint.

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
    """The completions of a step's online prompts: ``num_generations`` consecutive completions for each prompt."""

    completions: list[list[int]]  # token ids, EOS included
    num_generations: int
    # fp32 (tokens of all completions,), log-probs under the policy that drew them; None if this step drew them, so that
    # there is nothing to correct.
    logps: Tensor | None

    @property
    def num_prompts(self) -> int:
        """Return the number of prompts that have samples."""
        return len(self.completions) // self.num_generations

    def of_rows(self, start: int, stop: int) -> StepSamples | None:
        """Return the samples of the step's rows ``start`` to ``stop``, a micro-batch; None if these have no samples.

        The first rows of a step are those whose prompts have samples.
        """
        found = self.of_prompts(start, stop)
        return found if found.completions else None

    def of_prompts(self, start: int, stop: int) -> StepSamples:
        """Return the samples of the online prompts ``start`` to ``stop``."""
        first, last = start * self.num_generations, stop * self.num_generations
        completions = self.completions[first:last]
        if self.logps is None:
            return StepSamples(completions, self.num_generations, None)
        before = _num_tokens(self.completions[:first])
        return StepSamples(completions, self.num_generations, self.logps[before : before + _num_tokens(completions)])

    def behavior_logps(self, tree: Tree) -> Tensor | None:
        """Return the log-probs (T,) for ``tree``, whose last sequences are these completions; 0 for the others."""
        if self.logps is None:
            return None
        others = len(tree.targets) - len(self.logps)
        logps = self.logps.to(tree.rows.device, non_blocking=True)
        return torch.cat([logps.new_zeros(others), logps])


class Rollouts:
    """The samples of each optimizer step, drawn for ``num_steps`` steps at once.

    With ``num_steps=1`` every step draws its own samples from the current weights; nothing is stored or scored.

    Args:
        sampler: draws the samples; with more than one step it must return log-probs.
        num_steps: optimizer steps of a window. A window begins at each step that ``num_steps`` divides.
        total_steps: optimizer steps of the run; nothing is drawn for later steps.
        num_generations: samples for each prompt.
        max_new_tokens: the most tokens of a sample, EOS included.
        prompts_of: returns the prompts of a step that get samples, on all processes, as token ids, equal at every call.
        seed_of: returns the seed of the draw that begins at a step.
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
        self._ahead: dict[int, StepSamples] = {}  # samples of the later steps of this window
        self._recent: dict[int, list[array[int]]] = {}  # token ids of the steps since the last ``forget``

    def of_step(self, step: int, prompt_kv: PromptKV | None = None) -> StepSamples:
        """Return the samples of ``step``, once; if the step begins a window, draw the window first.

        ``prompt_kv`` saves the prefill of the step's prompts if a window is one step.

        Raises:
            ValueError: the samples of the window do not exist, or the sampler returned no log-probs.
        """
        first = step - step % self.num_steps
        if step == first:
            self._ahead = self._draw(range(first, min(first + self.num_steps, self.total_steps)), prompt_kv)
        if step not in self._ahead:
            raise ValueError(
                f"the samples of step {step} were drawn at step {first} and are gone, and the weights that drew them "
                "have changed. Load the checkpoint's state of the rollouts, or continue from a step that "
                f"num_steps={self.num_steps} divides"
            )
        samples = self._ahead.pop(step)
        self._recent[step] = [array("i", completion) for completion in samples.completions]
        return samples

    def recent(self, step: int) -> list[list[list[int]]]:
        """Return the samples of ``step``, a list for each prompt; empty if ``forget`` has discarded them."""
        completions, k = self._recent.get(step, []), self.num_generations
        return [[list(ids) for ids in completions[i : i + k]] for i in range(0, len(completions), k)]

    def forget(self) -> None:
        """Discard the stored samples of past steps."""
        self._recent = {}

    def _draw(self, steps: range, prompt_kv: PromptKV | None) -> dict[int, StepSamples]:
        """Call the sampler once, for this process's prompts of all ``steps``."""
        all_prompts = [self.prompts_of(step) for step in steps]
        first = [0, *accumulate(len(step_prompts) for step_prompts in all_prompts)]
        prompts = [self.rank_share.select(step_prompts) for step_prompts in all_prompts]
        prompt_indices = [
            start + place
            for start, step_prompts in zip(first, all_prompts, strict=False)
            for place in self.rank_share.indices(len(step_prompts))
        ]
        if not any(prompts):  # this process has none; others may sample
            if any(all_prompts):
                self.sampler.skip()
            return {step: StepSamples([], self.num_generations, None) for step in steps}
        samples = self.sampler.sample(
            [prompt for step_prompts in prompts for prompt in step_prompts],
            self.num_generations,
            self.max_new_tokens,
            seed=self.seed_of(steps[0]),
            prompt_kv=prompt_kv,
            prompt_indices=prompt_indices,
        )
        completions = samples.completions()
        bounds = [0, *accumulate(len(step_prompts) for step_prompts in prompts)]
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
        """Return the rest of the window for JSON, empty between two windows; fp32 numbers keep their bits."""
        return [
            {
                "step": step,
                "completions": samples.completions,
                "logps": None if samples.logps is None else samples.logps.tolist(),
            }
            for step, samples in self._ahead.items()
        ]

    def load(self, state: Sequence[dict[str, Any]]) -> None:
        """Replace the stored samples by a saved :meth:`state`."""
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
