"""``fused_hypo_loss`` and every gradient are within the test contract, for shapes that each have a reason."""

import itertools

import pytest
import torch
from contract import (
    EVERY_VARIANT,
    FUSED,
    IMPLS,
    Batch,
    assert_contract,
    crossed,
    plain_logps,
    plain_objective,
    random_batch,
    run_eager,
    run_fused,
    truth,
    variants,
)
from loss_cases import BOTH, CASES, SMALL_CASES, every_case_in_fp32

from hypo_kernels import fused_hypo_loss

# Columns beyond the vocabulary, where the interpreter's exp may overflow, are masked when they are stored.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")


@pytest.mark.parametrize(("impl", "dtype", "case"), crossed(EVERY_VARIANT, CASES, every_case_in_fp32))
def test_loss_and_gradients_are_within_the_contract(
    impl: str, dtype: torch.dtype, case: str, device: torch.device
) -> None:
    assert_contract(random_batch(**CASES[case], device=device, dtype=dtype), impl)


@pytest.mark.parametrize(
    ("impl", "dtype", "case"),
    crossed(variants(torch.bfloat16, torch.float16), SMALL_CASES, every_case_in_fp32),
)
def test_16_bit_gemm_operands_are_within_the_contract(
    impl: str, dtype: torch.dtype, case: str, device: torch.device, sixteen_bit_operands: None
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


def test_specification_is_autograd_of_the_papers_formula(device: torch.device) -> None:
    """Compare the truth of the contract with the formulas that these tests write out, in float64."""
    for case in CASES.values():
        batch = random_batch(**case, device=device, dtype=torch.float64)
        exact, plain = truth(batch), run_eager(batch.to(torch.float64))
        for name, value in exact.items():
            torch.testing.assert_close(value, plain[name], msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("impl", IMPLS)
def test_ignored_sequence_has_logprob_zero_and_no_gradient(impl: str, device: torch.device) -> None:
    batch = random_batch(**BOTH, vocab=67, ignored_sequences=[1, 5], device=device)
    results = run_fused(batch, impl)
    assert results["logps"][[1, 5]].tolist() == [0.0, 0.0]
    for i in (1, 5):
        assert not results["gradient of hidden"][batch.cu_seqlens[i] : batch.cu_seqlens[i + 1]].any()
    assert results["gradient of hidden"].isfinite().all()


@pytest.mark.parametrize(("impl", "dtype"), EVERY_VARIANT)
def test_batch_without_counted_tokens_has_loss_log_2(
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
def test_vocabulary_that_no_tile_divides_has_no_extra_columns(impl: str, vocab: int, device: torch.device) -> None:
    """Compare with the vocabulary padded to full tiles by entries of probability 0."""
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
