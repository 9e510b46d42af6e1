"""Every public function of hypo_kernels on a fake CUDA device: what is launched compiles, fits, and is fed well."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fake_device import CUDA, FakeCuda, fake_cuda
from torch import Tensor

from hypo_kernels import LoRA, fused_hypo_loss, sequence_logprobs, token_logprobs

CAPABILITIES = [(8, 0), (9, 0), (10, 0)]
HOPPER = (9, 0)
# The smallest, one and two tiles of the GEMM kernels, GPT-2's (odd), Llama's.
VOCABULARIES = [1, 12, 128, 200, 256, 257, 50257, 128256]
LENGTHS = {1: [1, 0, 0, 0], 15: [4, 3, 5, 3], 16: [4, 4, 4, 4], 4096: [1024] * 4}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def cuda(*shape: int, dtype: torch.dtype = torch.bfloat16, grad: bool = False) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device=CUDA, requires_grad=grad)


def run_everything(
    vocab: int, lengths: list[int], dtype: torch.dtype, *, width: int = 64, head: dict[str, Any], impl: str = "auto"
) -> None:
    """Call each function with a trained head, and without gradients."""
    rows = sum(lengths)
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    targets = torch.randint(vocab, (rows,))
    hidden, weight = cuda(rows, width, dtype=dtype, grad=True), cuda(vocab, width, dtype=dtype, grad=True)
    ref_weight = cuda(vocab, width, dtype=dtype)
    ref_hidden = cuda(rows, width, dtype=dtype)
    options: dict[str, Any] = dict(head)
    if options.pop("bias", False):
        options["bias"] = cuda(vocab, dtype=dtype, grad=True)
    if options.pop("lora", False):
        options["lora"] = LoRA(cuda(8, width, dtype=dtype, grad=True), cuda(vocab, 8, dtype=dtype, grad=True))
    loss = {"num_pairs": 1, "num_generations": 2, "beta": 0.1, "kl_coef": 0.01, **options, "impl": impl}
    fused_hypo_loss(hidden, weight, targets, bounds, ref_logps=cuda(4, dtype=torch.float32), **loss).loss.backward()
    if impl != "triton-epilogue":
        exact = {**loss, "kl_estimator": "exact", "ref_hidden": ref_hidden, "ref_lm_head_weight": ref_weight}
        if "bias" in options:
            exact["ref_bias"] = options["bias"].detach()
        fused_hypo_loss(hidden, weight, targets, bounds, **exact).loss.backward()
        logps, entropies = token_logprobs(hidden, weight, targets, return_entropy=True, impl=impl, **options)
        (logps.sum() + entropies.sum()).backward()
    sequence_logprobs(hidden, weight, targets, bounds, impl=impl, **options).sum().backward()
    with torch.no_grad():
        sequence_logprobs(hidden, weight, targets, bounds, impl=impl, **options)


def assert_sound(device: FakeCuda) -> None:
    assert device.record.launches
    assert device.record.products
    assert min(product.alignment for product in device.record.products) >= 16


@pytest.mark.parametrize("vocab", VOCABULARIES)
@pytest.mark.parametrize("capability", CAPABILITIES, ids=lambda c: f"sm_{c[0]}{c[1]}")
def test_every_vocabulary_compiles(capability: tuple[int, int], vocab: int) -> None:
    with fake_cuda(capability) as device:
        run_everything(vocab, LENGTHS[15], torch.bfloat16, head={})
    assert device.record.launches


@pytest.mark.parametrize("rows", LENGTHS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_any_number_of_rows_compiles(dtype: str, rows: int) -> None:
    with fake_cuda(HOPPER) as device:
        run_everything(257, LENGTHS[rows], DTYPES[dtype], head={})
        run_everything(128256, LENGTHS[rows], DTYPES[dtype], head={})
    assert_sound(device)


HEADS: dict[str, dict[str, Any]] = {
    "bias": {"bias": True},
    "softcap": {"logit_softcap": 30.0},
    "bias and softcap": {"bias": True, "logit_softcap": 30.0},
    "lora": {"lora": True},
}


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("capability", CAPABILITIES, ids=lambda c: f"sm_{c[0]}{c[1]}")
def test_every_head_compiles(capability: tuple[int, int], head: str) -> None:
    for vocab in (200, 50257):
        with fake_cuda(capability) as device:
            run_everything(vocab, LENGTHS[15], torch.bfloat16, head=HEADS[head])
        assert_sound(device)


@pytest.mark.parametrize("vocab", [1, 128, 257, 128256])
@pytest.mark.parametrize("capability", CAPABILITIES, ids=lambda c: f"sm_{c[0]}{c[1]}")
def test_the_epilogue_schedule_compiles(capability: tuple[int, int], vocab: int) -> None:
    with fake_cuda(capability) as device:
        run_everything(vocab, LENGTHS[15], torch.bfloat16, head={}, impl="triton-epilogue")
    assert "_exponentials_kernel" in {launch.kernel for launch in device.record.launches}


# Phi, Gemma 2, Qwen 2.5, Mistral, and a wide one: none of their rows is a multiple of 128 bytes times a power of two.
WIDTHS = [1536, 2560, 3072, 3584, 5120]
FROZEN_OR_TRAINED = [False, True]


@pytest.mark.parametrize("trained", FROZEN_OR_TRAINED)
@pytest.mark.parametrize("width", WIDTHS)
def test_an_fp32_head_under_autocast_is_converted_once_a_call(width: int, trained: bool) -> None:
    with fake_cuda(HOPPER) as device, torch.autocast("cuda", dtype=torch.bfloat16):
        hidden = cuda(4096, width, dtype=torch.float32, grad=True)
        weight = cuda(128256, width, dtype=torch.float32, grad=trained)
        targets, bounds = torch.randint(128256, (4096,)), torch.tensor([0, *LENGTHS[4096]]).cumsum(0)
        ref_logps = cuda(4, dtype=torch.float32)
        fused_hypo_loss(
            hidden, weight, targets, bounds, num_pairs=1, ref_logps=ref_logps, beta=0.1, kl_coef=0.1
        ).loss.backward()
    assert device.record.times_converted(weight) == 1
    assert min(product.alignment for product in device.record.products) == 16


@pytest.mark.parametrize("width", WIDTHS)
def test_panels_of_a_head_that_does_not_fit_are_aligned(width: int) -> None:
    with fake_cuda(HOPPER) as device, torch.autocast("cuda", dtype=torch.bfloat16):
        hidden, weight = cuda(256, width, dtype=torch.float32), cuda(128256, width, dtype=torch.float32)
        targets = torch.randint(128256, (256,))
        token_logprobs(hidden, weight, targets, max_chunk_bytes=2**28)
    assert len(device.record.products) > 1
    assert min(product.alignment for product in device.record.products) == 16


def test_ragged_batches_compile_each_kernel_once() -> None:
    """A length that is 1, or a multiple of 16, must not make the run wait for a compiler."""
    variants: dict[str, set[str]] = {}
    with fake_cuda(HOPPER) as device:
        for rows in (4 * 61, 4 * 64, 4 * 67, 4 * 80, 4):
            run_everything(32000, [rows // 4] * 4, torch.bfloat16, head={})
            run_everything(32000, [rows // 4] * 4, torch.bfloat16, head={}, impl="triton-epilogue")
            for launch in device.record.launches:
                variants.setdefault(launch.kernel, set()).add(launch.variant)
            if rows == 4 * 61:
                first = {kernel: len(hashes) for kernel, hashes in variants.items()}
    assert {kernel: len(hashes) for kernel, hashes in variants.items()} == first


def test_copies_to_the_device_are_pinned_and_few() -> None:
    with fake_cuda(HOPPER) as device:
        run_everything(257, LENGTHS[15], torch.bfloat16, head={})
    copies = device.record.copies
    assert copies
    assert all(copy.is_pinned and copy.non_blocking for copy in copies)
    assert len(copies) <= 2 * 5  # five calls, each with a layout and its order


@pytest.mark.parametrize("vocab", [50257, 128257])
def test_an_odd_vocabulary_keeps_wide_loads_and_stores(vocab: int) -> None:
    """A vocabulary of one added token, or GPT-2's: its rows are padded, so whole blocks are aligned."""
    with fake_cuda(HOPPER) as device:
        run_everything(vocab, LENGTHS[15], torch.bfloat16, head={}, impl="triton-rows")
    row_kernels = [launch for launch in device.record.launches if launch.kernel in ("_row_kernel", "_gradient_kernel")]
    assert row_kernels
    for launch in row_kernels:
        assert "ld.global.v4.b32" in launch.ptx, launch
        if "st.global.b16" in launch.ptx:  # gradients of 16 bits, the last block's one by one
            assert "st.global.v4.b32" in launch.ptx, launch


