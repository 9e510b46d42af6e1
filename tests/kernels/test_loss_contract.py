"""``fused_hypo_loss`` and every gradient within the test contract, over shapes that each have a reason."""

import itertools
from typing import Any

import pytest
import torch
from contract import (
    EVERY_VARIANT,
    FUSED,
    IMPLS,
    Batch,
    assert_contract,
    plain_logps,
    plain_objective,
    random_batch,
    run_eager,
    run_fused,
    truth,
    variants,
)

from hypo_kernels import fused_hypo_loss

# Columns beyond the vocabulary, where the interpreter's exp may overflow, are masked when they are stored.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")

PAIR = {"lengths": [5, 9], "num_pairs": 1}
BOTH = {"lengths": [5, 9, 3, 7, 6, 1, 8, 4], "num_pairs": 2}  # 2 pairs, 2 prompts of 2 samples, all ragged

CASES: dict[str, dict[str, Any]] = {
    # 257: with 256-wide tiles, the last one would hold a single real column.
    "ragged pairs and samples": {**BOTH, "vocab": 257},
    # GPT-2's vocabulary: 13 tiles of 4096 columns, the last one partial, and nothing divides it. No row is
    # ignored, so that eager's products over 50257 terms have the kernel's shapes and hence its summation order.
    "vocabulary of 50257": {"lengths": [2, 1, 2, 3], "num_pairs": 1, "vocab": 50257, "ignored": 0.0},
    # Smaller than any tile, and than a warp.
    "vocabulary of 3": {**BOTH, "vocab": 3},
    "vocabulary of 7": {**BOTH, "vocab": 7},
    # A maximum that starts at 0, or a phantom column of 0, would win over every real logit.
    "all logits far below zero": {**BOTH, "vocab": 67, "offset": -200.0},
    # exp overflows fp32 beyond 88.
    "logits beyond 100": {**BOTH, "vocab": 67, "spread": 60.0},
    "a chosen, a rejected and a sample with every token ignored": {
        **BOTH,
        "vocab": 67,
        "ignored_sequences": [1, 2, 5],
    },
    # Three of the four sequences have no rows at all.
    "one token": {"lengths": [1, 0], "num_pairs": 1, "vocab": 67, "ignored": 0.0},
    "one token each": {"lengths": [1, 1, 1, 1], "num_pairs": 1, "vocab": 67, "ignored": 0.0},
    "one pair": {**PAIR, "vocab": 67},
    "pairs only": {"lengths": [5, 9, 3, 7, 6, 2], "num_pairs": 3, "vocab": 67},
    "samples only": {"lengths": [5, 9, 3, 7], "num_pairs": 0, "vocab": 67},
    "three samples a prompt": {"lengths": [5, 9, 3, 7, 6, 2], "num_generations": 3, "vocab": 67},
    "four samples a prompt beside a pair": {
        "lengths": [5, 9, 3, 7, 6, 2],
        "num_pairs": 1,
        "num_generations": 4,
        "vocab": 67,
    },
    "length penalty": {"lengths": [5, 9, 3, 7], "length_penalty": 0.3, "vocab": 67},
    "label smoothing": {**PAIR, "label_smoothing": 0.2, "vocab": 67},
    "IPO": {**BOTH, "preference": "ipo", "vocab": 67},
    "bias": {**BOTH, "with_bias": True, "vocab": 67},
    # Logits of ±6 under a cap of 5: well into tanh's bend.
    "softcap": {**BOTH, "logit_softcap": 5.0, "spread": 6.0, "vocab": 67},
    "logit scale": {**BOTH, "logit_scale": 0.0625, "spread": 20.0, "vocab": 67},
    "temperature": {**BOTH, "temperature": 0.7, "vocab": 67},
    # Scale equal to temperature: their ratio is 1, which is not the same as neither being there.
    "softcap between a scale and a temperature that cancel": {
        **BOTH,
        "logit_softcap": 5.0,
        "logit_scale": 1.5,
        "temperature": 1.5,
        "vocab": 67,
    },
    "a scale and a temperature that cancel": {**BOTH, "logit_scale": 1.5, "temperature": 1.5, "vocab": 67},
    "a negative logit scale": {**BOTH, "logit_scale": -1.5, "vocab": 67},
    "everything at once": {
        **BOTH,
        "with_bias": True,
        "logit_softcap": 8.0,
        "logit_scale": 1.5,
        "temperature": 0.8,
        "length_penalty": 0.1,
        "label_smoothing": 0.1,
        "vocab": 257,
    },
    "reference from its hidden states": {**BOTH, "with_ref_hidden": True, "with_bias": True, "vocab": 67},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("impl", "dtype"), EVERY_VARIANT)
def test_the_loss_and_every_gradient_are_within_the_contract(
    case: str, impl: str, dtype: torch.dtype, device: torch.device
) -> None:
    assert_contract(random_batch(**CASES[case], device=device, dtype=dtype), impl)


