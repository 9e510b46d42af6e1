"""The row step of a divergence alone: two buffers of raw logits in; moments, KL or entropy, and gradients out."""

import importlib
from types import ModuleType
from typing import Any

import pytest
import torch
from contract import FUSED
from torch import Tensor

from hypo_kernels.head import LMHead
from hypo_kernels.statistics import RowStatistics

OUT_DTYPES = [torch.float32, torch.bfloat16, torch.float16]
PLAIN: dict[str, Any] = {}
WHOLE: dict[str, Any] = {"logit_softcap": 3.0, "logit_scale": 0.5, "temperature": 0.8, "bias": True}


def steps_of(impl: str) -> ModuleType:
    package = {"torch": "blockwise", "triton": "kernels"}[impl]
    return importlib.import_module(f"hypo_kernels.{package}.divergence")


class Rows:
    """Raw logits of policy and reference, (C, V) views of buffers full of NaN, targets (C,), and both heads."""

    def __init__(
        self,
        num_rows: int,
        vocab: int,
        device: torch.device,
        head: dict[str, Any],
        *,
        with_ref: bool,
        spread: float = 3,
    ) -> None:
        gen = torch.Generator().manual_seed(0)

        def randn(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=gen)

        def buffer(values: Tensor) -> Tensor:
            out = torch.full((num_rows, vocab + 24), float("nan"), device=device)
            out[:, :vocab] = values
            return out[:, :vocab]

        def lm_head() -> LMHead:
            bias = randn(vocab).to(device) if head.get("bias") else None
            return LMHead(torch.empty(vocab, 1, device=device), **{**head, "bias": bias})

        raw = spread * randn(num_rows, vocab)
        self.raw = buffer(raw)
        self.ref_raw = buffer(raw + randn(num_rows, vocab)) if with_ref else None
        self.targets = torch.randint(vocab, (num_rows,), generator=gen).to(device)
        self.head, self.ref_head = lm_head(), lm_head() if with_ref else None

    def statistics(self, impl: str) -> tuple[RowStatistics, RowStatistics | None]:
        return steps_of(impl).statistics(self.raw, self.ref_raw, self.targets, self.head, self.ref_head)

    def gradients(
        self, impl: str, score: Tensor, weight: Tensor, out_dtype: torch.dtype = torch.float32, scale: float = 1.0
    ) -> Tensor:
        stats, ref = self.statistics(impl)
        return steps_of(impl).gradients(
            self.raw, self.ref_raw, self.targets, self.head, self.ref_head, norms=stats.norms,
            ref_norms=None if ref is None else ref.norms, divergence=stats.divergence(ref), score=score,
            weight=weight, out_dtype=out_dtype, scale=scale,
        )  # fmt: skip

    def plain(self, score: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Divergence (C,), log-prob (C,) and the mixed gradient (C, V) in float64 by autograd."""
        raw = self.raw.double().requires_grad_()
        log_p = self.head.logits(raw).log_softmax(-1)
        log_q = torch.zeros_like(log_p)
        if self.ref_raw is not None and self.ref_head is not None:
            log_q = self.ref_head.logits(self.ref_raw.double()).log_softmax(-1)
        divergence = (log_p.exp() * (log_p - log_q)).sum(-1)
        logps = log_p.gather(1, self.targets[:, None]).squeeze(1)
        (gradient,) = torch.autograd.grad((-score * logps + weight * divergence).sum(), raw)
        return divergence.detach(), logps.detach(), gradient


def coefficients(num_rows: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return random numbers of both signs, with a zero in each."""
    score = torch.linspace(-1, 1, num_rows, device=device)
    weight = torch.linspace(1, -0.5, num_rows, device=device)
    return score.where(torch.arange(num_rows, device=device) != 1, 0), weight.where(score < 0.9, 0)


@pytest.mark.parametrize("with_ref", [True, False], ids=["KL", "entropy"])
@pytest.mark.parametrize("head", [PLAIN, WHOLE], ids=["plain", "whole head"])
@pytest.mark.parametrize("vocab", [1, 3, 129, 1000, 5001])
@pytest.mark.parametrize("impl", FUSED)
def test_divergence_step_serves_any_vocabulary_size(
    impl: str, vocab: int, head: dict[str, Any], with_ref: bool, device: torch.device
) -> None:
    rows = Rows(5, vocab, device, head, with_ref=with_ref)
    kept = [x.clone() for x in (rows.raw, rows.ref_raw) if x is not None]
    score, weight = coefficients(5, device)
    divergence, logps, gradient = rows.plain(score.double(), weight.double())
    stats, ref = rows.statistics(impl)
    assert all(torch.equal(a, b) for a, b in zip(kept, [rows.raw, rows.ref_raw], strict=False))
    torch.testing.assert_close(stats.divergence(ref), divergence.float(), rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(stats.logps(), logps.float())
    got = rows.gradients(impl, score, weight)
    torch.testing.assert_close(got, gradient.float(), rtol=1e-5, atol=1e-6)
    assert rows.raw._base is not None
    assert rows.raw._base[:, vocab:].isnan().all()


@pytest.mark.parametrize("out_dtype", OUT_DTYPES)
@pytest.mark.parametrize("impl", FUSED)
def test_mixed_gradients_are_narrowed_last(impl: str, out_dtype: torch.dtype, device: torch.device) -> None:
    rows = Rows(5, 1000, device, WHOLE, with_ref=True)
    score, weight = coefficients(5, device)
    *_, gradient = rows.plain(score.double(), weight.double())
    scale = 4096.0 if out_dtype == torch.float16 else 1.0
    got = rows.gradients(impl, score, weight, out_dtype, scale)
    assert got.dtype == out_dtype
    rtol = max(torch.finfo(out_dtype).eps, 1e-5)
    torch.testing.assert_close(got.double(), scale * gradient, rtol=rtol, atol=1e-6 * scale)


@pytest.mark.parametrize("impl", FUSED)
def test_entries_that_a_bias_rules_out_add_nothing(impl: str, device: torch.device) -> None:
    """The padding of a vocabulary has a bias of minus infinity, in policy and reference."""
    rows = Rows(4, 300, device, {"bias": True}, with_ref=True)
    assert rows.head.bias is not None
    assert rows.ref_head is not None
    assert rows.ref_head.bias is not None
    shorter = Rows(4, 300, device, {"bias": True}, with_ref=True)
    for bias in (rows.head.bias, rows.ref_head.bias):
        bias[200:] = float("-inf")
    rows.targets.clamp_(max=199)
    stats, ref = rows.statistics(impl)
    log_p = rows.head.logits(shorter.raw.double())[:, :200].log_softmax(-1)
    log_q = rows.ref_head.logits(shorter.ref_raw.double())[:, :200].log_softmax(-1)
    torch.testing.assert_close(
        stats.divergence(ref), (log_p.exp() * (log_p - log_q)).sum(-1).float(), rtol=1e-5, atol=1e-6
    )
    gradient = rows.gradients(impl, *coefficients(4, device))
    assert gradient.isfinite().all()
    assert not gradient[:, 200:].any()


@pytest.mark.parametrize("offset", [-1e4, 1e4])
@pytest.mark.parametrize("impl", FUSED)
def test_a_divergence_does_not_see_what_is_added_to_all_logits(impl: str, offset: float, device: torch.device) -> None:
    """Logits of a row at 1e4 are rounded to 1e-3; their divergence is that of the rounded ones, to the last digit."""
    rows = Rows(3, 200, device, PLAIN, with_ref=True)
    rows.raw += offset
    assert rows.ref_raw is not None
    rows.ref_raw -= offset
    divergence, logps, _ = rows.plain(torch.zeros(3, device=device).double(), torch.zeros(3, device=device).double())
    stats, ref = rows.statistics(impl)
    torch.testing.assert_close(stats.divergence(ref), divergence.float(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(stats.logps(), logps.float(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("impl", FUSED)
def test_equal_logits_have_no_divergence_and_no_gradient(impl: str, device: torch.device) -> None:
    rows = Rows(3, 500, device, PLAIN, with_ref=True, spread=30)
    assert rows.ref_raw is not None
    rows.ref_raw.copy_(rows.raw)
    stats, ref = rows.statistics(impl)
    assert stats.divergence(ref).abs().max() < 1e-6
    gradient = rows.gradients(impl, torch.zeros(3, device=device), torch.ones(3, device=device))
    assert gradient.abs().max() < 1e-6
