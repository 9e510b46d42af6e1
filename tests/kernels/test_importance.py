"""Samples of another policy: truncated importance weights of the online gradient, and their statistics."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from contract import (
    FUSED,
    IMPLS,
    NO_TRITON,
    Batch,
    assert_contract,
    crossed,
    random_batch,
    run_eager,
    run_fused,
    truth,
    variants,
)
from loss_cases import gradient_bytes, least_budget, objective
from meters import peak_bytes
from tabular import Policy, sequences
from torch import Tensor

from hypo_kernels import HypoLoss, LoRA, TargetLayout, fused_hypo_loss, token_logprobs

# Columns beyond the vocabulary, where the interpreter's exp may overflow, are masked when they are stored.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")

BOTH: dict[str, Any] = {"lengths": [5, 9, 3, 7, 6, 1, 8, 4], "num_pairs": 2, "vocab": 67}
# Ratios of e^±1: a quarter of the tokens are beyond the cap of 2.
STALE: dict[str, Any] = {**BOTH, "staleness": 1.0}

CASES: dict[str, dict[str, Any]] = {
    "pairs and samples": STALE,
    "samples only": {"lengths": [5, 9, 3, 7], "vocab": 67, "staleness": 1.0},
    "four samples a prompt beside a pair": {
        "lengths": [5, 9, 3, 7, 6, 2, 4, 1, 8, 5], "num_pairs": 1, "num_generations": 4, "vocab": 67, "staleness": 1.0,
    },
    "a low cap": {**STALE, "importance_cap": 0.5},
    "no cap": {**STALE, "importance_cap": float("inf")},
    # A ratio of e^30 is what a truncation is there for.
    "far from the policy": {**STALE, "staleness": 30.0},
    "a sample with every token ignored": {**STALE, "ignored_sequences": [2, 5]},
    "every sample ignored": {**STALE, "ignored_sequences": [4, 5, 6, 7]},
    "everything at once": {
        **STALE, "with_bias": True, "logit_softcap": 8.0, "logit_scale": 1.5, "temperature": 0.8, "length_penalty": 0.1,
        "label_smoothing": 0.1,
    },
    "reference from its hidden states": {**STALE, "with_ref_hidden": True},
}  # fmt: skip


def call(batch: Batch, impl: str = "torch", **options: Any) -> HypoLoss:
    options = {"impl": impl, **batch.options, **options}
    return fused_hypo_loss(batch.hidden, batch.weight, batch.targets, batch.cu_seqlens, bias=batch.bias, **options)


@pytest.mark.parametrize(
    ("impl", "dtype", "case"),
    crossed(
        variants(torch.float32, torch.bfloat16, torch.float16, torch.float64, impls=IMPLS),
        CASES,
        lambda impl, dtype, case: dtype == torch.float32 or case == "everything at once",
    ),
)
def test_importance_weights_are_within_the_contract(
    impl: str, dtype: torch.dtype, case: str, device: torch.device
) -> None:
    assert_contract(random_batch(**CASES[case], device=device, dtype=dtype), impl)


@pytest.mark.parametrize("rows", [1, 7, 20])  # every group goes through the head twice, some, several a chunk
@pytest.mark.parametrize(("impl", "dtype"), variants(torch.float32, torch.bfloat16))
def test_small_budgets_give_the_same_results(impl: str, dtype: torch.dtype, rows: int, device: torch.device) -> None:
    batch = random_batch(**STALE, device=device, dtype=dtype)
    # Beside the first row, each takes its logits, in 5 copies at most, and its features.
    budget = least_budget(batch, impl) + (rows - 1) * (67 * 5 + 16 * 5) * dtype.itemsize
    assert_contract(batch.with_options(max_chunk_bytes=budget), impl)


@pytest.mark.parametrize("k", [2, 4])
@pytest.mark.parametrize(("impl", "dtype"), variants(torch.float32, torch.float64, impls=["torch"]))
def test_call_stays_within_budget_plus_gradients(impl: str, dtype: torch.dtype, k: int, device: torch.device) -> None:
    """Many rows of few logits, so that what is kept of a row counts: the same torch operations for every impl."""
    grow = 8 if device.type == "cuda" else 1
    batch = random_batch(
        [100 * grow] * 8, 20 * grow, num_generations=k, staleness=1.0, ignored=0.0, device=device, dtype=dtype
    )
    held, copies = gradient_bytes(batch)
    budget = least_budget(batch, impl) + 2000 * grow
    if device.type == "cuda":
        call(batch, impl, max_chunk_bytes=budget)
    assert peak_bytes(device, lambda: call(batch, impl, max_chunk_bytes=budget)) <= budget + held + copies


@NO_TRITON
@pytest.mark.parametrize("case", ["pairs and samples", "everything at once"])
def test_exponentials_of_the_epilogue_are_weighted_too(
    case: str, device: torch.device, sixteen_bit_operands: None
) -> None:
    assert_contract(random_batch(**CASES[case], device=device, dtype=torch.bfloat16), "triton-epilogue")


def test_the_specification_is_plain_autograd_of_the_formula(device: torch.device) -> None:
    """Compare the truth of the contract with the formulas that these tests write out, in float64."""
    for name, case in CASES.items():
        batch = random_batch(**case, device=device, dtype=torch.float64)
        exact, plain = truth(batch), run_eager(batch.to(torch.float64))
        assert exact.keys() == plain.keys()
        for key, value in exact.items():
            torch.testing.assert_close(value, plain[key], msg=lambda text, at=f"{name}, {key}": f"{at}: {text}")


def in_eighths(batch: Batch) -> Batch:
    """Return the batch with operands of few digits, whose products have the same bits in every order of summation."""
    rounded = [x.detach().mul(8).round().div(8).requires_grad_() for x in (batch.hidden, batch.weight, batch.bias)]
    return replace(batch, hidden=rounded[0], weight=rounded[1], bias=rounded[2])


def logps_of_the_loss(batch: Batch, impl: str) -> Tensor:
    """Return the tokens' log-probs (T,) as the loss computes them: each token is a sequence."""
    rows = len(batch.targets)
    alone = replace(batch, cu_seqlens=torch.arange(rows + 1)).with_options(
        num_pairs=0, num_generations=rows, ref_logps=batch.hidden.new_zeros(rows, dtype=torch.float32)
    )
    return call(alone, impl).logps


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("impl", FUSED)
def test_on_policy_samples_give_the_unweighted_loss_bitwise(
    impl: str, dtype: torch.dtype, device: torch.device
) -> None:
    batch = in_eighths(random_batch(**BOTH, with_bias=True, device=device, dtype=dtype))
    logps = logps_of_the_loss(batch, impl)
    plain = run_fused(batch, impl)
    corrected = run_fused(batch.to(dtype).with_options(behavior_logps=logps), impl)
    counted = batch.lengths[4:].double().to(device)
    for name in ("ratio", "weight", "squared_weight"):
        assert torch.equal(corrected[name], counted), name
    for name, value in plain.items():
        assert torch.equal(corrected[name], value), name