PAIRS = [1024] * 8


@pytest.mark.parametrize("memory", [80, 141])
def test_pairs_of_1024_tokens_take_one_pass(memory: int) -> None:
    with fake_cuda(HOPPER, memory * 10**9) as device:
        hidden, weight = cuda(sum(PAIRS), 4096, grad=True), cuda(128256, 4096, grad=True)
        targets, bounds = torch.randint(128256, (sum(PAIRS),)), torch.tensor([0, *PAIRS]).cumsum(0)
        ref_logps = cuda(8, dtype=torch.float32)
        fused_hypo_loss(hidden, weight, targets, bounds, num_pairs=4, ref_logps=ref_logps, beta=0.1, kl_coef=0.1)
    assert "_statistics_kernel" not in {launch.kernel for launch in device.record.launches}, "a second pass"
    logits = [product for product in device.record.products if product.shape[1] == 128256]
    assert sum(product.shape[0] for product in logits) == sum(PAIRS)
    assert max(p.shape[0] for p in logits) <= 1.1 * min(p.shape[0] for p in logits)
    if memory > 100:
        assert len(device.record.products) == 3, "one chunk: the weight's gradient is written once"


def test_a_device_without_tiles_takes_the_librarys_gemm() -> None:
    """An RTX 4090 has none of its own, and the fallback is a tile for operands at any address."""
    with fake_cuda((8, 9)) as device:
        token_logprobs(cuda(15, 64), cuda(1000, 64), torch.randint(1000, (15,)))
    assert [launch.kernel for launch in device.record.launches] == ["_row_kernel"]
    assert_sound(device)
