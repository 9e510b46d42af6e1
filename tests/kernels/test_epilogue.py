"""``impl="triton-epilogue"``: the loss from exponentials that a GEMM computes, within the contract."""

from typing import Any

import pytest
import torch
from contract import NO_TRITON, assert_contract, random_batch, run_fused, slow_unless
from loss_cases import BOTH, CASES
from meters import GemmMeter

from hypo_kernels import LoRA, fused_hypo_loss, token_logprobs

IMPL = "triton-epilogue"
pytestmark = [
    NO_TRITON,
    # Columns beyond the vocabulary, where the interpreter's exp may overflow, are masked when they are stored.
    pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning"),
]


@pytest.mark.parametrize("case", slow_unless(lambda case: case != "vocabulary of 50257", CASES))  # takes 7 seconds
def test_every_case_of_the_loss_is_within_the_contract(
    case: str, device: torch.device, sixteen_bit_operands: None
) -> None:
    """In bf16, its compute dtype: 20 nats of offset cost digits that fp32 has and bf16 does not."""
    assert_contract(random_batch(**CASES[case], device=device, dtype=torch.bfloat16), IMPL)


@pytest.mark.parametrize(
    "case", ["ragged pairs and samples", pytest.param("everything at once", marks=pytest.mark.slow)]
)
def test_groups_larger_than_a_chunk_are_made_again(case: str, device: torch.device, sixteen_bit_operands: None) -> None:
    batch = random_batch(**CASES[case], device=device, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="pass at least") as error:
        run_fused(batch.with_options(max_chunk_bytes=1), IMPL)
    needed = int(str(error.value).split("at least ")[1].split()[0])
    assert_contract(batch.with_options(max_chunk_bytes=needed), IMPL)


def test_it_costs_what_the_other_schedule_costs(device: torch.device) -> None:
    batch = random_batch(**BOTH, vocab=67, device=device, dtype=torch.bfloat16)
    rows = int((batch.targets != -100).sum())
    for frozen, expected in ((False, 6), (True, 4)):
        batch.weight.requires_grad_(not frozen)
        with GemmMeter() as meter:
            run_fused(batch, IMPL)
        assert meter.flops == expected * rows * batch.weight.numel()


def test_token_log_probs_take_it_too(device: torch.device) -> None:
    batch = random_batch([5, 9, 3, 7], 67, device=device, dtype=torch.bfloat16, num_generations=4)
    results = []
    for impl in (IMPL, "triton-rows"):
        run = batch.to(torch.bfloat16)
        rows = token_logprobs(run.hidden, run.weight, run.targets, impl=impl)
        rows.backward(torch.linspace(-1, 1, len(rows), device=device))
        results.append((rows.detach(), run.hidden.grad, run.weight.grad))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_the_same_inputs_give_bitwise_the_same_result(device: torch.device) -> None:
    batch = random_batch(**BOTH, vocab=257, device=device, dtype=torch.bfloat16)
    first, second = (run_fused(batch.to(torch.bfloat16), IMPL) for _ in range(2))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


UNSERVED: dict[str, dict[str, Any]] = {
    "fp16": {"dtype": torch.float16},
    "a lora update": {"lora": True},
    "the exact KL": {"kl_estimator": "exact", "with_ref_hidden": True},
    "a head too large to be one operand": {"dtype": torch.bfloat16, "max_chunk_bytes": 30_000},
}


@pytest.mark.parametrize("case", UNSERVED)
def test_epilogue_refuses_what_it_does_not_serve(
    case: str, device: torch.device, request: pytest.FixtureRequest
) -> None:
    options = dict(UNSERVED[case])
    lora = options.pop("lora", False)
    if case == "fp16":
        request.getfixturevalue("sixteen_bit_operands")
    if case == "a head too large to be one operand" and device.type == "cuda":
        pytest.skip("CUDA multiplies a bf16 head as it is")
    batch = random_batch(**{**BOTH, "vocab": 1000, **options}, device=device)
    update = LoRA(torch.zeros(2, 16, device=device), torch.zeros(1000, 2, device=device)) if lora else None
    with pytest.raises(ValueError, match=r"impl='triton-epilogue' supports bf16 heads .* use impl='triton'"):
        fused_hypo_loss(
            batch.hidden, batch.weight, batch.targets, batch.cu_seqlens, lora=update, impl=IMPL, **batch.options
        )