@pytest.mark.parametrize("impl", IMPLS)
def test_weights_change_the_samples_gradients_and_nothing_else(impl: str, device: torch.device) -> None:
    batch = random_batch(**STALE, device=device)
    corrected = run_fused(batch, impl)
    del batch.options["behavior_logps"]
    plain = run_fused(batch.to(torch.float32), impl)
    for name in ("loss", "logps", "ref_logps"):
        assert torch.equal(corrected[name], plain[name]), name
    pairs = slice(0, int(batch.cu_seqlens[4]))
    a, b = corrected["gradient of hidden"], plain["gradient of hidden"]
    torch.testing.assert_close(a[pairs], b[pairs])
    assert (a[pairs.stop :] - b[pairs.stop :]).abs().max() > 0.1 * b[pairs.stop :].abs().max()


@pytest.mark.parametrize("impl", IMPLS)
def test_row_gradient_is_multiplied_by_its_truncated_ratio(impl: str, device: torch.device) -> None:
    """Tokens 1/4, 1/2, 1, 2, 5 and 100 times as likely as when they were drawn, with a cap of 3."""
    ratios = torch.tensor([0.25, 0.5, 1.0, 2.0, 5.0, 100.0, 1e30, 0.0], device=device)
    batch = random_batch([4, 4], 67, ignored=0.0, device=device)
    with torch.no_grad():
        logps = token_logprobs(batch.hidden, batch.weight, batch.targets, impl=impl)
    plain = run_fused(batch, impl)["gradient of hidden"]
    stale = batch.to(torch.float32).with_options(behavior_logps=logps - ratios.log(), importance_cap=3.0)
    corrected = run_fused(stale, impl)
    expected = torch.tensor([0.25, 0.5, 1.0, 2.0, 3.0, 3.0, 3.0, 0.0], device=device, dtype=torch.float64)
    torch.testing.assert_close(corrected["gradient of hidden"], expected[:, None] * plain, rtol=1e-5, atol=1e-9)
    assert corrected["truncated"].tolist() == [0.0, 3.0]
    torch.testing.assert_close(corrected["weight"], expected.view(2, 4).sum(1), rtol=1e-5, atol=0)
    torch.testing.assert_close(corrected["squared_weight"], expected.square().view(2, 4).sum(1), rtol=1e-5, atol=0)
    assert corrected["ratio"][0].item() == pytest.approx(3.75, rel=1e-5)
    assert corrected["log_ratio"][0].item() == pytest.approx(float(ratios[:4].log().sum()), abs=1e-5)


