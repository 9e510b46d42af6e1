from collections.abc import Iterator

import pytest
import torch
from interpreter import patch_once_a_launch
from torch import Tensor

from hypo_kernels import amx, gemm

patch_once_a_launch()


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The GPU where there is one, so that the same tests run on real Triton."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def sixteen_bit_operands(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Make a CPU multiply 16-bit matrices into fp32, as CUDA does, with exact sums."""
    if device.type == "cuda":
        yield
        return

    def mm_(out: Tensor, a: Tensor, b: Tensor, *, accumulate: bool = False, may_round: bool = False) -> None:
        product = (a.double() @ b.double()).to(out.dtype)
        if accumulate:
            out.add_(product)
        else:
            out.copy_(product)

    monkeypatch.setattr(gemm, "operand_dtype", lambda device, compute_dtype: compute_dtype)
    monkeypatch.setattr(gemm, "mm_", mm_)
    yield


@pytest.fixture
def amx_products(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make any CPU multiply bf16 matrices as one with AMX does."""
    if device.type == "cuda":
        pytest.skip("products on a CPU")
    monkeypatch.setattr(amx, "is_supported", lambda: True)
