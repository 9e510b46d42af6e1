"""The chunk schedule: which rows go through the head together."""

import itertools
import random

import pytest
import torch

from hypo_kernels import workspace
from hypo_kernels.chunks import chunks, split


@pytest.mark.parametrize("seed", range(50))
def test_chunks_hold_whole_groups_and_every_row_once(seed: int) -> None:
    gen = random.Random(seed)
    num_pairs, k, prompts = gen.randint(0, 5), gen.randint(2, 4), gen.randint(0, 5)
    if num_pairs + prompts == 0:
        prompts = 1
    lengths = [gen.choice([0, 1, 3, 8, 20]) for _ in range(2 * num_pairs + k * prompts)]
    max_rows = gen.choice([1, 7, 16, 50, 10_000])
    plan = chunks(lengths, num_pairs, k, max_rows)
    groups = [2] * num_pairs + [k] * prompts
    ends = {sum(groups[:i]) for i in range(len(groups) + 1)}  # of groups, in sequences

    assert plan[0].sequences.start == plan[0].rows.start == 0
    assert plan[-1].sequences.stop == len(lengths)
    assert plan[-1].rows.stop == sum(lengths)
    for chunk, following in itertools.pairwise(plan):
        assert following.sequences.start == chunk.sequences.stop
        assert following.rows.start == chunk.rows.stop
    assert sum(chunk.num_pairs for chunk in plan) == num_pairs
    for chunk in plan:
        first, last = chunk.sequences.start, chunk.sequences.stop
        assert {first, last} <= ends
        assert last > first
        size = chunk.rows.stop - chunk.rows.start
        assert size == sum(lengths[first:last])
        assert chunk.num_pairs == max(0, min(last, 2 * num_pairs) - first) // 2
        if size > max_rows:
            counted = [i for i, (a, b) in enumerate(_spans(groups)) if first <= a < last and sum(lengths[a:b])]
            assert len(counted) == 1, "only a single group may be larger than the buffer"
        blocks = list(chunk.blocks(max_rows))
        assert all(block.stop - block.start <= max_rows for block, _ in blocks)
        assert [r for block, _ in blocks for r in range(block.start, block.stop)] == list(
            range(chunk.rows.start, chunk.rows.stop)
        )
        for block, local in blocks:
            assert (local.start, local.stop) == (block.start - chunk.rows.start, block.stop - chunk.rows.start)


def _spans(groups: list[int]) -> list[tuple[int, int]]:
    return [(sum(groups[:i]), sum(groups[: i + 1])) for i in range(len(groups))]


def test_chunks_are_as_few_as_a_greedy_walk_gives() -> None:
    assert [c.rows for c in chunks([4, 4, 4, 4, 4, 4], 3, 2, 16)] == [slice(0, 16), slice(16, 24)]
    assert [c.rows for c in chunks([4, 4, 4, 4, 4, 4], 3, 2, 24)] == [slice(0, 24)]


@pytest.mark.parametrize(("rows", "max_rows"), [(8192, 1780), (2048, 1780), (1000, 999)])
def test_blocks_and_chunks_are_balanced(rows: int, max_rows: int) -> None:
    """A rest of 268 rows would add to the weight's gradient, and read the weight, as a full block does."""
    blocks = [block.stop - block.start for block in split(slice(0, rows), max_rows)]
    assert len(blocks) == -(-rows // max_rows)
    assert max(blocks) <= 1.1 * min(blocks)
    of_small_groups = [
        chunk.rows.stop - chunk.rows.start for chunk in chunks([4] * (rows // 4), rows // 8, 2, max_rows)
    ]
    assert max(of_small_groups) <= 1.1 * min(of_small_groups)


def test_split_covers_all_rows_and_keeps_an_empty_slice() -> None:
    assert list(split(slice(3, 10), 3)) == [slice(3, 5), slice(5, 7), slice(7, 10)]
    assert list(split(slice(3, 3), 3)) == [slice(3, 3)]


@pytest.mark.parametrize("vocab", [1, 31, 32, 50_257])
def test_rows_are_aligned_on_cuda_and_dense_on_a_cpu(vocab: int) -> None:
    assert workspace.pitch(vocab, torch.device("cpu")) == vocab
    padded = workspace.pitch(vocab, torch.device("cuda"))
    assert padded % 32 == 0
    assert vocab <= padded < vocab + 32
