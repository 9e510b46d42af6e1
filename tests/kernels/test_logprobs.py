"""``token_logprobs`` and ``sequence_logprobs``: values, gradients, and reuse of their graphs."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from contract import (
    FUSED,
    IMPLS,
    NO_TRITON,
    ROWS,
    Batch,
    assert_close,
    crossed,
    in_orders,
    plain_logps,
    random_batch,
    take,
    variants,
)
from meters import GemmMeter
from torch import Tensor

from hypo_kernels import sequence_logprobs, token_logprobs

# Columns beyond the vocabulary, where the interpreter's exp may overflow, are masked when they are stored.
pytestmark = [
    pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:invalid value encountered in multiply:RuntimeWarning"),
]

RAGGED: dict[str, Any] = {"lengths": [5, 9, 3, 7], "vocab": 67}
CASES: dict[str, dict[str, Any]] = {
    "ragged": {**RAGGED, "vocab": 257},
    "vocabulary of 50257": {"lengths": [2, 3], "vocab": 50257, "ignored": 0.0},
    "vocabulary of 3": {**RAGGED, "vocab": 3},
    "all logits far below zero": {**RAGGED, "offset": -200.0},
    "logits beyond 100": {**RAGGED, "spread": 60.0},
    "one token": {"lengths": [1], "vocab": 67, "ignored": 0.0},
    "the whole head": {**RAGGED, "with_bias": True, "logit_softcap": 5.0, "logit_scale": 1.5, "temperature": 0.8},
}
# A softmax in fp32 gives p = 1 from a lead of 17 on. The others' logits spread little: the lead decides.
CONFIDENT: dict[str, dict[str, Any]] = {
    f"a lead of {lead} in {vocab}": {
        "lengths": [5, 2] if vocab == 64 else [2, 1], "vocab": vocab, "lead": lead, "spread": 0.3,
        "ignored": 0.3 if vocab == 64 else 0.0,
    }
    for vocab in (64, 50257) for lead in (10.0, 18.0, 25.0, 60.0)
}  # fmt: skip
CONFIDENT["a lead of 25 under a whole head"] = {
    **CONFIDENT["a lead of 25.0 in 64"], "with_bias": True, "logit_softcap": 40.0, "logit_scale": 1.5,
    "temperature": 1.1,
}  # fmt: skip
HEAD = ("logit_softcap", "logit_scale", "temperature")


def logps_batch(dtype: torch.dtype, device: torch.device, **case: Any) -> Batch:
    """A batch whose ``options`` are those of ``token_logprobs`` alone."""
    batch = random_batch(**{"num_generations": len(case["lengths"]), **case}, dtype=dtype, device=device)
    return Batch(
        batch.hidden, batch.weight, batch.targets, batch.cu_seqlens, batch.bias,
        {name: value for name, value in batch.options.items() if name in HEAD},
    )  # fmt: skip


def plain_rows(batch: Batch) -> Tensor:
    """Return token log-probs (T,)."""
    return plain_logps(replace(batch, cu_seqlens=torch.arange(len(batch.targets) + 1)))


def fused_rows(batch: Batch, impl: str, **options: Any) -> Tensor:
    return token_logprobs(
        batch.hidden, batch.weight, batch.targets, bias=batch.bias, impl=impl, **batch.options, **options
    )


def results(batch: Batch, rows: Tensor, upstream: Tensor) -> dict[str, Tensor]:
    rows.backward(upstream.to(rows.dtype))
    leaves = {"hidden": batch.hidden, "weight": batch.weight, "bias": batch.bias}
    out = {f"gradient of {name}": leaf.grad for name, leaf in leaves.items() if leaf is not None}
    return {"logps": rows.detach(), **out}


@pytest.mark.parametrize("budget", ["whole", "a row or two at a time"])
@pytest.mark.parametrize(
    ("impl", "dtype", "case"),
    crossed(
        variants(torch.float32, torch.bfloat16, torch.float16, torch.float64, impls=IMPLS),
        CASES,
        lambda impl, dtype, case: dtype == torch.float32 or case in ("ragged", "the whole head"),
    ),
)
def test_token_logprobs_are_within_the_contract(
    impl: str, dtype: torch.dtype, case: str, budget: str, device: torch.device
) -> None:
    if budget != "whole" and case == "vocabulary of 50257":
        pytest.skip("products over 50257 terms are compared at eager's own shapes, hence whole")
    # 67 fp64 logits, four scratch copies of them, and panels of the head: some ten thousand bytes
    options = {} if budget == "whole" else {"max_chunk_bytes": 20_000}
    assert_rows_contract(logps_batch(dtype, device, **CASES[case]), impl, **options)


@pytest.mark.parametrize(
    ("impl", "dtype", "case"),
    [
        *crossed(
            variants(torch.float32, torch.bfloat16, torch.float64, impls=IMPLS),
            CONFIDENT,
            lambda impl, dtype, case: dtype == torch.float32 or "25" in case,
        ),
        *crossed(
            variants(torch.bfloat16, impls=[pytest.param("triton-epilogue", marks=NO_TRITON)]),
            CONFIDENT,
            lambda impl, dtype, case: True,
        ),
    ],
)
def test_nearly_certain_tokens_are_within_the_contract(
    impl: str, dtype: torch.dtype, case: str, device: torch.device
) -> None:
    """The value and the gradient, which a softmax that is rounded at 1 would lose."""
    assert_rows_contract(logps_batch(dtype, device, **CONFIDENT[case]), impl)


@pytest.mark.parametrize("impl", FUSED)
def test_nearly_certain_tokens_stay_exact_beside_entropies(impl: str, device: torch.device) -> None:
    """Entropies bring other statistics and another row step."""
    batch = logps_batch(torch.float32, device, **CONFIDENT["a lead of 25.0 in 64"])
    assert_rows_contract(batch, impl, return_entropy=True)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_lead_of_25_leaves_its_gradient(impl: str, device: torch.device) -> None:
    """With V = 64, log p = −63·exp(−25), and the derivative by the target's logit is −expm1(log p)."""
    weight = torch.zeros(64, 2, device=device)
    weight[5, 0] = 25.0
    hidden = torch.tensor([[1.0, 0.0]], device=device, requires_grad=True)
    rows = token_logprobs(hidden, weight, torch.tensor([5]), impl=impl)
    rows.sum().backward()
    assert hidden.grad is not None
    assert rows.item() == pytest.approx(-8.749e-10, rel=1e-4)
    assert hidden.grad[0, 0].item() == pytest.approx(25 * 8.749e-10, rel=1e-4)


