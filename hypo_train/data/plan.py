"""The training plan of a run: the rows of every step and its micro-batches, from settings and rows alone."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

from hypo_train.config import Config
from hypo_train.data.errors import DataError
from hypo_train.data.load import ROW_TYPES, load_split_rows
from hypo_train.data.online import num_online, online_first
from hypo_train.data.order import batch_indices, batches_per_epoch, longest_first, rows_per_epoch
from hypo_train.data.report import DataReport
from hypo_train.data.rows import Example, Pair, Prompt, rows_hash
from hypo_train.utils.rank_share import SINGLE_PROCESS, RankShare

# The seeds of training steps start here; evaluations use the smaller ones.
SEEDS_PER_RUN = 2**31

_MOST_STEPS_SEARCHED = 100_000  # for the largest micro-batch, so that a run of any length starts at once

Rows = Sequence[Pair] | Sequence[Example] | Sequence[Prompt]


class LargestMicroBatch(NamedTuple):
    """The micro-batch of a run with the most tokens."""

    rows: list[int]  # indices of training rows
    num_online: int  # rows, the first ones, whose prompts get samples
    tokens: int  # with samples of full length


@dataclass(frozen=True)
class Plan:
    """The rows that every step trains on, the part of this process, and its micro-batches."""

    config: Config
    train_rows: Rows
    eval_rows: Rows
    rank_share: RankShare = field(default=SINGLE_PROCESS, kw_only=True)

    @property
    def world_size(self) -> int:
        """Return the number of processes of the run."""
        return self.rank_share.world_size

    @cached_property
    def total_steps(self) -> int:
        if self.config.max_steps > 0:
            return self.config.max_steps
        return max(1, round(self.config.num_train_epochs * self.steps_per_epoch))

    @property
    def steps_per_epoch(self) -> int:
        return batches_per_epoch(len(self.train_rows), self.batch_size, self._smallest_batch)

    @property
    def rows_per_epoch(self) -> int:
        """Return the number of training rows that an epoch trains on."""
        return rows_per_epoch(len(self.train_rows), self.batch_size, self._smallest_batch)

    @property
    def _smallest_batch(self) -> int:
        """Return the fewest rows that are a step: each process needs one."""
        return self.batch_size if self.config.dataloader_drop_last else self.world_size

    @property
    def batch_size(self) -> int:
        """Return the rows of an optimizer step on all processes; an epoch's last step may have fewer."""
        config, count = self.config, self.world_size
        wanted = config.per_device_train_batch_size * config.gradient_accumulation_steps * count
        return wanted if count == 1 else min(wanted, len(self.train_rows) // count * count)

    @cached_property
    def rows_hashes(self) -> dict[str, str]:
        """Return a hash of each split's rows, which a checkpoint stores."""
        return {"train": rows_hash(self.train_rows), "eval": rows_hash(self.eval_rows)}

    @property
    def max_new_tokens(self) -> int:
        return self.config.max_new_tokens or self.config.max_completion_length

    @property
    def max_sampled(self) -> int:
        """Return the most tokens that all samples of an online prompt can have together."""
        return self.config.num_generations * self.max_new_tokens if self.config.draws_samples else 0

    @cached_property
    def one_micro_batch(self) -> bool:
        """Return whether every step is one micro-batch, whatever the lengths of its samples."""
        budget = self.config.max_tokens_per_micro_batch
        if budget is None:
            return self.config.gradient_accumulation_steps == 1
        rows = self.batch_size // self.world_size
        online = -(-self.most_online // self.world_size)
        return sum(sorted(self._row_lengths, reverse=True)[:rows]) + online * self.max_sampled <= budget

    @property
    def may_run_prompts_first(self) -> bool:
        """Return whether samples may reuse the prompts' keys and values of the training pass, if the sampler can."""
        c = self.config
        # Several micro-batches would have to keep their autograd graphs until all are sampled. FSDP gathers the
        # weights for one forward pass at a time.
        exact = c.reuse_prompt_kv and c.lora_dropout == 0 and c.rollout_steps == 1 and not c.fsdp
        return c.draws_samples and exact and self.one_micro_batch

    def micro_batches(self, lengths: Sequence[int]) -> Iterator[slice]:
        """Yield the slices of a step's rows that are micro-batches; a row longer than the budget is alone.

        Args:
            lengths: the tokens of each row, in the order of the step.
        """
        budget, start, tokens = self.config.max_tokens_per_micro_batch, 0, 0
        for i, length in enumerate(lengths):
            full = i - start == self.config.per_device_train_batch_size if budget is None else tokens + length > budget
            if full and i > start:
                yield slice(start, i)
                start, tokens = i, 0
            tokens += length
        yield slice(start, len(lengths))

    @cached_property
    def largest_micro_batch(self) -> LargestMicroBatch:
        """Return this process's micro-batch with the most tokens, if all samples have full length."""
        most = self._most_tokens([length + self.max_sampled for length in self._row_lengths])
        largest = LargestMicroBatch([], 0, 0)
        for step in range(min(self.total_steps, _MOST_STEPS_SEARCHED)):
            rows, online = self.rank_share.select(self.rows_of_step(step)), self.num_online_here(step)
            longest = [self._row_lengths[row] + self.max_sampled * (i < online) for i, row in enumerate(rows)]
            for part in self.micro_batches(longest):
                if (tokens := sum(longest[part])) > largest.tokens:
                    largest = LargestMicroBatch(rows[part], max(0, min(part.stop, online) - part.start), tokens)
            if largest.tokens == most:  # no later step can have more
                break
        return largest

    def _most_tokens(self, lengths: Sequence[int]) -> int:
        """Return an upper bound on the tokens of a micro-batch of rows of these lengths."""
        config, budget = self.config, self.config.max_tokens_per_micro_batch
        rows = config.per_device_train_batch_size if budget is None else self.batch_size // self.world_size
        descending = sorted(lengths, reverse=True)
        longest_rows = sum(descending[:rows])
        return longest_rows if budget is None else min(longest_rows, max(budget, descending[0]))

    def step_seed(self, step: int) -> int:
        """Return the seed of a step's samples, which all processes share."""
        return (self.config.seed + 1) * SEEDS_PER_RUN + step

    def own_seed(self, step: int) -> int:
        """Return the seed of a step that belongs to this process, for dropout and a reward function."""
        seed, rank = self.step_seed(step), self.rank_share.rank
        return seed if rank == 0 else random.Random(f"{seed}/{rank}").getrandbits(63)

    def rows_of_step(self, step: int) -> list[int]:
        """Return the indices of an optimizer step's rows on all processes: online prompts first, then by length.

        The first :meth:`num_online` rows are those whose prompts get samples. In both parts the longest row comes
        first. Processes divide the rows, and micro-batches are cut, in this order.
        """
        grouped = self._row_lengths if self.config.group_by_length else None
        indices = batch_indices(
            len(self.train_rows), self.batch_size, step, self.config.seed, grouped, self._smallest_batch
        )
        rows = longest_first(indices, self._row_lengths)
        return online_first(rows, self._num_online(step, len(rows)), step, self.config.seed)

    def num_online(self, step: int) -> int:
        """Return the number of a step's prompts that get samples, on all processes."""
        batch = step % self.steps_per_epoch
        return self._num_online(step, min(self.batch_size, self.rows_per_epoch - batch * self.batch_size))

    def online_rows(self, step: int) -> list[Any]:
        """Return the rows of a step whose prompts get samples, on all processes."""
        return [self.train_rows[i] for i in self.rows_of_step(step)[: self.num_online(step)]]

    def num_online_here(self, step: int) -> int:
        """Return the number of a step's prompts that get samples on this process."""
        return len(self.rank_share.indices(self.num_online(step)))

    @property
    def most_online(self) -> int:
        """Return the most prompts of one step that get samples, on all processes."""
        return min(self.batch_size, math.ceil(self.config.online_fraction * self.batch_size))

    def _num_online(self, step: int, num_rows: int) -> int:
        if not self.config.draws_samples:
            return 0
        epoch, batch = divmod(step, self.steps_per_epoch)
        first_row = epoch * self.rows_per_epoch + batch * self.batch_size
        return num_online(self.config.online_fraction, first_row, num_rows, self.config.seed)

    @cached_property
    def _row_lengths(self) -> tuple[int, ...]:
        return tuple(row.num_tokens for row in self.train_rows)


def load_plan(
    config: Config, tokenizer: Any, eos_token_ids: Sequence[int], rank_share: RankShare = SINGLE_PROCESS
) -> tuple[Plan, dict[str, DataReport]]:
    """Return the plan with the rows of the algorithm's type, and a report on each split.

    Raises:
        DataError: the data cannot be read, no row can be used, or there are fewer training rows than processes.
    """
    kind: type[Any] = ROW_TYPES[config.spec.row_type]
    train_rows, eval_rows, reports = load_split_rows(kind, config, tokenizer, eos_token_ids)
    if len(train_rows) < rank_share.world_size:
        raise DataError(
            f"{len(train_rows)} training rows for {rank_share.world_size} processes: each needs a row in every step, "
            "start fewer processes"
        )
    return Plan(config, train_rows, eval_rows, rank_share=rank_share), reports