@pytest.mark.parametrize("case", [name for name in CASES if name != "vocabulary of 50257"])
@pytest.mark.parametrize(("impl", "dtype"), variants(torch.bfloat16, torch.float16))
def test_gradients_narrowed_to_16_bit_for_the_gemms_are_within_the_contract(
    case: str, impl: str, dtype: torch.dtype, device: torch.device, sixteen_bit_operands: None
) -> None:
    assert_contract(random_batch(**CASES[case], device=device, dtype=dtype), impl)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("impl", "dtype"), variants(torch.float32, torch.bfloat16))
def test_random_ragged_batches_are_within_the_contract(
    seed: int, impl: str, dtype: torch.dtype, device: torch.device
) -> None:
    gen = torch.Generator().manual_seed(seed)

    def randint(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=gen))

    pairs, k, prompts = randint(0, 4), randint(2, 5), randint(1, 4)
    lengths = [randint(0, 12) for _ in range(2 * pairs + k * prompts)]
    batch = random_batch(
        lengths,
        vocab=randint(2, 700),
        width=randint(1, 40),
        num_pairs=pairs,
        num_generations=k,
        length_penalty=0.05,
        device=device,
        dtype=dtype,
        seed=seed,
    )
    assert_contract(batch, impl)


def test_the_specification_is_plain_autograd_of_the_papers_formula(device: torch.device) -> None:
    """The truth of the contract, itself compared with what these tests write out, in float64."""
    for case in CASES.values():
        batch = random_batch(**case, device=device, dtype=torch.float64)
        exact, plain = truth(batch), run_eager(batch.to(torch.float64))
        for name, value in exact.items():
            torch.testing.assert_close(value, plain[name], msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("impl", IMPLS)
def test_a_sequence_with_every_token_ignored_has_log_prob_zero_and_gradient_zero(
    impl: str, device: torch.device
) -> None:
    batch = random_batch(**BOTH, vocab=67, ignored_sequences=[1, 5], device=device)
    results = run_fused(batch, impl)
    assert results["logps"][[1, 5]].tolist() == [0.0, 0.0]
    for i in (1, 5):
        assert not results["gradient of hidden"][batch.cu_seqlens[i] : batch.cu_seqlens[i + 1]].any()
    assert results["gradient of hidden"].isfinite().all()


@pytest.mark.parametrize(("impl", "dtype"), EVERY_VARIANT)
def test_a_batch_without_a_counted_token_has_the_loss_of_equal_log_probs(
    impl: str, dtype: torch.dtype, device: torch.device, sixteen_bit_operands: None
) -> None:
    batch = random_batch([3, 2], 67, num_pairs=1, ignored=1.1, with_bias=True, device=device, dtype=dtype)
    results = run_fused(batch.with_options(ref_logps=torch.zeros(2, device=device)), impl)
    torch.testing.assert_close(results["loss"].cpu(), torch.tensor(2.0, dtype=torch.float64).log(), rtol=1e-6, atol=0)
    for name in ("hidden", "weight", "bias"):
        assert not results[f"gradient of {name}"].any()


@pytest.mark.parametrize("impl", IMPLS)
def test_rows_of_no_sequence_at_all_are_allowed(impl: str, device: torch.device) -> None:
    batch = random_batch([0, 0], 5, num_pairs=1, device=device)
    assert run_fused(batch, impl)["logps"].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("impl", IMPLS)
def test_coefficients_of_both_signs_push_log_probs_both_ways(impl: str, device: torch.device) -> None:
    """A step against the gradient raises the chosen, lowers the rejected, and draws samples to the reference."""
    batch = random_batch([4, 4, 4, 4], 67, num_pairs=1, ignored=0.0, device=device)
    before = plain_logps(batch).detach()
    above, below = before[2:] + torch.tensor([-3.0, 3.0], device=device)  # sample 2 overshoots, sample 3 undershoots
    batch = batch.with_options(ref_logps=torch.stack([*before[:2], above, below]))
    run_fused(batch, impl)
    with torch.no_grad():
        batch.hidden.sub_(0.1 * batch.hidden.grad)
        after = plain_logps(batch)
    assert (after - before).sign().tolist() == [1.0, -1.0, -1.0, 1.0]


@pytest.mark.parametrize("vocab", [1000, 4095, 4097])  # beside a tile's edge, and nowhere near one
@pytest.mark.parametrize("impl", FUSED)
def test_a_vocabulary_that_no_tile_divides_has_no_phantom_columns(impl: str, vocab: int, device: torch.device) -> None:
    """The same batch with the vocabulary padded to whole tiles of entries that can never be drawn."""
    batch = random_batch([3, 4, 2, 3], vocab, num_pairs=1, with_bias=True, offset=-30.0, device=device)
    assert batch.bias is not None
    tiles = -(-vocab // 4096) * 4096
    weight = torch.cat([batch.weight.detach(), torch.zeros(tiles - vocab, 16, device=device)]).requires_grad_()
    never = torch.full((tiles - vocab,), -1e4, device=device)
    bias = torch.cat([batch.bias.detach(), never]).requires_grad_()
    padded = Batch(batch.hidden.detach().requires_grad_(), weight, batch.targets, batch.cu_seqlens, bias, batch.options)
    wide = run_fused(padded, impl)
    assert not wide["gradient of weight"][vocab:].any()
    assert not wide["gradient of bias"][vocab:].any()
    for name in ("gradient of weight", "gradient of bias"):
        wide[name] = wide[name][:vocab]
    assert_contract(batch, impl)
    assert_contract(batch, impl, kernel=wide)


@pytest.mark.parametrize("impl", IMPLS)
def test_the_statistics_of_a_call_follow_from_its_log_probs(impl: str, device: torch.device) -> None:
    batch = random_batch(**BOTH, vocab=67, device=device)
    out = fused_hypo_loss(batch.hidden, batch.weight, batch.targets, batch.cu_seqlens, impl=impl, **batch.options)
    ratio = out.logps - batch.options["ref_logps"]
    beta = batch.options["beta"]
    torch.testing.assert_close(out.ref_logps, batch.options["ref_logps"])
    torch.testing.assert_close(out.chosen_rewards, beta * ratio[:2])
    torch.testing.assert_close(out.rejected_rewards, beta * ratio[2:4])
    torch.testing.assert_close(out.margins, beta * (ratio[:2] - ratio[2:4]))
    torch.testing.assert_close(out.kl, ratio[4:])
    torch.testing.assert_close(out.loss, plain_objective(batch, out.logps, out.ref_logps))
    assert out.lengths.tolist() == batch.lengths.tolist()
    assert out.lengths.dtype == torch.int64
    assert out.importance is None
    assert not any(value.requires_grad for value in out[1:-1])


@pytest.mark.parametrize("impl", IMPLS)
def test_padded_inputs_equal_packed_ones(impl: str, device: torch.device) -> None:
    batch = random_batch(**BOTH, vocab=67, with_ref_hidden=True, device=device)
    longest = int(batch.cu_seqlens.diff().max())
    rows = torch.zeros(8, longest, dtype=torch.long)  # padding repeats row 0, whose target is ignored there
    targets = torch.full((8, longest), -100)
    for i, (a, b) in enumerate(itertools.pairwise(batch.cu_seqlens)):
        rows[i, : b - a] = torch.arange(int(a), int(b))
        targets[i, : b - a] = batch.targets[a:b]
    padded = batch.hidden.detach()[rows.to(device)].requires_grad_()
    options = {**batch.options, "ref_hidden": batch.options["ref_hidden"][rows.to(device)]}
    packed = run_fused(batch, impl)
    weight = batch.weight.detach().requires_grad_()
    out = fused_hypo_loss(padded, weight, targets, impl=impl, **options)
    out.loss.backward()
    counted = targets != -100
    assert padded.grad is not None
    assert padded.grad.shape == padded.shape
    assert not padded.grad[~counted.to(device)].any()
    # The counted rows come in the same order either way, so the arithmetic is the same too.
    torch.testing.assert_close(out.loss.double(), packed["loss"], rtol=0, atol=0)
    torch.testing.assert_close(out.logps.double(), packed["logps"], rtol=0, atol=0)
    torch.testing.assert_close(weight.grad.double(), packed["gradient of weight"], rtol=0, atol=0)
    kept = packed["gradient of hidden"][(batch.targets != -100).to(device)]
    torch.testing.assert_close(padded.grad[counted.to(device)].double(), kept, rtol=0, atol=0)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("padded", [False, True])
def test_non_contiguous_hidden_and_weight_are_served_as_they_are(impl: str, padded: bool, device: torch.device) -> None:
    batch = random_batch([6] * 4, 67, num_pairs=1, device=device)
    hidden = batch.hidden.detach().t().contiguous().t().requires_grad_()
    weight = batch.weight.detach().repeat_interleave(2, dim=1)[:, ::2].requires_grad_()
    assert not hidden.is_contiguous()
    assert not weight.is_contiguous()
    if padded:
        # (S, L, D) as a model that keeps its token dimension first in memory would hand it over
        view = hidden.view(4, 6, 16).transpose(0, 1).contiguous().transpose(0, 1)
        out = fused_hypo_loss(view, weight, batch.targets.view(4, 6), impl=impl, **batch.options)
    else:
        out = fused_hypo_loss(hidden, weight, batch.targets, batch.cu_seqlens, impl=impl, **batch.options)
    out.loss.backward()
    results = {"loss": out.loss, "logps": out.logps, "ref_logps": out.ref_logps}
    results |= {"gradient of hidden": hidden.grad, "gradient of weight": weight.grad}
    assert_contract(batch, impl, kernel={name: value.detach().double() for name, value in results.items()})


@pytest.mark.parametrize("impl", IMPLS)
def test_any_integer_dtype_serves_for_targets_and_bounds(impl: str, device: torch.device) -> None:
    batch = random_batch(**BOTH, vocab=67, device=device)
    narrow = Batch(
        batch.hidden, batch.weight, batch.targets.to(device, torch.int32), batch.cu_seqlens.to(device, torch.int32),
        options=batch.options,
    )  # fmt: skip
    out = [
        fused_hypo_loss(b.hidden, b.weight, b.targets, b.cu_seqlens, impl=impl, **b.options).loss
        for b in (batch, narrow)
    ]
    assert out[0].item() == out[1].item()