def assert_rows_contract(batch: Batch, impl: str, **options: Any) -> None:
    """Check log-probs and gradients of ``token_logprobs(..., **options)`` against the contract."""
    dtype, device = batch.hidden.dtype, batch.hidden.device
    gen = torch.Generator().manual_seed(3)
    upstream = torch.randn(len(batch.targets), generator=gen, dtype=torch.float64).to(device)
    exact_batch, kernel_batch = batch.to(torch.float64), batch.to(dtype)
    exact = results(exact_batch, plain_rows(exact_batch), upstream)
    eager = in_orders(batch, lambda run, order: results(run, plain_rows(run), take(upstream, "t", order)), ROWS)
    found = fused_rows(kernel_batch, impl, **options)
    kernel = results(kernel_batch, found[0] if options.get("return_entropy") else found, upstream)
    assert kernel["logps"].dtype == torch.promote_types(dtype, torch.float32)
    for name, value in exact.items():
        if dtype == torch.float64:
            torch.testing.assert_close(kernel[name], value, rtol=1e-7, atol=1e-7 * float(value.abs().max()))
        else:
            assert_close(name, kernel[name], [run[name] for run in eager], value, dtype)


@pytest.mark.parametrize("impl", IMPLS)
def test_ignored_rows_are_exactly_zero_and_get_no_gradient(impl: str, device: torch.device) -> None:
    batch = logps_batch(torch.float32, device, **RAGGED)
    rows = fused_rows(batch, impl)
    ignored = (batch.targets == -100).to(device)
    assert ignored.any()
    assert not rows[ignored].any()
    rows.sum().backward()
    assert not batch.hidden.grad[ignored].any()
    assert batch.hidden.grad[~ignored].any(dim=1).all()


