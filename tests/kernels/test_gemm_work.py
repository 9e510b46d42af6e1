"""How much work a call does, counted from the shapes of its matrix products.

NVD = counted rows × vocabulary × features; a product over them is 2 NVD of FLOP.
"""

import itertools
from typing import Any

import pytest
import torch
from contract import FUSED, IMPLS, Batch, random_batch
from meters import GemmMeter

from hypo_kernels import fused_hypo_loss, sequence_logprobs, token_logprobs

# 5 groups of unequal size; a third of the rows ignored.
RAGGED: dict[str, Any] = {"lengths": [5, 9, 3, 7, 6, 2, 8, 4, 5, 3], "num_pairs": 3, "vocab": 67}


def nvd(batch: Batch) -> int:
    return int((batch.targets != -100).sum()) * batch.weight.numel()


def loss_flops(batch: Batch, impl: str, **options: Any) -> float:
    """FLOP of forward and backward, in NVD."""
    options = {**batch.options, **options}
    with GemmMeter() as meter:
        out = fused_hypo_loss(batch.hidden, batch.weight, batch.targets, batch.cu_seqlens, impl=impl, **options)
        if out.loss.requires_grad:
            out.loss.backward()
    return meter.flops / nvd(batch)


def one_row_budget(batch: Batch, impl: str) -> int:
    """Return a call's smallest ``max_chunk_bytes``, with which every group is larger than the workspace."""
    with pytest.raises(ValueError, match="pass at least") as error:
        loss_flops(batch, impl, max_chunk_bytes=1)
    return int(str(error.value).split("at least ")[1].split()[0])


@pytest.mark.parametrize("impl", IMPLS)
def test_a_trained_head_costs_6_nvd(impl: str, device: torch.device) -> None:
    assert loss_flops(random_batch(**RAGGED, device=device), impl) == 6


@pytest.mark.parametrize("impl", FUSED)
def test_a_frozen_head_costs_4_nvd(impl: str, device: torch.device) -> None:
    batch = random_batch(**RAGGED, device=device)
    batch.weight.requires_grad_(False)
    assert loss_flops(batch, impl) == 4
    assert batch.weight.grad is None


@pytest.mark.parametrize("impl", FUSED)
def test_a_head_trained_on_fixed_hidden_states_costs_4_nvd(impl: str, device: torch.device) -> None:
    batch = random_batch(**RAGGED, device=device)
    batch.hidden.requires_grad_(False)
    assert loss_flops(batch, impl) == 4
    assert batch.hidden.grad is None


@pytest.mark.parametrize("impl", FUSED)
def test_large_groups_cost_8_nvd_or_6_with_a_frozen_head(impl: str, device: torch.device) -> None:
    batch = random_batch(**RAGGED, ignored=0.0, device=device)
    budget = one_row_budget(batch, impl)
    assert loss_flops(batch, impl, max_chunk_bytes=budget) == 8
    batch.weight.requires_grad_(False)
    assert loss_flops(batch, impl, max_chunk_bytes=budget) == 6


@pytest.mark.parametrize("impl", FUSED)
def test_only_a_too_large_group_is_recomputed(impl: str, device: torch.device) -> None:
    # Pairs of 4 rows and one of 64. A budget between the two is found by what each alone needs.
    batch = random_batch([2, 2, 30, 2, 2, 34], 67, num_pairs=3, ignored=0.0, device=device)
    budget = one_row_budget(batch, impl)
    while loss_flops(batch, impl, max_chunk_bytes=budget) == 8:
        budget += budget // 4
    large, all_rows = 64, 72
    assert loss_flops(batch, impl, max_chunk_bytes=budget) == 6 + 2 * large / all_rows


@pytest.mark.parametrize("impl", IMPLS)
def test_no_grad_costs_2_nvd_and_allocates_no_gradients(impl: str, device: torch.device) -> None:
    batch = random_batch(**RAGGED, device=device)
    with torch.no_grad():
        assert loss_flops(batch, impl) == 2


@pytest.mark.parametrize("impl", IMPLS)
def test_inputs_that_need_no_gradient_cost_2_nvd(impl: str, device: torch.device) -> None:
    batch = random_batch(**RAGGED, device=device)
    batch.hidden.requires_grad_(False)
    batch.weight.requires_grad_(False)
    assert loss_flops(batch, impl) == 2


@pytest.mark.parametrize("impl", IMPLS)
def test_a_reference_from_its_hidden_states_adds_2_nvd(impl: str, device: torch.device) -> None:
    assert loss_flops(random_batch(**RAGGED, with_ref_hidden=True, device=device), impl) == 8


@pytest.mark.parametrize("impl", IMPLS)
def test_ignored_rows_never_reach_a_gemm(impl: str, device: torch.device) -> None:
    batch = random_batch([100, 200, 50, 150], 67, num_pairs=1, ignored=0.9, device=device)
    assert loss_flops(batch, impl) == 6  # of the tenth that counts, by the definition of NVD above
    with GemmMeter() as meter:
        sequence_logprobs(batch.hidden, batch.weight, batch.targets, batch.cu_seqlens, impl=impl)
    assert meter.flops == 2 * nvd(batch)


@pytest.mark.parametrize("impl", FUSED)
@pytest.mark.parametrize("needed", list(itertools.product([True, False], repeat=3)))
def test_only_the_gradients_asked_for_are_computed(
    impl: str, needed: tuple[bool, bool, bool], device: torch.device
) -> None:
    full = random_batch(**RAGGED, with_bias=True, device=device)
    some = full.to(torch.float32)
    for batch in (full, some):
        leaves = {"hidden": batch.hidden, "weight": batch.weight, "bias": batch.bias}
        for leaf, wanted in zip(leaves.values(), needed, strict=True):
            leaf.requires_grad_(wanted or batch is full)
        flops = loss_flops(batch, impl, bias=batch.bias)
    in_bias = 1 / batch.weight.shape[1]  # a product with a column of ones
    assert flops == pytest.approx(2 + 2 * needed[0] + 2 * needed[1] + 2 * needed[2] * in_bias, rel=1e-12)
    for name, wanted in zip(leaves, needed, strict=True):
        got, expected = getattr(some, name).grad, getattr(full, name).grad
        assert (got is not None) == wanted
        assert got is None or torch.equal(got, expected)


@pytest.mark.parametrize("impl", FUSED)
def test_token_log_probs_cost_2_nvd_forward_and_6_backward(impl: str, device: torch.device) -> None:
    batch = random_batch(**RAGGED, device=device)
    with GemmMeter() as forward:
        logps = token_logprobs(batch.hidden, batch.weight, batch.targets, impl=impl)
    with GemmMeter() as backward:
        logps.sum().backward()
    assert (forward.flops / nvd(batch), backward.flops / nvd(batch)) == (2, 6)
    batch.weight.requires_grad_(False)
    logps = token_logprobs(batch.hidden, batch.weight, batch.targets, impl=impl)
    with GemmMeter() as backward:
        logps.sum().backward()
    assert backward.flops / nvd(batch) == 4


@pytest.mark.parametrize("impl", FUSED)
def test_many_small_groups_share_a_gemm(impl: str, device: torch.device) -> None:
    """A batch that fits takes three products in all, however many groups it has."""
    batch = random_batch([2] * 40, 67, num_pairs=20, device=device)
    with GemmMeter() as meter:
        out = fused_hypo_loss(batch.hidden, batch.weight, batch.targets, batch.cu_seqlens, impl=impl, **batch.options)
        out.loss.backward()
    assert len(meter.shapes) == 3
