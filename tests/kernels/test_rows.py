"""The row steps alone: raw logits of a chunk -> statistics and unit gradients, in torch and in Triton."""

import importlib
import subprocess
import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from contract import FUSED, NO_TRITON
from torch import Tensor

from hypo_kernels.head import LMHead

OUT_DTYPES = [torch.float32, torch.bfloat16, torch.float16]
HEADS: dict[str, dict[str, Any]] = {
    "plain": {},
    "softcap": {"logit_softcap": 3.0},
    "scale and temperature": {"logit_scale": 0.5, "temperature": 0.8},
    "all": {"logit_softcap": 3.0, "logit_scale": 0.5, "temperature": 0.8, "bias": True},
}


PACKAGES = {"torch": "blockwise", "triton": "kernels"}


def row_steps(impl: str) -> ModuleType:
    return importlib.import_module(f"hypo_kernels.{PACKAGES[impl]}.rows")


def rows_of(
    num_rows: int, vocab: int, pitch: int, device: torch.device, head: dict[str, Any]
) -> tuple[Tensor, Tensor, Tensor, LMHead]:
    """A buffer full of NaN, a (C, V) view of raw logits in it, targets (C,) and a head."""
    gen = torch.Generator().manual_seed(0)
    buffer = torch.full((num_rows, pitch), float("nan"), device=device)
    raw = buffer[:, :vocab]
    raw.copy_(torch.randn(num_rows, vocab, generator=gen) * 3)
    targets = torch.randint(vocab, (num_rows,), generator=gen).to(device)
    targets[0], targets[-1] = 0, vocab - 1  # the ends of the row
    bias = torch.randn(vocab, generator=gen).to(device) if head.get("bias") else None
    weight = torch.empty(vocab, 1, device=device)
    return buffer, raw, targets, LMHead(weight, **{**head, "bias": bias})


