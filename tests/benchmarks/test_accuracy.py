"""The float64 truth, and the error of rounding the gradients of logits to 16 bits."""

from __future__ import annotations

import pytest
import torch

from benchmarks import float64
from benchmarks.accuracy import truth
from benchmarks.workloads import Workload, make_batch

CPU = torch.device("cpu")


@pytest.mark.parametrize("rounded", [torch.float64, torch.bfloat16])
def test_true_gradients_are_autograds_with_rounded_logit_grads(
    rounded: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(float64, "CHUNK_BYTES", 8 * 50 * 3)  # three rows a chunk, the last one smaller
    rng = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 6, generator=rng, dtype=torch.float64) for n in (8, 50))
    targets, coefficients = torch.arange(8), torch.randn(8, generator=rng, dtype=torch.float64)
    logits = (hidden @ weight.t()).requires_grad_()
    (logits.log_softmax(-1).gather(1, targets[:, None]).squeeze(1) * coefficients).sum().backward()
    assert logits.grad is not None
    slope = logits.grad.to(rounded).double()
    found = float64.gradients(hidden, weight, targets, coefficients, rounded=rounded)
    for got, expected in zip(found, (slope @ weight, slope.t() @ hidden), strict=True):
        # A value on the edge between two 16-bit numbers may round either way.
        torch.testing.assert_close(got, expected, rtol=0, atol=torch.finfo(rounded).eps * expected.abs().max().item())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_16_bit_inputs_round_the_gradients_of_logits(dtype: torch.dtype) -> None:
    batch = make_batch(Workload("hypo", 32, 100, 16, dtype, 4), CPU)
    rounded = truth(batch, gradients=True).rounded
    if dtype == torch.float32:
        assert rounded == {}
    else:
        assert all(0 < rounded[name] < 2 * torch.finfo(dtype).eps for name in ("hidden", "weight"))