@pytest.mark.parametrize("impl", IMPLS)
def test_log_probs_of_nothing_but_ignored_rows_are_zero(impl: str, device: torch.device) -> None:
    batch = logps_batch(torch.float32, device, **{**RAGGED, "ignored": 1.1})
    rows = fused_rows(batch, impl)
    rows.sum().backward()
    assert not rows.any()
    assert not batch.hidden.grad.any()
    assert not batch.weight.grad.any()


@pytest.mark.parametrize("impl", IMPLS)
def test_a_graph_kept_alive_can_be_used_twice(impl: str, device: torch.device) -> None:
    batch = logps_batch(torch.float32, device, **RAGGED)
    rows = fused_rows(batch, impl)
    rows.sum().backward(retain_graph=True)
    once = batch.weight.grad.clone()
    rows.sum().backward()
    torch.testing.assert_close(batch.weight.grad, 2 * once)


@pytest.mark.parametrize("impl", IMPLS)
def test_log_probs_used_twice_in_one_loss_add_up(impl: str, device: torch.device) -> None:
    batch = logps_batch(torch.float32, device, **RAGGED)
    rows = fused_rows(batch, impl)
    (rows.sum() + 2 * rows.square().sum()).backward()
    other = batch.to(torch.float32)
    again = fused_rows(other, impl)
    again.backward(1 + 4 * again.detach())
    torch.testing.assert_close(batch.weight.grad, other.weight.grad)


