"""What a step of a run computes, on average, on the process that has most: from the lengths of its rows alone.

Samples are taken to be as long as they may be, as where memory is estimated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from hypo_train.data.plan import Plan
from hypo_train.metrics.flops import Size
from hypo_train.model.reference_cache import splits_to_precompute
from hypo_train.preflight.memory_estimate import Conditions, branch_lengths
from hypo_train.preflight.prediction.communication import Passes
from hypo_train.trees.layout import Layout, causal_pairs

_MOST_STEPS = 64  # that are looked at, from all over the run
_NOTHING = Size(0, 0, 0)


@dataclass(frozen=True)
class Drawn:
    """One draw of samples."""

    sequences: int
    prompt_tokens: int  # of their prompts, each once
    new_tokens: int  # of each sequence


@dataclass(frozen=True)
class Work:
    """Of one process in a step."""

    passes: Passes
    policy: Size  # forward and backward
    reference: Size
    prefill: Size
    draw: Drawn | None  # None: no samples are drawn
    sequences_per_prompt: int  # of a draw


def work_of(plan: Plan, conditions: Conditions) -> Work:
    """The mean of the run's steps."""
    steps = range(0, plan.total_steps, -(-plan.total_steps // _MOST_STEPS))
    policy, reference, prefill, micro_batches = [], [], [], []
    sampled = [plan.max_new_tokens] * plan.config.num_generations if plan.config.draws_samples else []
    asks_pairs = _asks_reference_of_pairs(plan)
    asks = asks_pairs or (plan.config.has_reference and bool(sampled))
    for step in steps:
        rows = [plan.train_rows[i] for i in plan.rank_share.select(plan.rows_of_step(step))]
        prompts, branches = [len(row.prompt) for row in rows], [branch_lengths(plan, row) for row in rows]
        lengths = [row.num_tokens + sum(sampled) for row in rows]
        micro_batches.append(sum(1 for _ in plan.micro_batches(lengths)))
        policy.append(_size(prompts, branches, conditions))
        asked = branches if asks_pairs else [sampled] * len(rows)
        reference.append(_size(prompts, asked, conditions) if asks else _NOTHING)
        prefilled = bool(sampled) and not conditions.prompts_run_first(plan)
        prefill.append(_size(prompts, [[]] * len(rows), conditions) if prefilled else _NOTHING)
    n, window = fmean(micro_batches), plan.config.rollout_steps
    prompt_tokens = fmean(sum(len(plan.train_rows[i].prompt) for i in plan.rows_of_step(step)) for step in steps)
    each = plan.batch_size // plan.world_size
    draw = Drawn(each * len(sampled) * window, round(prompt_tokens / plan.world_size * window), plan.max_new_tokens)
    return Work(
        Passes(draws=1 / window if sampled else 0, micro_batches=n, of_reference=n if asks else 0),
        _mean(policy),
        _mean(reference),
        _mean(prefill),
        draw if sampled else None,
        len(sampled),
    )


def _asks_reference_of_pairs(plan: Plan) -> bool:
    """Whether a step's reference pass is over all that the policy's is over, and not over its samples alone."""
    return plan.config.has_reference and "train" not in splits_to_precompute(plan)


def _size(prompts: Sequence[int], branches: Sequence[Sequence[int]], conditions: Conditions) -> Size:
    """Of a pass over prompts and completions of so many tokens; over prompts alone, where they have none."""
    counted = sum(map(sum, branches))
    inputs = tuple(tuple(length - 1 for length in lengths) for lengths in branches)
    if conditions.shares_prompts or not counted:
        layout = Layout(tuple(prompts), inputs)
        return Size(layout.num_tokens, layout.num_attended, counted)
    rows = [prompt + length for prompt, lengths in zip(prompts, inputs, strict=True) for length in lengths]
    return Size(sum(rows), sum(map(causal_pairs, rows)), counted)


def _mean(sizes: Sequence[Size]) -> Size:
    return Size(*(round(fmean(numbers)) for numbers in zip(*sizes, strict=True)))
