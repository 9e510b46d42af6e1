"""Scaled exponentials from the epilogue of a GEMM, the repair of rows that they do not fit, and the targets.

Row factor × E is the gradient of −log p(target) by raw, against float64. Log-probs are compared in fp32, as
the logits never meet bf16; gradients in the dtype of E, with a gradient that was made in fp32 and rounded once
as the eager run.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from contract import assert_close
from head_cases import HEADS, NARROW, Case, make_case
from torch import Tensor

from hypo_kernels.kernels.tiles import GemmTile

exponentials_kernels = pytest.importorskip("hypo_kernels.kernels.exponentials", exc_type=ImportError)
head_kernels = pytest.importorskip("hypo_kernels.kernels.head", exc_type=ImportError)
# numpy remarks on overflows, which the repair is there for, and on columns beyond the vocabulary.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

POINTERS = GemmTile(**NARROW)
DESCRIPTORS = replace(POINTERS, descriptors=True)
TILES = {"pointers": POINTERS, "descriptors": DESCRIPTORS}
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(params=TILES)
def tile(request: pytest.FixtureRequest, device: torch.device) -> GemmTile:
    if request.param == "descriptors" and head_kernels.capability(device) not in [(0, 0), (9, 0), (10, 0)]:
        pytest.skip("no TMA on this device")
    return TILES[request.param]


def run(case: Case, tile: GemmTile | None) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(buffer, out, offset, norms, target logits, row factor); ``out`` lies in a buffer full of NaN."""
    vocab = len(case.weight)
    pitch = -(-vocab // 8) * 8 + 8
    buffer = torch.full((len(case.x), pitch), float("nan"), dtype=case.x.dtype, device=case.x.device)
    out = buffer[:, :vocab]
    offset, norms, target_logits = exponentials_kernels.exponentials(
        case.x, case.weight, case.targets, case.head, out, tile=tile
    )
    row_factor = exponentials_kernels.fix_targets(out, case.targets, target_logits, offset, norms, case.head)
    return buffer, out, offset, norms, target_logits, row_factor


def assert_exact(case: Case, tile: GemmTile | None) -> tuple[Tensor, Tensor]:
    """Returns (offset, norms)."""
    buffer, out, offset, norms, target_logits, row_factor = run(case, tile)
    exact, eager = case.to(torch.float64).results(), case.eager_runs()
    top, total, others = norms.unbind(1)
    got = {
        "lse": top + total.log(),
        "target logit": target_logits,
        "lse of the others": top + others.log(),
    }
    for name, value in got.items():
        assert_close(name, value, [run[name] for run in eager], exact[name], torch.float32, case.size())
    rounded = [run["gradient"].to(out.dtype) for run in eager]
    # fp32 logits of size s have probabilities of relative error s · eps.
    scale = case.size() * torch.finfo(torch.float32).eps / torch.finfo(out.dtype).eps
    assert_close("gradient", out.double() * row_factor[:, None], rounded, exact["gradient"], out.dtype, scale)
    assert buffer[:, out.shape[1] :].isnan().all(), "the padding of the rows was written"
    return offset, norms


# Less than a tile, whole tiles, partial last ones; widths below, at and beyond a block of features.
@pytest.mark.parametrize(("rows", "vocab", "width"), [(1, 7, 5), (16, 128, 32), (37, 203, 33), (2, 1003, 7)])
def test_any_shape(rows: int, vocab: int, width: int, tile: GemmTile, device: torch.device) -> None:
    assert_exact(make_case(rows, vocab, width, device=device, aligned=tile.descriptors), tile)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head", HEADS)
def test_every_head(head: str, dtype: torch.dtype, device: torch.device) -> None:
    assert_exact(make_case(19, 203, 40, device=device, dtype=dtype, head=head), POINTERS)


def test_every_head_through_descriptors(device: torch.device, tile: GemmTile) -> None:
    assert_exact(make_case(19, 203, 40, device=device, dtype=torch.bfloat16, head="all", aligned=True), tile)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_frozen_tiles(dtype: torch.dtype, device: torch.device) -> None:
    assert_exact(make_case(130, 1003, 40, device=device, dtype=dtype, aligned=True), None)


@pytest.mark.parametrize("shift", [-1e4, 1e4, 150.0])
def test_logits_far_from_zero(shift: float, device: torch.device) -> None:
    offset, norms = assert_exact(make_case(5, 203, 16, device=device, shift=shift), POINTERS)
    assert torch.equal(offset, norms[:, 0])


def hopeless_case(device: torch.device, dtype: torch.dtype, aligned: bool = False) -> tuple[Case, Tensor]:
    """Return 37 rows, every third with a target 200 nats below its top, and which ones those are."""
    case = make_case(37, 203, 40, device=device, dtype=dtype, shift=1.0, aligned=aligned)
    case.weight[100, 0] = -200.0
    hopeless = torch.arange(37, device=device) % 3 == 0
    case.targets[case.targets == 100] = 99
    case.targets[hopeless] = 100
    return case, hopeless


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_with_a_hopeless_target_are_repaired(dtype: torch.dtype, tile: GemmTile, device: torch.device) -> None:
    case, hopeless = hopeless_case(device, dtype, aligned=True)
    offset, norms = assert_exact(case, tile)
    z = case.head.logits(case.x.double() @ case.weight.double().t())
    assert torch.all(z.amax(1)[hopeless] - case.pick(z)[hopeless] > 190)
    torch.testing.assert_close(offset[hopeless].double(), z.amax(1)[hopeless], rtol=1e-6, atol=1e-5)
    others = case.pick(z)[~hopeless] + exponentials_kernels.OFFSET_ABOVE_TARGET
    torch.testing.assert_close(offset[~hopeless].double(), others, rtol=1e-6, atol=1e-5)
    assert torch.all((norms[:, 1] > 0) & norms.isfinite().all(1))


def test_repair_leaves_other_rows_as_they_were(device: torch.device) -> None:
    case, hopeless = hopeless_case(device, torch.float32)
    _, out, *_ = run(case, POINTERS)
    fine = replace(case, targets=torch.where(hopeless, 7, case.targets))
    _, expected, *_ = run(fine, POINTERS)
    assert torch.equal(out[~hopeless], expected[~hopeless])


@pytest.mark.parametrize("nats", [45.0, 50.0])
def test_both_sides_of_the_largest_total(nats: float, device: torch.device) -> None:
    """2^40 is 27.7 nats: with 20 above the target, a target 47.7 below the top is where repair begins."""
    case = make_case(5, 203, 16, device=device, spread=0.1, shift=1.0)
    case.weight[9, 0], case.weight[10, 0] = 1.0 + nats, 1.0
    case.targets[:] = 10
    offset, _ = assert_exact(case, POINTERS)
    z = case.head.logits(case.x @ case.weight.t())
    repaired = torch.isclose(offset, z.amax(1), rtol=1e-5)
    assert repaired.all() if nats > 47.7 else not repaired.any()


def test_logits_of_more_than_a_hundred_in_both_directions(device: torch.device) -> None:
    case = make_case(9, 203, 16, device=device, spread=100.0)
    assert case.size() > 200
    assert_exact(case, POINTERS)


def test_a_forbidden_target_has_the_gradient_of_a_hopeless_one(device: torch.device) -> None:
    case = make_case(3, 70, 16, device=device, head="bias")
    assert case.head.bias is not None
    case.targets[1] = 5
    case.head.bias[5] = float("-inf")
    _, out, _, norms, target_logits, row_factor = run(case, POINTERS)
    assert target_logits[1] == float("-inf")
    assert (out[1, 5] * row_factor[1]).item() == pytest.approx(-1.0)
    assert norms.isfinite().all()
    assert (out * row_factor[:, None]).sum(1).abs().max() < 1e-5


@pytest.mark.parametrize("gap", [0.0, 30.0, 200.0])
def test_shards_of_the_vocabulary_add_up_to_the_whole(gap: float, device: torch.device) -> None:
    """A rank without the target uses offset 0; one that holds almost none of the softmax must not overflow."""
    case = make_case(9, 300, 16, device=device, shift=1.0)
    case.weight[150:, 0] += gap
    exact = case.to(torch.float64).results()
    parts = []
    for first, last in ((0, 150), (150, 300)):
        weight = case.weight[first:last]
        shard = Case(case.x, weight, case.targets - first, replace(case.head, weight=weight))
        out = torch.empty(9, 150, device=device)
        parts.append((shard, out, *exponentials_kernels.exponentials(*_operands(shard), out, tile=POINTERS)))
    target_logits = sum(part[4] for part in parts)
    tops = torch.stack([norms[:, 0] for *_, norms, _ in parts])
    # Any common reference will do: here the largest log-sum-exp.
    sums = torch.stack([norms[:, 0] + norms[:, 1].log() for *_, norms, _ in parts])
    top = sums.amax(0)
    others = sum(norms[:, 2] * (norms[:, 0] - top).exp() for *_, norms, _ in parts)
    norms = torch.stack([top, (sums - top).exp().sum(0), others], dim=1)
    assert tops.isfinite().all()
    gradients = []
    for shard, out, offset, _, _ in parts:
        row_factor = exponentials_kernels.fix_targets(out, shard.targets, target_logits, offset, norms, shard.head)
        gradients.append(out * row_factor[:, None])
    eager = [run["gradient"] for run in case.eager_runs()]
    assert_close("gradient", torch.cat(gradients, 1), eager, exact["gradient"], torch.float32, case.size())


def _operands(case: Case) -> tuple[Tensor, Tensor, Tensor, object]:
    return case.x, case.weight, case.targets, case.head


def test_a_call_repeats_bitwise(tile: GemmTile, device: torch.device) -> None:
    case, _ = hopeless_case(device, torch.float32, aligned=True)
    for a, b in zip(run(case, tile)[1:], run(case, tile)[1:], strict=True):
        assert torch.equal(a, b)


def test_nan_stays_in_its_row(device: torch.device) -> None:
    case = make_case(5, 203, 16, device=device)
    case.x[2] = float("nan")
    _, out, _, norms, _, row_factor = run(case, POINTERS)
    others = [0, 1, 3, 4]
    assert norms[2, 1].isnan()
    assert row_factor[2].isnan()
    assert out[others].isfinite().all()
    assert row_factor[others].isfinite().all()


def test_no_rows_are_no_work(device: torch.device) -> None:
    case = make_case(2, 50, 8, device=device)
    empty = replace(case, x=case.x[:0], targets=case.targets[:0])
    _, out, offset, norms, target_logits, row_factor = run(empty, POINTERS)
    assert out.shape == (0, 50)
    assert norms.shape == (0, 3)
    assert offset.shape == target_logits.shape == row_factor.shape == (0,)


def test_scratch_bytes_are_all_that_a_call_allocates() -> None:
    hopper = replace(DESCRIPTORS, BLOCK_N=256)
    # 501 tiles of 256, or top and total of 1002 tiles of 128; a list of rows and its flags and length.
    assert exponentials_kernels.scratch_bytes(4096, 128_256, hopper) == 4 * (2 * 1002 * 4096 + 2 * 4096 + 1)


def test_fp16_is_refused(device: torch.device) -> None:
    """fp16 has no exponents for the tail of a softmax."""
    case = make_case(2, 50, 8, device=device, dtype=torch.float16)
    with pytest.raises(ValueError, match="float16"):
        exponentials_kernels.exponentials(*_operands(case), torch.empty(2, 50, dtype=torch.bfloat16, device=device))
    wide = case.to(torch.float32)
    with pytest.raises(ValueError, match="float16"):
        exponentials_kernels.exponentials(*_operands(wide), torch.empty(2, 50, dtype=torch.float16, device=device))


def test_an_out_of_another_shape_is_refused(device: torch.device) -> None:
    case = make_case(2, 50, 8, device=device)
    with pytest.raises(ValueError, match=r"\(2, 49\)"):
        exponentials_kernels.exponentials(*_operands(case), torch.empty(2, 49, device=device))
