"""bf16 on a CPU with AMX: products of bf16 matrices, sums in fp32, and nothing rounded that the contract needs."""

from typing import Any

import pytest
import torch
from contract import FUSED, assert_contract, random_batch, run_fused
from torch import Tensor

from hypo_kernels import amx, gemm

pytestmark = pytest.mark.usefixtures("amx_products")

LENGTHS = [5, 9, 3, 7, 6, 1, 8, 4]  # two pairs, two groups of samples
CASES: dict[str, dict[str, Any]] = {
    "one chunk": {},
    "several chunks and panels": {"max_chunk_bytes": 2**16},
    "exact KL": {"kl_estimator": "exact", "with_ref_hidden": True},
}


def bf16_batch(device: torch.device, **options: Any) -> Any:
    return random_batch(LENGTHS, 301, num_pairs=2, width=48, dtype=torch.bfloat16, device=device, **options)


def matrices(*shapes: tuple[int, int]) -> list[Tensor]:
    gen = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=gen).bfloat16() for shape in shapes]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("impl", FUSED)
def test_bf16_products_keep_the_contract(impl: str, case: str, device: torch.device) -> None:
    assert_contract(bf16_batch(device, **CASES[case]), impl)


def test_operands_are_bf16_and_not_converted(device: torch.device) -> None:
    weight = torch.randn(4, 2, device=device).bfloat16()
    assert gemm.convert(weight, torch.bfloat16) is weight
    assert gemm.Panels.of(weight, torch.bfloat16, 2**20, 4).operand is weight


# Both sides of a block's edge, and both sides longer.
@pytest.mark.parametrize(("rows", "columns"), [(7, 300), (300, 7), (64, 64)])
@pytest.mark.parametrize("accumulate", [False, True])
def test_two_products_lose_little_of_logits(
    rows: int, columns: int, accumulate: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(amx, "BLOCK_BYTES", 2000)
    a, b = matrices((rows, 96), (96, columns))
    before = torch.ones(rows, columns) * accumulate
    out = before.clone() if accumulate else torch.full((rows, columns), torch.nan)
    gemm.mm_(out, a, b, accumulate=accumulate)
    exact = a.double() @ b.double() + before
    assert (out - exact).abs().max() < 2**-16 * exact.abs().max()
    gemm.mm_(out, a, b, may_round=True)
    assert (out - exact + before).abs().max() < 2**-8 * exact.abs().max()


def test_log_probs_are_those_of_fp32_products(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = bf16_batch(device)
    found = run_fused(batch, "torch")["logps"]
    monkeypatch.setattr(amx, "is_supported", lambda: False)
    torch.testing.assert_close(found, run_fused(batch, "torch")["logps"], rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_other_dtypes_are_multiplied_in_fp32(dtype: torch.dtype) -> None:
    assert gemm.operand_dtype(torch.device("cpu"), dtype) == torch.float32