def unit_gradients(
    impl: str,
    raw: Tensor,
    targets: Tensor,
    head: LMHead,
    known: Tensor | None = None,
    *,
    out_dtype: torch.dtype = torch.float32,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """U with its factor, and log-probs. It has its own memory if there is a factor."""
    unit, factor, logps = row_steps(impl).unit_gradients(
        raw, targets, head, norms=known, out_dtype=out_dtype, scale=scale
    )
    return unit if factor is None else (unit.to(factor.dtype) * factor[:, None]).to(unit.dtype), logps


def plain_unit_gradients(raw: Tensor, targets: Tensor, head: LMHead) -> tuple[Tensor, Tensor]:
    """U (C, V) and log-probs (C,), in float64 by autograd."""
    raw = raw.double().requires_grad_()
    logps = head.logits(raw).log_softmax(-1).gather(1, targets[:, None]).squeeze(1)
    (gradient,) = torch.autograd.grad(-logps.sum(), raw)
    return gradient, logps.detach()


# Around one warp's columns, one narrow tile and several wide ones with a partial last.
@pytest.mark.parametrize("vocab", [1, 3, 31, 128, 129, 1000, 9001])
@pytest.mark.parametrize("impl", FUSED)
def test_statistics_and_gradients_of_any_vocabulary_size(impl: str, vocab: int, device: torch.device) -> None:
    _, raw, targets, head = rows_of(3, vocab, vocab, device, {})
    expected, logps = plain_unit_gradients(raw, targets, head)
    steps = row_steps(impl)
    kept = raw.clone()
    torch.testing.assert_close(steps.statistics(kept, targets, head).logps(), logps.float())
    assert torch.equal(kept, raw)
    unit, got = unit_gradients(impl, raw.clone(), targets, head)
    torch.testing.assert_close(got, logps.float())
    torch.testing.assert_close(unit, expected.float())


@pytest.mark.parametrize("out_dtype", OUT_DTYPES)
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("impl", FUSED)
def test_gradients_are_narrowed_after_the_one_hot_is_subtracted(
    impl: str, head: str, out_dtype: torch.dtype, device: torch.device
) -> None:
    _, raw, targets, lm_head = rows_of(5, 1000, 1000, device, HEADS[head])
    expected, logps = plain_unit_gradients(raw, targets, lm_head)
    scale = 4096.0 if out_dtype == torch.float16 else 1.0
    unit, got = unit_gradients(impl, raw, targets, lm_head, out_dtype=out_dtype, scale=scale)
    assert unit.dtype == out_dtype
    torch.testing.assert_close(got, logps.float())
    # Every element to one unit in its last place: the interpreter cuts to bf16 where hardware rounds.
    rtol = max(torch.finfo(out_dtype).eps, 1e-5)
    torch.testing.assert_close(unit.double(), scale * expected, rtol=rtol, atol=2e-7 * scale)


@pytest.mark.parametrize("out_dtype", OUT_DTYPES)
@pytest.mark.parametrize("impl", FUSED)
def test_known_statistics_give_the_same_gradients(impl: str, out_dtype: torch.dtype, device: torch.device) -> None:
    _, raw, targets, head = rows_of(5, 1000, 1000, device, HEADS["all"])
    steps = row_steps(impl)
    stats = steps.statistics(raw.clone(), targets, head)
    first, logps = unit_gradients(impl, raw.clone(), targets, head, out_dtype=out_dtype)
    again, logps_of_again = unit_gradients(impl, raw.clone(), targets, head, stats.norms, out_dtype=out_dtype)
    torch.testing.assert_close(logps, stats.logps())
    torch.testing.assert_close(logps_of_again, logps)
    torch.testing.assert_close(again, first)


@pytest.mark.parametrize("out_dtype", OUT_DTYPES)
@pytest.mark.parametrize("impl", FUSED)
def test_columns_beyond_the_vocabulary_are_not_touched(impl: str, out_dtype: torch.dtype, device: torch.device) -> None:
    """CUDA's rows are padded to an aligned pitch; the padding holds NaN, and must keep it."""
    vocab, pitch = 1000, 1024
    buffer, raw, targets, head = rows_of(5, vocab, pitch, device, HEADS["all"])
    expected, logps = plain_unit_gradients(raw, targets, head)
    steps = row_steps(impl)
    stats = steps.statistics(raw.clone(), targets, head)
    unit, got = unit_gradients(impl, raw, targets, head, out_dtype=out_dtype)
    for values in (unit, stats.norms, stats.target, got):
        assert values.isfinite().all()
    torch.testing.assert_close(got, logps.float())
    torch.testing.assert_close(unit.double(), expected, rtol=torch.finfo(out_dtype).eps, atol=1e-6)
    assert buffer[:, vocab:].isnan().all()


@NO_TRITON
@pytest.mark.parametrize("out_dtype", OUT_DTYPES)
def test_triton_packs_16_bit_gradients_into_their_rows(out_dtype: torch.dtype, device: torch.device) -> None:
    rows_kernels = row_steps("triton")
    assert rows_kernels.GRADIENTS_IN_PLACE
    assert rows_kernels.scratch_bytes(5, 4000) == 0
    buffer, raw, targets, head = rows_of(5, 1000, 1024, device, {})
    unit, _ = unit_gradients("triton", raw, targets, head, out_dtype=out_dtype)
    assert unit.untyped_storage().data_ptr() == buffer.untyped_storage().data_ptr()
    for row in range(5):
        assert unit[row].data_ptr() == buffer[row].data_ptr()


@pytest.mark.parametrize("impl", FUSED)
def test_no_rows_are_no_work(impl: str, device: torch.device) -> None:
    _, raw, targets, head = rows_of(2, 100, 100, device, HEADS["all"])
    steps = row_steps(impl)
    logps = steps.statistics(raw[:0], targets[:0], head).logps()
    unit, more = unit_gradients(impl, raw[:0], targets[:0], head, out_dtype=torch.bfloat16)
    assert logps.shape == more.shape == (0,)
    assert unit.shape == (0, 100)


def test_torch_takes_rows_in_blocks_within_scratch_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    from hypo_kernels.blockwise import rows as rows_blocks

    device = torch.device("cpu")
    _, raw, targets, head = rows_of(11, 1000, 1000, device, HEADS["all"])
    whole = unit_gradients("torch", raw.clone(), targets, head)
    monkeypatch.setattr(rows_blocks, "BLOCK_BYTES", 3 * 4000)  # blocks of 3 rows, the last of 2
    blocks = unit_gradients("torch", raw.clone(), targets, head)
    for a, b in zip(whole, blocks, strict=True):
        torch.testing.assert_close(a, b)
    assert rows_blocks.scratch_bytes(2, 4000) == 2 * 2 * 4000
    assert rows_blocks.scratch_bytes(1000, 4000) == 2 * 3 * 4000
    assert rows_blocks.scratch_bytes(1000, 40_000) == 2 * 40_000  # a row is never split


FAR_ROWS = """
import sys, torch
from hypo_kernels.kernels import rows as rows_kernels
from hypo_kernels.head import LMHead
device, pitch, vocab = sys.argv[1], 2**30, 50
try:
    # 8.6 GB of addresses, of which a CPU backs only the pages that are touched: three.
    storage = torch.empty(2 * pitch + vocab, device=device)
except (RuntimeError, MemoryError):
    sys.exit("no room for 2^31 elements")
far = storage.as_strided((3, vocab), (pitch, 1))
near = torch.randn(3, vocab, device=device)
far.copy_(near)
targets = torch.tensor([0, 7, vocab - 1], device=device)
head = LMHead(torch.empty(vocab, 1, device=device))
expected, got = (rows_kernels.statistics(raw, targets, head).logps() for raw in (near, far))
assert torch.equal(got, expected), (got, expected)
"""


@NO_TRITON
def test_triton_addresses_rows_beyond_two_to_the_31_elements(device: torch.device) -> None:
    """Runs in a separate process, which a wrapped address would crash."""
    done = subprocess.run([sys.executable, "-c", FAR_ROWS, device.type], capture_output=True, text=True, check=False)
    if "no room" in done.stderr:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stderr
