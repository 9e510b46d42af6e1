"""``max_chunk_bytes`` bounds the memory of a call without its gradients, and does not change the results."""

import gc
import importlib.util
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from contract import FUSED, assert_contract, random_batch, run_fused, slow_unless, variants
from loss_cases import call, gradient_bytes, least_budget
from meters import GemmMeter, peak_bytes
from torch import Tensor

from hypo_kernels import amx, gemm, token_logprobs

RAGGED: dict[str, Any] = {"lengths": [5, 9, 3, 7, 6, 2, 8, 4, 5, 3], "num_pairs": 3}
FULL_HEAD: dict[str, Any] = {"with_bias": True, "with_ref_hidden": True, "logit_softcap": 5.0}
EVERY_DTYPE = variants(torch.float32, torch.bfloat16, torch.float16, torch.float64)


def in_fp32_or_bf16(impl: str, dtype: torch.dtype) -> bool:
    """16-bit heads are converted, fp32 ones are not; fp16 and fp64 differ from these only in element size."""
    return dtype in (torch.float32, torch.bfloat16)


def fp32_in_torch(impl: str, dtype: torch.dtype) -> bool:
    """All dtypes share one schedule: torch runs it in fp32, Triton in bf16."""
    return dtype == (torch.float32 if impl == "torch" else torch.bfloat16)


@pytest.mark.parametrize("head", [{}, FULL_HEAD], ids=["plain head", "full head"])
@pytest.mark.parametrize(("impl", "dtype"), slow_unless(in_fp32_or_bf16, EVERY_DTYPE))
def test_budget_named_by_the_error_is_the_smallest(
    impl: str, dtype: torch.dtype, head: dict[str, Any], device: torch.device
) -> None:
    # 1000 entries: an fp32 copy of the 16-bit head is larger than a row, so its panels grow with the budget.
    batch = random_batch(**RAGGED, **head, vocab=1000, device=device, dtype=dtype)
    needed = least_budget(batch, impl)
    with pytest.raises(ValueError, match=f"max_chunk_bytes={needed - 1} .* pass at least {needed} "):
        call(batch, impl, max_chunk_bytes=needed - 1)
    assert call(batch, impl, max_chunk_bytes=needed).isfinite()


@pytest.mark.parametrize("rows", [1, 7, 20])  # every group recomputed, some, several whole groups a chunk
@pytest.mark.parametrize("head", [{}, FULL_HEAD], ids=["plain head", "full head"])
@pytest.mark.parametrize(("impl", "dtype"), slow_unless(fp32_in_torch, EVERY_DTYPE))
def test_small_budgets_give_the_same_results(
    impl: str, dtype: torch.dtype, head: dict[str, Any], rows: int, device: torch.device
) -> None:
    batch = random_batch(**RAGGED, **head, vocab=67, device=device, dtype=dtype)
    # About `rows` rows: beside the first one, each takes its logits, in 5 copies at most, and its features.
    budget = least_budget(batch, impl) + (rows - 1) * (67 * 5 + 16 * 5) * dtype.itemsize
    assert_contract(batch.with_options(max_chunk_bytes=budget), impl)


@pytest.mark.parametrize(
    ("impl", "dtype"),
    slow_unless(lambda impl, dtype: dtype == torch.bfloat16, variants(torch.bfloat16, torch.float16)),
)
def test_small_budgets_give_the_same_results_on_16_bit_operands(
    impl: str, dtype: torch.dtype, device: torch.device, sixteen_bit_operands: None
) -> None:
    batch = random_batch(**RAGGED, **FULL_HEAD, vocab=67, device=device, dtype=dtype)
    assert_contract(batch.with_options(max_chunk_bytes=least_budget(batch, impl)), impl)


