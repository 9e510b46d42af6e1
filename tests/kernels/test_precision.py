"""Autocast, and fp16 at the limits of its exponent."""

import pytest
import torch
from contract import (
    FUSED,
    IMPLS,
    Batch,
    assert_close,
    in_orders,
    plain_logps,
    plain_objective,
    random_batch,
    run_fused,
    truth,
    variants,
)
from torch import Tensor

from hypo_kernels import fused_hypo_loss

FP16_STEP = 2.0**-24  # between its smallest numbers
BOTH = {"lengths": [5, 9, 3, 7, 6, 1, 8, 4], "num_pairs": 2, "vocab": 67}


def under_autocast(batch: Batch, impl: str | None, dtype: torch.dtype, upstream: float = 1.0) -> dict[str, Tensor]:
    """Loss and gradients of a call, or of eager (``impl=None``), whose backward lies outside autocast."""
    with torch.autocast(batch.hidden.device.type, dtype):
        if impl is None:
            loss = plain_objective(batch, plain_logps(batch), batch.options["ref_logps"])
        else:
            loss = fused_hypo_loss(
                batch.hidden, batch.weight, batch.targets, batch.cu_seqlens, impl=impl, **batch.options
            ).loss
    (loss * upstream).backward()
    return {"loss": loss.detach(), "gradient of hidden": batch.hidden.grad, "gradient of weight": batch.weight.grad}


@pytest.mark.parametrize(("impl", "dtype"), variants(torch.bfloat16, torch.float16, impls=IMPLS))
def test_autocast_computes_in_its_dtype_with_fp32_gradients(
    impl: str, dtype: torch.dtype, device: torch.device
) -> None:
    batch = random_batch(**BOTH, device=device)
    exact = truth(batch)
    kernel = under_autocast(batch.to(torch.float32), impl, dtype)
    eager = in_orders(batch, lambda run, order: under_autocast(run, None, dtype))
    for name, value in kernel.items():
        assert value.dtype == torch.float32
        assert_close(name, value, [run[name] for run in eager], exact[name], dtype)
    # In its dtype indeed: the log-probs are those of rounded inputs, and not those of the fp32 ones.
    rounded = run_fused(batch.to(dtype), impl)["loss"]
    torch.testing.assert_close(kernel["loss"].double(), rounded, rtol=1e-5, atol=0)
    unrounded = run_fused(batch.to(torch.float32), impl)["loss"]
    assert abs(unrounded - rounded) > 10 * abs(kernel["loss"] - rounded)


@pytest.mark.parametrize("impl", IMPLS)
def test_autocast_takes_hidden_and_weight_of_different_dtypes(impl: str, device: torch.device) -> None:
    """A model under autocast hands over bf16 hidden states and keeps an fp32 head."""
    batch = random_batch(**BOTH, device=device)
    mixed = Batch(
        batch.hidden.detach().bfloat16().requires_grad_(), batch.weight, batch.targets, batch.cu_seqlens,
        options=batch.options,
    )  # fmt: skip
    got = under_autocast(mixed, impl, torch.bfloat16)
    expected = run_fused(batch.to(torch.bfloat16), impl)
    assert got["gradient of hidden"].dtype == torch.bfloat16
    assert got["gradient of weight"].dtype == torch.float32
    torch.testing.assert_close(got["loss"].double(), expected["loss"])
    torch.testing.assert_close(got["gradient of hidden"].double(), expected["gradient of hidden"])


@pytest.mark.parametrize("impl", FUSED)
def test_a_disabled_autocast_changes_nothing(impl: str, device: torch.device) -> None:
    batch = random_batch(**BOTH, device=device)
    expected = run_fused(batch.to(torch.float32), impl)
    with torch.autocast(device.type, torch.bfloat16, enabled=False):
        got = run_fused(batch.to(torch.float32), impl)
    assert torch.equal(got["gradient of weight"], expected["gradient of weight"])


def assert_close_without_eager(kernel: Tensor, exact: Tensor, step: float = 0.0) -> None:
    """Check the contract with eager's error as 0, where eager underflows.

    ``step`` allows for a result that is itself rounded to fp16's smallest numbers.
    """
    error = float((kernel.double() - exact).abs().max())
    assert error <= 2 * torch.finfo(torch.float16).eps * float(exact.abs().max()) + step


@pytest.mark.parametrize("impl", FUSED)
def test_fp16_weight_gradients_survive_coefficients_of_1e_7(
    impl: str, device: torch.device, sixteen_bit_operands: None
) -> None:
    """λ/(Gk) of a long batch: fp16 flushes everything below 6e-8, so the coefficients must not be rounded to it."""
    batch = random_batch([5, 9, 3, 7], 67, kl_coef=1e-7, device=device).to(torch.float16).to(torch.float32)
    exact = truth(batch)
    assert 0 < exact["gradient of weight"].abs().max() < 1e-6
    kernel = under_autocast(batch.to(torch.float32), impl, torch.float16)
    for name in ("gradient of weight", "gradient of hidden"):
        assert_close_without_eager(kernel[name], exact[name])


