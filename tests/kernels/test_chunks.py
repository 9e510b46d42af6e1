"""Planning a call: which rows count, in which order, and which go through the head together."""

import itertools
import random

import pytest
import torch

from hypo_kernels import chunks as planning
from hypo_kernels.chunks import Layout, chunks, group_order, layout, split


def random_targets(seed: int) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """Targets (T,) with ignored rows, bounds (S+1,) with empty sequences, and the sequences' lengths."""
    gen = random.Random(seed)
    lengths = [gen.choice([0, 1, 2, 5, 17]) for _ in range(gen.randint(1, 12))]
    targets = torch.tensor([gen.choice([-100, *range(9)]) for _ in range(sum(lengths))], dtype=torch.long)
    return targets, torch.tensor([0, *lengths]).cumsum(0), lengths


@pytest.mark.parametrize("seed", range(20))
def test_a_layout_holds_every_counted_row_once_and_in_order(seed: int) -> None:
    targets, cu_seqlens, lengths = random_targets(seed)
    plan = layout(targets, cu_seqlens)
    assert plan.rows.tolist() == [t for t in range(len(targets)) if targets[t] != -100]
    assert plan.targets.tolist() == [t for t in targets.tolist() if t != -100]
    parts = targets.split(lengths)
    assert plan.lengths.tolist() == [int((part != -100).sum()) for part in parts]


@pytest.mark.parametrize("seed", range(20))
def test_a_padded_layout_is_the_packed_one_of_equal_lengths(seed: int) -> None:
    gen = torch.Generator().manual_seed(seed)
    targets = torch.randint(-3, 5, (4, 6), generator=gen)
    targets[targets < 0] = -100
    padded, packed = layout(targets, None), layout(targets.flatten(), torch.arange(5) * 6)
    for name in ("rows", "targets", "lengths"):
        assert torch.equal(getattr(padded, name), getattr(packed, name))


def test_packed_targets_without_bounds_are_one_sequence() -> None:
    plan = layout(torch.tensor([3, -100, 4]), None)
    assert (plan.rows.tolist(), plan.targets.tolist(), plan.lengths.tolist()) == ([0, 2], [3, 4], [2])


@pytest.mark.parametrize("seed", range(20))
def test_reordering_moves_whole_sequences(seed: int) -> None:
    targets, cu_seqlens, lengths = random_targets(seed)
    plan = layout(targets, cu_seqlens)
    order = torch.randperm(len(lengths), generator=torch.Generator().manual_seed(seed))
    moved = plan.reordered(order)
    rows, sizes = plan.rows.split(plan.lengths.tolist()), plan.lengths
    assert moved.rows.tolist() == [int(r) for i in order for r in rows[i]]
    assert moved.lengths.tolist() == sizes[order].tolist()
    assert torch.equal(moved.targets, targets[moved.rows])
    back = moved.reordered(order.argsort())
    assert torch.equal(back.rows, plan.rows)


def test_group_order_puts_each_pair_side_by_side_and_keeps_the_samples() -> None:
    assert group_order(10, 3).tolist() == [0, 3, 1, 4, 2, 5, 6, 7, 8, 9]
    assert group_order(4, 0).tolist() == [0, 1, 2, 3]
    assert group_order(4, 2).tolist() == [0, 2, 1, 3]


@pytest.mark.parametrize("seed", range(50))
def test_chunks_hold_every_row_once_whole_groups_and_no_more_rows_than_fit(seed: int) -> None:
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


def test_split_covers_the_rows_in_slices_of_at_most_so_many_and_no_rows_in_one() -> None:
    assert list(split(slice(3, 10), 3)) == [slice(3, 6), slice(6, 9), slice(9, 10)]
    assert list(split(slice(3, 3), 3)) == [slice(3, 3)]


def test_a_layout_of_nothing_is_empty() -> None:
    plan = layout(torch.full((4,), -100), torch.tensor([0, 2, 4]))
    assert (len(plan.rows), plan.lengths.tolist()) == (0, [0, 0])
    assert isinstance(plan.reordered(torch.tensor([1, 0])), Layout)


@pytest.mark.parametrize("vocab", [1, 31, 32, 50_257])
def test_rows_start_on_aligned_addresses_on_cuda_and_lie_dense_on_a_cpu(vocab: int) -> None:
    assert planning.pitch(vocab, torch.device("cpu")) == vocab
    padded = planning.pitch(vocab, torch.device("cuda"))
    assert padded % 32 == 0
    assert vocab <= padded < vocab + 32
