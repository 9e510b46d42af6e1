"""Layouts: which rows are counted, in which order, and reuse in many calls."""

import random
from typing import Any

import pytest
import torch
from contract import IMPLS, Batch, random_batch
from torch import Tensor

from hypo_kernels import TargetLayout, fused_hypo_loss, sequence_logprobs, token_logprobs
from hypo_kernels.layout import group_order

CPU = torch.device("cpu")


def random_targets(seed: int) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """Targets (T,) with ignored rows, bounds (S+1,) with empty sequences, and the sequences' lengths."""
    gen = random.Random(seed)
    lengths = [gen.choice([0, 1, 2, 5, 17]) for _ in range(gen.randint(1, 12))]
    targets = torch.tensor([gen.choice([-100, *range(9)]) for _ in range(sum(lengths))], dtype=torch.long)
    return targets, torch.tensor([0, *lengths]).cumsum(0), lengths


@pytest.mark.parametrize("seed", range(20))
def test_a_layout_holds_every_counted_row_once_and_in_order(seed: int) -> None:
    targets, cu_seqlens, lengths = random_targets(seed)
    plan = TargetLayout.of(targets, cu_seqlens)
    assert plan.rows.tolist() == [t for t in range(len(targets)) if targets[t] != -100]
    assert plan.targets.tolist() == [t for t in targets.tolist() if t != -100]
    parts = targets.split(lengths)
    assert plan.lengths.tolist() == [int((part != -100).sum()) for part in parts]


@pytest.mark.parametrize("seed", range(20))
def test_a_padded_layout_is_the_packed_one_of_equal_lengths(seed: int) -> None:
    gen = torch.Generator().manual_seed(seed)
    targets = torch.randint(-3, 5, (4, 6), generator=gen)
    targets[targets < 0] = -100
    padded, packed = TargetLayout.of(targets, None), TargetLayout.of(targets.flatten(), torch.arange(5) * 6)
    for name in ("rows", "targets", "lengths"):
        assert torch.equal(getattr(padded, name), getattr(packed, name))


def test_packed_targets_without_bounds_are_one_sequence() -> None:
    plan = TargetLayout.of(torch.tensor([3, -100, 4]), None)
    assert (plan.rows.tolist(), plan.targets.tolist(), plan.lengths.tolist()) == ([0, 2], [3, 4], [2])


@pytest.mark.parametrize("seed", range(20))
def test_reordering_moves_whole_sequences(seed: int) -> None:
    targets, cu_seqlens, lengths = random_targets(seed)
    plan = TargetLayout.of(targets, cu_seqlens)
    order = torch.randperm(len(lengths), generator=torch.Generator().manual_seed(seed))
    moved = plan._reordered(order)
    rows, sizes = plan.rows.split(plan.lengths.tolist()), plan.lengths
    assert moved.rows.tolist() == [int(r) for i in order for r in rows[i]]
    assert moved.lengths.tolist() == sizes[order].tolist()
    assert torch.equal(moved.targets, targets[moved.rows])
    back = moved._reordered(order.argsort())
    assert torch.equal(back.rows, plan.rows)


def test_group_order_puts_each_pair_side_by_side() -> None:
    assert group_order(10, 3).tolist() == [0, 3, 1, 4, 2, 5, 6, 7, 8, 9]
    assert group_order(4, 0).tolist() == [0, 1, 2, 3]
    assert group_order(4, 2).tolist() == [0, 2, 1, 3]


def test_a_layout_of_nothing_is_empty() -> None:
    plan = TargetLayout.of(torch.full((4,), -100), torch.tensor([0, 2, 4]))
    assert (len(plan.rows), plan.lengths.tolist()) == (0, [0, 0])
    assert isinstance(plan._reordered(torch.tensor([1, 0])), TargetLayout)


BOTH: dict[str, Any] = {"lengths": [5, 9, 3, 7, 6, 1, 8, 4], "num_pairs": 2, "vocab": 67}