@pytest.mark.parametrize("impl", FUSED)
def test_fp16_coefficients_of_very_different_sizes_all_count(
    impl: str, device: torch.device, sixteen_bit_operands: None
) -> None:
    """A pair's coefficient is a thousand times a sample's, and some vocabulary entries are used by samples alone."""
    batch = random_batch([3, 3, 4, 4], 4096, num_pairs=1, kl_coef=5e-5, ignored=0.0, device=device)
    batch = batch.to(torch.float16).to(torch.float32)
    exact, kernel = truth(batch), under_autocast(batch.to(torch.float32), impl, torch.float16)
    for name in ("gradient of weight", "gradient of hidden"):
        assert_close_without_eager(kernel[name], exact[name])
    only_samples = batch.targets[6:].to(device)
    assert not set(batch.targets[:6].tolist()) & set(only_samples.tolist())
    name = "gradient of weight"
    assert exact[name][only_samples].abs().max() < 1e-2 * exact[name].abs().max()
    assert_close_without_eager(kernel[name][only_samples], exact[name][only_samples])


@pytest.mark.parametrize("impl", FUSED)
def test_a_loss_scale_still_saves_small_fp16_gradients(
    impl: str, device: torch.device, sixteen_bit_operands: None
) -> None:
    """Gradients of 1e-9 are zero in fp16; a GradScaler's 2^16 has to reach them before they are rounded."""
    scale = 2.0**16
    batch = random_batch([5, 9, 3, 7], 67, kl_coef=1e-8, device=device, dtype=torch.float16)
    exact = truth(batch, upstream=scale)
    kernel = run_fused(batch, impl, upstream=scale)
    for name in ("gradient of weight", "gradient of hidden"):
        assert exact[name].abs().max() / scale < FP16_STEP
        assert_close_without_eager(kernel[name], exact[name], FP16_STEP)


@pytest.mark.parametrize("impl", FUSED)
def test_the_tail_of_a_softmax_keeps_its_gradient_in_fp16(
    impl: str, device: torch.device, sixteen_bit_operands: None
) -> None:
    """Probabilities of 1e-6 are a few of fp16's smallest steps: they need the gradient's scale to be resolved."""
    gen = torch.Generator().manual_seed(0)
    weight = 0.1 * torch.randn(60, 1, generator=gen)
    weight[0] = 3.5  # a logit of 14 takes all but 5e-5 of the probability from the other 59
    batch = Batch(
        torch.full((2, 1), 4.0, device=device).requires_grad_(), weight.half().float().to(device).requires_grad_(),
        torch.tensor([1, -100]), torch.tensor([0, 1, 2]),
        options={"beta": 0.1, "kl_coef": 0.0, "num_pairs": 1, "ref_logps": torch.zeros(2, device=device)},
    )  # fmt: skip
    exact, kernel = truth(batch), under_autocast(batch.to(torch.float32), impl, torch.float16)
    name, tail = "gradient of weight", slice(2, None)
    assert exact[name][tail].abs().min() > 0
    assert_close_without_eager(kernel[name][tail], exact[name][tail])


@pytest.mark.parametrize(("impl", "dtype"), variants(torch.bfloat16, torch.float16))
def test_a_likely_targets_gradient_is_not_rounded_away(
    impl: str, dtype: torch.dtype, device: torch.device, sixteen_bit_operands: None
) -> None:
    """p − 1 of a target with p = 1 − 1e-3 is -1e-3, though both p and 1 round to 1 in bf16."""
    hidden = torch.full((2, 1), 8.0)
    weight = torch.zeros(60, 1)
    weight[7] = 1.375  # a logit of 11: 59 others hold 59·exp(−11) = 1e-3 of the probability
    batch = Batch(
        hidden.to(device, dtype).requires_grad_(), weight.to(device, dtype).requires_grad_(),
        torch.tensor([7, 7]), torch.tensor([0, 1, 2]),
        options={"beta": 1.0, "kl_coef": 0.0, "num_pairs": 0, "ref_logps": torch.tensor([-1.0, 1.0], device=device)},
    ).with_options(kl_coef=1.0)  # fmt: skip
    exact, kernel = truth(batch), run_fused(batch, impl)
    # One row up and one down: each alone is measured on its own hidden state.
    for row in range(2):
        expected = float(exact["gradient of hidden"][row, 0])
        assert expected != 0
        assert float(kernel["gradient of hidden"][row, 0]) == pytest.approx(expected, rel=2 * torch.finfo(dtype).eps)