@pytest.mark.parametrize("impl", FUSED)
def test_ignored_group_after_a_too_large_one_is_harmless(
    impl: str, device: torch.device, sixteen_bit_operands: None
) -> None:
    """The first pair fills more than a chunk, so that the last chunk has only groups without rows."""
    batch = random_batch(
        [9, 4, 9, 4], 67, num_pairs=2, ignored=0.0, ignored_sequences=[1, 3], device=device, dtype=torch.float16
    )
    assert_contract(batch.with_options(max_chunk_bytes=least_budget(batch, impl)), impl)


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA multiplies 16-bit heads as they are, as AMX does")
@pytest.mark.parametrize("impl", FUSED)
def test_large_16_bit_head_is_converted_in_panels_on_a_cpu(impl: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(amx, "is_supported", lambda: False)
    whole = random_batch(**RAGGED, vocab=1000, device=torch.device("cpu"), dtype=torch.bfloat16)
    # An fp32 copy of the head takes 64,000 bytes; its share is a quarter of the budget, in two panels of 195 rows.
    budget = 100_000
    small = whole.to(torch.bfloat16).with_options(max_chunk_bytes=budget)
    heads = [batch.weight.untyped_storage().data_ptr() for batch in (whole, small)]
    converted: list[int] = []
    convert = gemm.convert

    def spy(x: Tensor, compute_dtype: torch.dtype) -> Tensor:
        if x.untyped_storage().data_ptr() in heads:
            converted.append(len(x))
        return convert(x, compute_dtype)

    monkeypatch.setattr(gemm, "convert", spy)
    expected = run_fused(whole, impl)
    assert converted == [1000]
    converted.clear()
    panels = run_fused(small, impl)
    assert max(converted) * 16 * 4 * 2 <= budget // 4
    assert sum(converted) % 1000 == 0
    assert_contract(small, impl, kernel=panels)
    torch.testing.assert_close(panels["loss"], expected["loss"])


@pytest.mark.parametrize("impl", FUSED)
def test_the_default_budget_runs_a_small_batch_in_one_chunk(impl: str, device: torch.device) -> None:
    batch = random_batch(**RAGGED, vocab=67, device=device)
    with GemmMeter() as meter:
        call(batch, impl).backward()
    assert len(meter.shapes) == 3


@pytest.fixture
def prompt_garbage(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Collect Triton's arguments after each launch: its interpreter leaves them in reference cycles."""
    if device.type == "cuda" or importlib.util.find_spec("triton") is None:
        yield
        return
    from hypo_kernels.kernels import rows as rows_kernels

    launch = rows_kernels._launch

    def launch_and_collect(*args: Any, **kwargs: Any) -> Tensor:
        logps = launch(*args, **kwargs)
        gc.collect()
        return logps

    monkeypatch.setattr(rows_kernels, "_launch", launch_and_collect)
    gc.collect()
    gc.freeze()  # what is there already need not be looked at again
    yield
    gc.unfreeze()


MEMORY_HEADS = {"plain": {}, "softcap, bias and reference": FULL_HEAD}


@pytest.mark.parametrize("budget", [80_000, pytest.param(180_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("head", MEMORY_HEADS)
@pytest.mark.parametrize(("impl", "dtype"), slow_unless(in_fp32_or_bf16, EVERY_DTYPE))
def test_call_stays_within_budget_plus_gradients(
    impl: str, dtype: torch.dtype, head: str, budget: int, device: torch.device, prompt_garbage: None
) -> None:
    # 60 rows of 1000 logits are 240 kB in fp32, 480 kB in fp64: more than either budget holds. CUDA's
    # allocator rounds up to 512 bytes, which only larger tensors make negligible.
    grow = 8 if device.type == "cuda" else 1
    budget *= grow**2
    batch = random_batch(
        [6 * grow] * 10, 1000 * grow, num_pairs=3, ignored=0.1, **MEMORY_HEADS[head], device=device, dtype=dtype
    )
    held, copies = gradient_bytes(batch)
    if device.type == "cuda":
        call(batch, impl, max_chunk_bytes=budget)  # the first call allocates what lives on: cuBLAS workspaces
    assert peak_bytes(device, lambda: call(batch, impl, max_chunk_bytes=budget)) <= budget + held
    batch.hidden.grad = batch.weight.grad = None
    peak = peak_bytes(device, lambda: call(batch, impl, max_chunk_bytes=budget).backward())
    assert peak <= max(budget + held, held + copies)


@pytest.mark.parametrize("k", [2, 10])
@pytest.mark.parametrize(  # under the interpreter, 800 rows of two heads take 5 seconds
    ("impl", "dtype"),
    slow_unless(lambda impl, dtype: impl == "torch", variants(torch.float32, torch.bfloat16)),
)
def test_exact_kl_stays_within_budget_plus_gradients(
    impl: str, dtype: torch.dtype, k: int, device: torch.device, prompt_garbage: None
) -> None:
    """Many rows with few logits, so that memory kept for each row matters."""
    grow = 8 if device.type == "cuda" else 1
    batch = random_batch(
        [40 * grow] * 20, 50 * grow, num_generations=k, with_ref_hidden=True, kl_estimator="exact", ignored=0.0,
        device=device, dtype=dtype,
    )  # fmt: skip
    held, copies = gradient_bytes(batch)
    budget = 2 * least_budget(batch, impl)
    if device.type == "cuda":
        call(batch, impl, max_chunk_bytes=budget)
    peak = peak_bytes(device, lambda: call(batch, impl, max_chunk_bytes=budget))
    assert peak <= budget + held + copies


@pytest.mark.parametrize("budget", [60_000, pytest.param(180_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("impl", "dtype"), variants(torch.float32, torch.bfloat16))
def test_token_logprobs_stay_within_budget_plus_gradients(
    impl: str, dtype: torch.dtype, budget: int, device: torch.device, prompt_garbage: None
) -> None:
    grow = 8 if device.type == "cuda" else 1
    budget *= grow**2
    batch = random_batch([30 * grow, 30 * grow], 1000 * grow, ignored=0.1, device=device, dtype=dtype)
    held, copies = gradient_bytes(batch)

    def rows() -> Tensor:
        return token_logprobs(batch.hidden, batch.weight, batch.targets, impl=impl, max_chunk_bytes=budget)

    if device.type == "cuda":
        rows()
    assert peak_bytes(device, rows) <= budget
    assert peak_bytes(device, lambda: rows().sum().backward()) <= budget + held + copies


@pytest.mark.parametrize("impl", FUSED)
def test_memory_does_not_grow_with_the_number_of_tokens(impl: str, device: torch.device, prompt_garbage: None) -> None:
    grow = 8 if device.type == "cuda" else 1
    budget = 120_000 * grow**2

    def peak(pairs: int) -> int:
        batch = random_batch([5 * grow] * 2 * pairs, 1000 * grow, num_pairs=pairs, ignored=0.0, device=device)
        if device.type == "cuda":
            call(batch, impl, max_chunk_bytes=budget)
        return peak_bytes(device, lambda: call(batch, impl, max_chunk_bytes=budget)) - gradient_bytes(batch)[0]

    assert peak(4) <= budget
    assert peak(16) <= budget


@pytest.mark.slow
@pytest.mark.parametrize("budget", [2**30, 2**28], ids=["1 GiB", "256 MiB"])
def test_16384_tokens_stay_within_budget_plus_gradients(budget: int, device: torch.device) -> None:
    """Full logits would take 3.3 GB in fp32, and their gradients another 3.3 GB."""
    batch = random_batch([1024] * 16, 50304, width=64, num_pairs=4, ignored=0.0, cheap_reference=True, device=device)
    assert int((batch.targets != -100).sum()) == 16_384
    held, _ = gradient_bytes(batch)
    peak = peak_bytes(device, lambda: call(batch, "auto", max_chunk_bytes=budget).backward())
    print(f"peak {peak / 2**20:.0f} MiB, of which gradients {held / 2**20:.0f} MiB, budget {budget / 2**20:.0f} MiB")
    assert peak <= budget + held
    assert batch.hidden.grad.isfinite().all()
