"""Heads that are more than one matrix: a LoRA update, and per-token entropy from the same pass."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from contract import (
    FUSED,
    IMPLS,
    ROWS,
    Batch,
    Order,
    assert_close,
    crossed,
    in_orders,
    loss_scale,
    plain_distributions,
    plain_objective,
    random_batch,
    take,
    variants,
)
from meters import GemmMeter
from torch import Tensor

from hypo_kernels import LoRA, fused_hypo_loss, token_logprobs

# Columns beyond the vocabulary, where the interpreter's exp may overflow, are masked when they are stored.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")

SCALE, RANK = 0.5, 3
HEAD = ("logit_softcap", "logit_scale", "temperature")
BOTH: dict[str, Any] = {"lengths": [5, 9, 3, 7, 6, 1, 8, 4], "num_pairs": 2, "vocab": 257}
FULL_HEAD: dict[str, Any] = {"with_bias": True, "logit_softcap": 5.0, "logit_scale": 1.5, "temperature": 0.8}


AXES = {"hidden": "td", "weight": "vd", "bias": "v", "A": "-d", "B": "v-"}  # of a run's gradients


def factors(batch: Batch, dtype: torch.dtype, order: Order | None = None) -> LoRA:
    gen = torch.Generator().manual_seed(5)
    vocab, width = batch.weight.shape
    a = torch.randn(RANK, width, generator=gen, dtype=torch.float64) / width**0.5
    b = torch.randn(vocab, RANK, generator=gen, dtype=torch.float64)
    if order is not None:
        a, b = take(a, AXES["A"], order), take(b, AXES["B"], order)
    a, b = (x.to(batch.weight.device, dtype).requires_grad_() for x in (a, b))
    return LoRA(a, b, SCALE)


def merged(batch: Batch, lora: LoRA) -> Batch:
    """Return the batch with the update added to the weight."""
    weight = batch.weight + lora.scale * lora.B @ lora.A
    return replace(batch, weight=weight)


def leaves(batch: Batch, lora: LoRA) -> dict[str, Tensor | None]:
    return {"hidden": batch.hidden, "weight": batch.weight, "bias": batch.bias, "A": lora.A, "B": lora.B}


def collect(loss: Tensor, batch: Batch, lora: LoRA) -> dict[str, Tensor]:
    loss.backward()
    return {"loss": loss.detach(), **{name: x.grad for name, x in leaves(batch, lora).items() if x is not None}}


def plain_run(batch: Batch, dtype: torch.dtype, order: Order | None = None) -> dict[str, Tensor]:
    run = batch.to(dtype)
    lora = factors(run, dtype, order)
    whole = merged(run, lora)
    logps = sequence_sums(whole, plain_distributions(whole))
    ref_logps = whole.options["ref_logps"].to(logps.dtype)
    results = collect(plain_objective(whole, logps, ref_logps), run, lora)
    return results | {"logps": logps.detach(), "ref_logps": ref_logps}


def sequence_sums(batch: Batch, log_p: Tensor) -> Tensor:
    targets = batch.targets.to(log_p.device)
    rows = log_p.gather(1, targets.clamp_min(0)[:, None]).squeeze(1).masked_fill(targets == -100, 0.0)
    return torch.stack([part.sum() for part in rows.split(batch.cu_seqlens.diff().tolist())])


def fused_run(batch: Batch, dtype: torch.dtype, impl: str, **options: Any) -> dict[str, Tensor]:
    run = batch.to(dtype)
    lora = factors(run, dtype)
    out = fused_hypo_loss(
        run.hidden, run.weight, run.targets, run.cu_seqlens, bias=run.bias, lora=lora, impl=impl,
        **{**run.options, **options},
    )  # fmt: skip
    return collect(out.loss, run, lora) | {"logps": out.logps, "ref_logps": out.ref_logps}


@pytest.mark.parametrize("head", [{}, FULL_HEAD], ids=["plain", "whole head"])
@pytest.mark.parametrize(("impl", "dtype"), variants(torch.float32, torch.bfloat16, torch.float16, impls=IMPLS))
def test_a_lora_update_is_worth_the_head_it_is_merged_into(
    impl: str, dtype: torch.dtype, head: dict[str, Any], device: torch.device
) -> None:
    batch = random_batch(**BOTH, **head, device=device, dtype=dtype)
    exact = plain_run(batch, torch.float64)
    eager = in_orders(batch, lambda run, order: plain_run(run, dtype, order), AXES)
    for name, got in fused_run(batch, dtype, impl).items():
        scale = loss_scale(batch.to(torch.float64), exact) if name == "loss" else 0.0
        assert_close(name, got, [run[name] for run in eager], exact[name].double(), dtype, scale)


@pytest.mark.parametrize("impl", FUSED)
def test_an_update_of_zero_changes_nothing(impl: str, device: torch.device) -> None:
    batch = random_batch(**BOTH, **FULL_HEAD, device=device)
    lora = factors(batch, torch.float32)
    nothing = LoRA(lora.A, torch.zeros_like(lora.B), SCALE)
    rows, expected = (
        token_logprobs(batch.hidden, batch.weight, batch.targets, bias=batch.bias, lora=update, impl=impl)
        for update in (nothing, None)
    )
    torch.testing.assert_close(rows, expected)


@pytest.mark.parametrize("impl", FUSED)
def test_lora_costs_its_own_products_only(impl: str, device: torch.device) -> None:
    """With the head frozen, as LoRA has it: 4 NVD, and 6·N·V·r for the update, its features and B."""
    batch = random_batch(**BOTH, device=device)
    batch.weight.requires_grad_(False)
    lora = factors(batch, torch.float32)
    with GemmMeter() as meter:
        out = fused_hypo_loss(
            batch.hidden, batch.weight, batch.targets, batch.cu_seqlens, lora=lora, impl=impl, **batch.options
        )
        out.loss.backward()
    rows, (vocab, width) = int((batch.targets != -100).sum()), batch.weight.shape
    outside = 3 * 2 * len(batch.targets) * RANK * width  # hidden·Aᵀ and its two gradients, of every row
    assert meter.flops == 4 * rows * vocab * width + 6 * rows * vocab * RANK + outside
    assert (RANK, vocab, width) not in {tuple(sorted(shape)) for shape in meter.shapes}


@pytest.mark.parametrize("impl", FUSED)
def test_small_budgets_give_the_same_results_with_an_update(impl: str, device: torch.device) -> None:
    batch = random_batch(**BOTH, **FULL_HEAD, device=device)
    one, many = (fused_run(batch, torch.float32, impl, max_chunk_bytes=budget) for budget in (2**30, 40_000))
    for name, value in one.items():
        torch.testing.assert_close(many[name], value, msg=lambda text, name=name: f"{name}: {text}")


def entropy_run(
    batch: Batch, dtype: torch.dtype, impl: str | None, order: Order | None = None, **options: Any
) -> dict[str, Tensor]:
    """Log-probs and entropies (T,) and the gradients of a loss of both; plain torch where ``impl`` is None."""
    run = batch.to(dtype)
    constants = {name: value for name, value in run.options.items() if name in HEAD}
    if impl is None:
        log_p = plain_distributions(run)
        counted = (run.targets != -100).to(log_p.device)
        targets = run.targets.clamp_min(0).to(log_p.device)
        logps = log_p.gather(1, targets[:, None]).squeeze(1) * counted
        entropies = -(log_p.exp() * log_p).sum(-1) * counted
    else:
        logps, entropies = token_logprobs(
            run.hidden, run.weight, run.targets, return_entropy=True, bias=run.bias, impl=impl, **constants, **options
        )
    gen = torch.Generator().manual_seed(3)
    by_logps, by_entropies = (
        torch.randn(len(run.targets), generator=gen, dtype=torch.float64).to(logps) for _ in range(2)
    )
    by_logps[:3] = 0.0  # rows of which only the entropy matters
    if order is not None:
        by_logps, by_entropies = take(by_logps, "t", order), take(by_entropies, "t", order)
    (logps @ by_logps + entropies @ by_entropies).backward()
    out = {"logps": logps.detach(), "entropies": entropies.detach()}
    out |= {"gradient of hidden": run.hidden.grad, "gradient of weight": run.weight.grad}
    return out | ({} if run.bias is None else {"gradient of bias": run.bias.grad})


ENTROPY_CASES: dict[str, dict[str, Any]] = {
    "ragged": {},
    "whole head": FULL_HEAD,
    "peaked": {"spread": 60.0},
    "far below zero": {"offset": -200.0},
    "vocabulary of 3": {"vocab": 3},
}


@pytest.mark.parametrize("budget", [2**30, 60_000], ids=["whole", "some rows at a time"])
@pytest.mark.parametrize(
    ("impl", "dtype", "case"),
    crossed(
        variants(torch.float32, torch.bfloat16, torch.float16, impls=IMPLS),
        ENTROPY_CASES,
        lambda impl, dtype, case: dtype == torch.float32 or case == "whole head",
    ),
)
def test_entropies_and_their_gradients_are_within_the_contract(
    impl: str, dtype: torch.dtype, case: str, budget: int, device: torch.device
) -> None:
    batch = random_batch(**{"lengths": [5, 9, 3, 7], "vocab": 257, "num_generations": 4, **ENTROPY_CASES[case]},
                         device=device, dtype=dtype)  # fmt: skip
    exact = entropy_run(batch, torch.float64, None)
    eager = in_orders(batch, lambda run, order: entropy_run(run, dtype, None, order), ROWS)
    for name, got in entropy_run(batch, dtype, impl, max_chunk_bytes=budget).items():
        # An entropy is a mean of log-probs, whose size sets its rounding.
        scale = float(exact["logps"].abs().max()) if name == "entropies" else 0.0
        assert_close(name, got, [run[name] for run in eager], exact[name].double(), dtype, scale)


def test_gradcheck_of_log_probs_and_entropies_passes_in_float64() -> None:
    batch = random_batch(
        [3, 2], 5, width=3, with_bias=True, logit_softcap=4.0, dtype=torch.float64, device=torch.device("cpu"),
        num_generations=2,
    )  # fmt: skip

    def rows(hidden: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        return token_logprobs(
            hidden, weight, batch.targets, return_entropy=True, bias=bias, logit_softcap=4.0, impl="torch"
        )

    assert torch.autograd.gradcheck(rows, (batch.hidden, batch.weight, batch.bias))


@pytest.mark.parametrize("impl", FUSED)
def test_entropies_cost_no_further_product(impl: str, device: torch.device) -> None:
    batch = random_batch([6, 6], 257, device=device)
    for entropy in (False, True):
        with GemmMeter() as meter:
            out = token_logprobs(batch.hidden, batch.weight, batch.targets, return_entropy=entropy, impl=impl)
            sum(x.sum() for x in (out if isinstance(out, tuple) else (out,))).backward()
        assert len(meter.shapes) == 4
