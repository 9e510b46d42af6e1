"""Softmax statistics from a GEMM that stores no logits, against float64.

Logits are fp32 sums of products of the operands, whatever their dtype. So the operands are rounded first, and
then everything is compared in fp32: eager fp32 on the same numbers is what the kernel may not be worse than.
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from contract import assert_close
from head_cases import HEADS, NARROW, Case, make_case

from hypo_kernels.kernels.tiles import GemmTile

statistics_kernels = pytest.importorskip("hypo_kernels.kernels.statistics", exc_type=ImportError)
head_kernels = pytest.importorskip("hypo_kernels.kernels.head", exc_type=ImportError)
# numpy remarks on exp(−inf − top) and the like, which are meant.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

POINTERS = GemmTile(**NARROW)
DESCRIPTORS = replace(POINTERS, descriptors=True)
TILES = {"pointers": POINTERS, "descriptors": DESCRIPTORS}


@pytest.fixture(params=TILES)
def tile(request: pytest.FixtureRequest, device: torch.device) -> GemmTile:
    if request.param == "descriptors" and head_kernels.capability(device) not in [(0, 0), (9, 0), (10, 0)]:
        pytest.skip("no TMA on this device")
    return TILES[request.param]


def assert_exact(case: Case, tile: GemmTile | None) -> None:
    norms, target_logits, moment = statistics_kernels.statistics(
        case.x, case.weight, case.targets, case.head, with_moment=True, tile=tile
    )
    top, total, others = norms.unbind(1)
    got = {
        "lse": top + total.log(),
        "target logit": target_logits,
        "lse of the others": top + others.log(),
        "entropy": total.log() - moment / total,
    }
    exact, eager = case.to(torch.float64).results(), case.eager_runs()
    for name, value in got.items():
        assert_close(name, value, [run[name] for run in eager], exact[name], torch.float32, case.size())
    assert torch.all(target_logits[~case.inside] == 0)


# Less than a tile, whole tiles, partial last ones; widths below, at and beyond a block of features.
@pytest.mark.parametrize(("rows", "vocab", "width"), [(1, 7, 5), (16, 128, 32), (37, 203, 33), (2, 1003, 7)])
def test_any_shape(rows: int, vocab: int, width: int, tile: GemmTile, device: torch.device) -> None:
    assert_exact(make_case(rows, vocab, width, device=device, aligned=tile.descriptors), tile)


@pytest.mark.parametrize("head", HEADS)
def test_every_head(head: str, tile: GemmTile, device: torch.device) -> None:
    assert_exact(make_case(19, 203, 40, device=device, head=head, aligned=tile.descriptors), tile)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_operands_are_summed_in_fp32(dtype: torch.dtype, tile: GemmTile, device: torch.device) -> None:
    assert_exact(make_case(19, 203, 40, device=device, dtype=dtype, head="all", aligned=tile.descriptors), tile)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_frozen_tiles(dtype: torch.dtype, device: torch.device) -> None:
    assert_exact(make_case(130, 1003, 40, device=device, dtype=dtype, aligned=True), None)


@pytest.mark.parametrize("shift", [-1e4, 1e4, 150.0])
def test_logits_far_from_zero(shift: float, device: torch.device) -> None:
    """Columns of 0 beyond the vocabulary would dominate logits around −10,000."""
    assert_exact(make_case(5, 203, 16, device=device, shift=shift), POINTERS)


def test_logits_of_more_than_a_hundred_in_both_directions(device: torch.device) -> None:
    case = make_case(9, 203, 16, device=device, spread=100.0)
    assert case.size() > 200
    assert_exact(case, POINTERS)


def test_a_target_of_another_shard_has_the_logit_0(tile: GemmTile, device: torch.device) -> None:
    case = make_case(19, 203, 40, device=device, head="all", aligned=tile.descriptors)
    case.targets[3:6] = torch.tensor([-1, 203, 2**40])
    # Beyond the vocabulary, within its last tile.
    case.targets[7] = 255
    assert_exact(case, tile)


def test_entries_that_the_bias_forbids_count_nothing(device: torch.device) -> None:
    """Also for full tiles."""
    case = make_case(5, 203, 16, device=device, head="bias")
    assert case.head.bias is not None
    case.head.bias[64:150] = float("-inf")
    case.targets[:] = torch.tensor([0, 63, 150, 160, 202])
    assert_exact(case, POINTERS)


def test_operands_of_any_strides(device: torch.device) -> None:
    case = make_case(19, 203, 33, device=device)
    x, weight = case.x.t().contiguous().t(), case.weight.t().contiguous().t()
    assert_exact(Case(x, weight, case.targets, replace(case.head, weight=weight)), POINTERS)


def test_a_call_repeats_bitwise(tile: GemmTile, device: torch.device) -> None:
    case = make_case(37, 203, 40, device=device, head="all", aligned=tile.descriptors)
    first, second = (
        statistics_kernels.statistics(case.x, case.weight, case.targets, case.head, with_moment=True, tile=tile)
        for _ in range(2)
    )
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("group", [1, 3, 16])
def test_every_order_of_tiles_gives_the_same_numbers(group: int, device: torch.device) -> None:
    case = make_case(37, 400, 8, device=device)
    results = [
        statistics_kernels.statistics(case.x, case.weight, case.targets, case.head, tile=replace(POINTERS, group=order))
        for order in (2, group)
    ]
    for a, b in zip(*(result[:2] for result in results), strict=True):
        assert torch.equal(a, b)


def test_no_rows_are_no_work(device: torch.device) -> None:
    case = make_case(2, 50, 8, device=device)
    norms, target_logits, moment = statistics_kernels.statistics(
        case.x[:0], case.weight, case.targets[:0], case.head, with_moment=True
    )
    assert norms.shape == (0, 3)
    assert target_logits.shape == moment.shape == (0,)


def test_partials_are_all_that_a_call_allocates() -> None:
    assert statistics_kernels.scratch_bytes(8192, 128_256, GemmTile(128, 256, 64, 8, 4)) == 4 * 2 * 501 * 8192


def test_operands_of_two_dtypes_are_refused(device: torch.device) -> None:
    case = make_case(2, 50, 8, device=device)
    with pytest.raises(ValueError, match=r"bfloat16.*float32"):
        statistics_kernels.statistics(case.x.bfloat16(), case.weight, case.targets, case.head)
    with pytest.raises(ValueError, match=r"\(2, 8\).*\(50, 7\)"):
        statistics_kernels.statistics(case.x, case.weight[:, :7], case.targets, case.head)


FAR_ROWS = """
import sys, torch
from hypo_kernels.head import LMHead
from hypo_kernels.kernels.statistics import statistics
from hypo_kernels.kernels.tiles import GemmTile
device, pitch, width = sys.argv[1], 2**30, 8
try:
    # 8.6 GB of addresses, of which a CPU backs only the pages that are touched: three.
    storage = torch.empty(2 * pitch + width, device=device)
except (RuntimeError, MemoryError):
    sys.exit("no room for 2^31 elements")
far = storage.as_strided((3, width), (pitch, 1))
near = torch.randn(3, width, device=device)
far.copy_(near)
targets = torch.tensor([0, 2, 1], device=device)
tile = GemmTile(16, 64, 32, 4, 2)
for operands in ((far, near), (near, far)):
    got = statistics(*operands, targets, LMHead(operands[1]), tile=tile)
    expected = statistics(near, near, targets, LMHead(near), tile=tile)
    assert torch.equal(got[0], expected[0]), (got, expected)
"""


def test_addresses_beyond_two_to_the_31_elements(device: torch.device) -> None:
    """Runs in a separate process, which a wrapped address would crash."""
    done = subprocess.run([sys.executable, "-c", FAR_ROWS, device.type], capture_output=True, text=True, check=False)
    if "no room" in done.stderr:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stderr