def test_effective_sample_size_falls_with_staleness(device: torch.device) -> None:
    shares = []
    for staleness in (0.0, 0.3, 1.0, 3.0):
        batch = random_batch([400] * 4, 67, staleness=staleness, device=device)
        found = call(batch).importance
        assert found is not None
        shares.append(float(found.weight.sum() ** 2 / (batch.lengths.sum() * found.squared_weight.sum())))
    assert shares[0] == pytest.approx(1.0, abs=1e-6)
    assert shares == sorted(shares, reverse=True)
    assert shares[-1] < 0.6


@pytest.mark.parametrize("impl", IMPLS)
def test_padded_inputs_and_a_layout_equal_packed_ones(impl: str, device: torch.device) -> None:
    batch = random_batch(**{**STALE, "lengths": [6] * 8}, device=device)
    behavior = batch.options["behavior_logps"]
    hidden, targets, laid_out = batch.hidden, batch.targets, TargetLayout.of(batch.targets, batch.cu_seqlens)
    padded = (hidden.view(8, 6, 16), targets.view(8, 6), behavior.view(8, 6))

    def results(hidden: Tensor, targets: Tensor | TargetLayout, behavior: Tensor) -> list[Tensor]:
        options = {**batch.options, "behavior_logps": behavior, "impl": impl}
        bounds = batch.cu_seqlens if hidden.ndim == 2 and isinstance(targets, Tensor) else None
        out = fused_hypo_loss(hidden, batch.weight, targets, bounds, **options)
        assert out.importance is not None
        return [out.loss.detach(), *out.importance, *torch.autograd.grad(out.loss, [batch.hidden, batch.weight])]

    packed = results(hidden, targets, behavior)
    for form in (padded, (hidden, laid_out, behavior), (padded[0], TargetLayout.of(padded[1]), padded[2])):
        assert all(torch.equal(a, b) for a, b in zip(results(*form), packed, strict=True))


@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_a_lora_update_of_the_head_equals_the_head_it_makes(impl: str, device: torch.device) -> None:
    batch = random_batch(**STALE, device=device, dtype=torch.float64)
    gen = torch.Generator().manual_seed(1)
    a, b = (torch.randn(*shape, generator=gen, dtype=torch.float64).to(device) for shape in ((3, 16), (67, 3)))
    factors = [a.requires_grad_(), b.requires_grad_()]
    update = call(batch, impl, lora=LoRA(a, b, 0.5))
    merged = fused_hypo_loss(
        batch.hidden, batch.weight + 0.5 * b @ a, batch.targets, batch.cu_seqlens, impl="reference", **batch.options
    )
    leaves = [batch.hidden, batch.weight, *factors]
    for x, y in zip(torch.autograd.grad(update.loss, leaves), torch.autograd.grad(merged.loss, leaves), strict=True):
        torch.testing.assert_close(x, y)
    torch.testing.assert_close(update.importance, merged.importance)


@pytest.mark.parametrize("impl", IMPLS)
def test_pairs_alone_have_no_samples_to_weigh(impl: str, device: torch.device) -> None:
    batch = random_batch([5, 9], 67, num_pairs=1, staleness=1.0, device=device)
    found = call(batch, impl).importance
    assert found is not None
    assert [x.shape for x in found] == [(0,)] * 5


@pytest.mark.parametrize("impl", IMPLS)
def test_nothing_of_the_statistics_requires_a_gradient(impl: str, device: torch.device) -> None:
    found = call(random_batch(**STALE, device=device), impl).importance
    assert found is not None
    assert not any(x.requires_grad for x in found)


# The expected gradient, by enumeration: no sampling noise