def everything(batch: Batch, targets: Tensor | TargetLayout, bounds: Tensor | None, impl: str) -> list[Tensor]:
    """Results and gradients of all three functions."""
    out = fused_hypo_loss(batch.hidden, batch.weight, targets, bounds, impl=impl, **batch.options)
    tokens = token_logprobs(batch.hidden, batch.weight, targets, impl=impl)
    sums = sequence_logprobs(batch.hidden, batch.weight, targets, bounds, impl=impl)
    gradients = torch.autograd.grad(out.loss + tokens.sum() + sums.square().sum(), [batch.hidden, batch.weight])
    return [out.logps, out.lengths, tokens, sums, *gradients]


@pytest.mark.parametrize("impl", IMPLS)
def test_layout_replaces_targets_and_bounds_in_every_call(impl: str, device: torch.device) -> None:
    batch = random_batch(**BOTH, device=device)
    expected = everything(batch, batch.targets, batch.cu_seqlens, impl)
    laid_out = TargetLayout.of(batch.targets, batch.cu_seqlens)
    for _ in range(2):
        got = everything(batch, laid_out, None, impl)
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_a_layouts_copies_are_made_once(device: torch.device) -> None:
    laid_out = TargetLayout.of(torch.tensor([1, -100, 2, 3]), torch.tensor([0, 2, 4]))
    assert laid_out.on(device) is laid_out.on(device)
    assert laid_out.in_groups(1, device) is laid_out.in_groups(1, device)
    grouped, order = laid_out.in_groups(1, device)
    assert grouped.on(device) is grouped.on(device)
    assert order.device.type == device.type


def test_a_padded_layout_gives_results_of_its_shape() -> None:
    batch = random_batch([6, 6, 6, 6], 67, device=CPU)
    hidden, targets = batch.hidden.view(4, 6, 16), batch.targets.view(4, 6)
    laid_out = TargetLayout.of(targets)
    assert torch.equal(token_logprobs(hidden, batch.weight, laid_out), token_logprobs(hidden, batch.weight, targets))
    assert sequence_logprobs(hidden, batch.weight, laid_out).shape == (4,)


def test_a_layout_that_does_not_fit_is_named() -> None:
    laid_out = TargetLayout.of(torch.tensor([1, 2, 3]), torch.tensor([0, 3]))
    hidden, weight = torch.randn(4, 8), torch.randn(9, 8)
    with pytest.raises(ValueError, match=r"targets has shape \(3,\) and hidden \(4, 8\)"):
        sequence_logprobs(hidden, weight, laid_out)
    with pytest.raises(
        ValueError, match=r"cu_seqlens goes with a tensor of targets; a TargetLayout holds its own bounds"
    ):
        sequence_logprobs(hidden[:3], weight, laid_out, torch.tensor([0, 3]))
    with pytest.raises(ValueError, match=r"cu_seqlens ends at 2: must end at T=3"):
        TargetLayout.of(torch.tensor([1, 2, 3]), torch.tensor([0, 2]))


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need CUDA")
@pytest.mark.parametrize("staleness", [None, 1.0], ids=["own samples", "another policy's"])
@pytest.mark.parametrize("impl", ["triton-rows", "triton-epilogue"])
def test_a_cuda_graph_captures_loss_and_gradients(impl: str, staleness: float | None) -> None:
    """A replay on other hidden states equals a call on them."""
    device = torch.device("cuda")
    batch = random_batch([40, 72, 24, 56, 48, 8, 64, 32], 1000, width=64, num_pairs=2, dtype=torch.bfloat16,
                         staleness=staleness, device=device)  # fmt: skip
    laid_out = TargetLayout.of(batch.targets, batch.cu_seqlens)
    hidden = batch.hidden.detach().clone().requires_grad_()

    def step() -> tuple[Tensor, Tensor, Tensor]:
        out = fused_hypo_loss(hidden, batch.weight, laid_out, impl=impl, **batch.options)
        return (out.loss.detach(), *torch.autograd.grad(out.loss, [hidden, batch.weight]))

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        hidden.copy_(torch.randn_like(hidden))
    graph.replay()
    for got, expected in zip(captured, step(), strict=True):
        assert torch.equal(got, expected)