@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_gradcheck_passes_in_float64(impl: str) -> None:
    batch = logps_batch(
        torch.float64, torch.device("cpu"), lengths=[3, 2], vocab=5, width=3, with_bias=True, logit_softcap=4.0,
        temperature=0.8, logit_scale=1.2,
    )  # fmt: skip

    def rows(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return token_logprobs(hidden, weight, batch.targets, bias=bias, impl=impl, **batch.options)

    assert torch.autograd.gradcheck(rows, (batch.hidden, batch.weight, batch.bias))


@pytest.mark.parametrize("impl", FUSED)
def test_only_the_gradients_asked_for_are_computed(impl: str, device: torch.device) -> None:
    full = logps_batch(torch.float32, device, **CASES["the whole head"])
    fused_rows(full, impl).sum().backward()
    for wanted in ("hidden", "weight", "bias"):
        batch = full.to(torch.float32)
        for name in ("hidden", "weight", "bias"):
            getattr(batch, name).requires_grad_(name == wanted)
        fused_rows(batch, impl).sum().backward()
        for name in ("hidden", "weight", "bias"):
            gradient = getattr(batch, name).grad
            if name == wanted:
                torch.testing.assert_close(gradient, getattr(full, name).grad)
            else:
                assert gradient is None


@pytest.mark.parametrize("impl", IMPLS)
def test_the_padded_form_gives_the_packed_forms_log_probs(impl: str, device: torch.device) -> None:
    batch = logps_batch(torch.float32, device, lengths=[6, 6, 6], vocab=67)
    packed = fused_rows(batch, impl)
    hidden = batch.hidden.detach().view(3, 6, 16).requires_grad_()
    padded = token_logprobs(hidden, batch.weight, batch.targets.view(3, 6), impl=impl)
    assert padded.shape == (3, 6)
    assert torch.equal(padded.flatten(), packed)
    padded.sum().backward()
    packed.sum().backward()
    assert torch.equal(hidden.grad.view(18, 16), batch.hidden.grad)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("padded", [False, True])
def test_sequence_log_probs_are_sums_of_token_log_probs(impl: str, padded: bool, device: torch.device) -> None:
    batch = logps_batch(torch.float32, device, lengths=[6, 6, 6, 6], vocab=67, ignored_sequences=[2])
    shape = (4, 6) if padded else (24,)
    hidden, targets = batch.hidden.view(*shape, 16), batch.targets.view(shape)
    tokens = token_logprobs(hidden, batch.weight, targets, impl=impl)
    sums = sequence_logprobs(hidden, batch.weight, targets, None if padded else batch.cu_seqlens, impl=impl)
    torch.testing.assert_close(sums, tokens.view(4, 6).sum(1))
    assert sums[2].item() == 0.0
    upstream = torch.tensor([1.0, -2.0, 5.0, 0.5], device=device)
    expected = torch.autograd.grad(tokens.view(4, 6).sum(1), [batch.hidden, batch.weight], upstream)
    got = torch.autograd.grad(sums, [batch.hidden, batch.weight], upstream)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("impl", IMPLS)
def test_sequences_of_unequal_lengths_are_summed_apart(impl: str, device: torch.device) -> None:
    batch = logps_batch(torch.float32, device, lengths=[5, 0, 9, 1, 3], vocab=67)
    sums = sequence_logprobs(batch.hidden, batch.weight, batch.targets, batch.cu_seqlens, impl=impl)
    torch.testing.assert_close(sums, plain_logps(batch))


@pytest.mark.parametrize("impl", FUSED)
def test_under_no_grad_nothing_but_the_logits_is_computed(impl: str, device: torch.device) -> None:
    batch = logps_batch(torch.float32, device, **RAGGED)
    with torch.no_grad(), GemmMeter() as meter:
        rows = fused_rows(batch, impl)
        sums = sequence_logprobs(batch.hidden, batch.weight, batch.targets, batch.cu_seqlens, impl=impl)
    assert not rows.requires_grad
    assert not sums.requires_grad
    assert len(meter.shapes) == 2


@pytest.mark.parametrize("impl", FUSED)
def test_equal_inputs_give_bitwise_equal_logprobs_and_gradients(impl: str, device: torch.device) -> None:
    batch = logps_batch(torch.float32, device, **CASES["the whole head"])
    first, second = (
        results(run, fused_rows(run, impl, max_chunk_bytes=20_000), torch.ones(len(batch.targets), device=device))
        for run in (batch.to(torch.float32), batch.to(torch.float32))
    )
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


@pytest.mark.parametrize("impl", IMPLS)
def test_cross_entropy_is_built_from_token_log_probs(impl: str, device: torch.device) -> None:
    """An SFT loss built from token log-probs equals torch's cross-entropy."""
    batch = logps_batch(torch.float32, device, **RAGGED)
    counted = (batch.targets != -100).sum()
    loss = -fused_rows(batch, impl).sum() / counted
    expected = F.cross_entropy(batch.hidden @ batch.weight.t(), batch.targets.to(device))
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("impl", FUSED)
def test_autocast_reaches_the_backward_pass_outside_of_it(impl: str, device: torch.device) -> None:
    batch = logps_batch(torch.float32, device, **RAGGED)
    with torch.autocast(device.type, torch.bfloat16):
        rows = fused_rows(batch, impl)
    rows.sum().backward()
    rounded = logps_batch(torch.float32, device, **RAGGED).to(torch.bfloat16)
    expected = fused_rows(rounded, impl)
    expected.sum().backward()
    assert torch.equal(rows, expected)
    assert batch.weight.grad.dtype == torch.float32
    torch.testing.assert_close(batch.weight.grad.to(torch.bfloat16), rounded.weight.grad)