class OneToken:
    """Samples of one of five tokens, drawn from μ; the KL of π to its reference, and γ of each token."""

    kl_coef, gamma = 0.3, 0.2

    def __init__(self) -> None:
        gen = torch.Generator().manual_seed(0)
        self.logits, behavior, reference = (torch.randn(5, generator=gen, dtype=torch.float64) for _ in range(3))
        self.logits.requires_grad_()
        self.log_mu, self.log_q = behavior.log_softmax(-1), reference.log_softmax(-1)
        log_p = self.logits.log_softmax(-1)
        kl = self.kl_coef * (log_p.exp() * (log_p - self.log_q)).sum()
        (self.gradient,) = torch.autograd.grad(kl, self.logits)

    def expected(self, k: int, impl: str, shift: int = 0, **options: Any) -> Tensor:
        """E over groups of k samples of μ of the gradient of ``fused_hypo_loss``, whose logits are hidden states.

        ``shift`` gives each sample the log-prob of another one of its group.
        """
        total = torch.zeros_like(self.gradient)
        for group in itertools.product(range(5), repeat=k):
            tokens = torch.tensor(group)
            behavior = {"behavior_logps": self.log_mu[tokens.roll(shift)], **options}
            out = fused_hypo_loss(
                self.logits.expand(k, 5), torch.eye(5, dtype=torch.float64), tokens, torch.arange(k + 1), num_pairs=0,
                num_generations=k, ref_logps=self.log_q[tokens], beta=0.1, kl_coef=self.kl_coef,
                length_penalty=self.gamma, impl=impl, **behavior,
            )  # fmt: skip
            total += self.log_mu[tokens].sum().exp() * torch.autograd.grad(out.loss, self.logits)[0]
        return total


@pytest.mark.parametrize("impl", ["torch", "reference"])
@pytest.mark.parametrize("k", [2, 3])
def test_untruncated_one_token_weights_are_unbiased(k: int, impl: str) -> None:
    world = OneToken()
    assert world.gradient.abs().max() > 1e-2
    assert (world.expected(k, impl, importance_cap=float("inf")) - world.gradient).abs().max() < 1e-10
    wrong = {
        "no weights": world.expected(k, impl, behavior_logps=None),
        "another sample's weights": world.expected(k, impl, importance_cap=float("inf"), shift=1),
        "truncated weights": world.expected(k, impl, importance_cap=1.0),
    }
    for name, other in wrong.items():
        assert (other - world.gradient).abs().max() > 1e-3, name


@pytest.mark.parametrize("distance", [0.1, 0.3, 1.0])
def test_token_weights_on_long_samples_reduce_bias_but_keep_some(
    distance: float,
) -> None:
    """Three tokens: the weights correct neither how often μ reaches a state nor what it does after it."""
    drawn = sequences(3, 3, with_eos=False)
    policy, reference, behavior = (Policy(drawn, seed=seed) for seed in range(3))
    with torch.no_grad():
        behavior.logits.mul_(distance).add_(policy.logits)
    logps, ref_logps = policy.logps(), reference.logps().detach()
    kl = (logps.exp() * (logps - ref_logps)).sum()
    (exact,) = torch.autograd.grad(kl, policy.logits, retain_graph=True)
    rows, mu_rows = (
        torch.cat([p.rows(s).log_softmax(-1).gather(1, torch.tensor(s)[:, None]).squeeze(1) for s in drawn]).view(-1, 3)
        for p in (policy, behavior)
    )
    mu = mu_rows.detach().sum(1).exp()

    def expected(weights: Tensor) -> Tensor:
        """Return each token's term (27, 3); the baseline of the other samples is a constant, their mean."""
        ratio = (logps - ref_logps).detach()
        advantage = ratio - (mu * ratio).sum()
        surrogate = (mu * advantage * (weights * rows).sum(1)).sum()
        return torch.autograd.grad(surrogate, policy.logits, retain_graph=True)[0]

    terms = objective(importance_cap=float("inf"))
    token_ratios, found = terms.importance(rows.detach().flatten(), mu_rows.detach().flatten(), torch.tensor([3] * 27))
    torch.testing.assert_close(found.log_ratio, (logps - mu.log()).detach())
    token_ratios = token_ratios.view(27, 3)
    of_samples = token_ratios.prod(dim=1, keepdim=True).expand_as(token_ratios)
    error = {
        name: float((expected(weights) - exact).norm() / exact.norm())
        for name, weights in {"none": torch.ones_like(rows), "tokens": token_ratios, "samples": of_samples}.items()
    }
    assert error["samples"] < 1e-10
    assert 1e-3 < error["tokens"] < error["none"]
