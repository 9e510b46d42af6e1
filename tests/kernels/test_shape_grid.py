"""Vocabularies of real tokenizers by one, a few and thousands of rows: log-probs, loss and every gradient.

Under Triton's interpreter a program takes two milliseconds a tile and pass. There the large vocabularies take one
dtype a test, and 8192 rows are left to the torch implementation; a CUDA device runs the whole grid.
"""

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from contract import (
    FUSED,
    Batch,
    Results,
    assert_close,
    assert_contract,
    in_orders,
    loss_scale,
    plain_distributions,
    plain_logps,
    plain_objective,
    random_batch,
    run_fused,
    slow_unless,
    take,
    variants,
)
from contract import (
    ROWS as ROW_AXES,
)
from torch import Tensor

from hypo_kernels import fused_hypo_loss, sequence_logprobs, token_logprobs

# Columns beyond the vocabulary, where the interpreter's exp may overflow, are masked when they are stored.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")

# Smaller than a warp; below one tile; GPT-2's, odd; Llama 3's and Qwen2's, of 32 and of 38 tiles of 4096 columns
VOCABULARIES = [7, 1000, 50257, 128256, 151936]
LARGE = 50257
# Few features, so that the products cost little beside the V logits of a row, which are what is tested.
WIDTH = 8
# (counted rows of each sequence): a pair and two samples
ROWS = {1: [1, 0, 0, 0], 31: [9, 6, 11, 5]}


def affordable(impl: str, vocab: int, dtype: torch.dtype, interpreted_dtype: torch.dtype) -> bool:
    return torch.cuda.is_available() or impl != "triton" or vocab < LARGE or dtype == interpreted_dtype


def grid(interpreted_dtype: torch.dtype) -> list[Any]:
    """(impl, dtype, vocab, rows); a large vocabulary under the interpreter only with ``interpreted_dtype``.

    Vocabularies of more than 100,000 are slow; their number of tiles is all that they add.
    """
    return [
        pytest.param(
            *variant.values,
            vocab,
            rows,
            marks=[*variant.marks, *([pytest.mark.slow] if vocab > 100_000 or (vocab == LARGE and rows == 31) else [])],
            id=f"{variant.id}-V{vocab}-N{rows}",
        )
        for variant, vocab, rows in itertools.product(variants(torch.float32, torch.bfloat16), VOCABULARIES, ROWS)
        if affordable(variant.values[0], vocab, variant.values[1], interpreted_dtype)
    ]


@pytest.mark.parametrize(("impl", "dtype", "vocab", "rows"), grid(torch.float32))
def test_loss_at_every_vocabulary_is_within_the_contract(
    impl: str, dtype: torch.dtype, vocab: int, rows: int, device: torch.device
) -> None:
    batch = random_batch(ROWS[rows], vocab, width=WIDTH, num_pairs=1, ignored=0.0, device=device, dtype=dtype)
    assert_contract(batch, impl)


def row_results(batch: Batch, upstream: Tensor, impl: str | None) -> Results:
    """Return log-probs (T,) and gradients of a batch of one-row sequences; plain torch if impl is None."""
    hidden, weight, targets = batch.hidden, batch.weight, batch.targets
    rows = plain_logps(batch) if impl is None else token_logprobs(hidden, weight, targets, impl=impl)
    rows.backward(upstream.to(rows.dtype))
    results = {"logps": rows, "gradient of hidden": hidden.grad, "gradient of weight": weight.grad}
    return {name: value.detach().double() for name, value in results.items()}


@pytest.mark.parametrize(("impl", "dtype", "vocab", "rows"), grid(torch.bfloat16))
def test_tokens_at_every_vocabulary_are_within_the_contract(
    impl: str, dtype: torch.dtype, vocab: int, rows: int, device: torch.device
) -> None:
    batch = random_batch([1] * rows, vocab, width=WIDTH, ignored=0.0, cheap_reference=True, device=device, dtype=dtype)
    upstream = torch.randn(rows, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(device)
    exact = row_results(batch.to(torch.float64), upstream, None)
    eager = in_orders(
        batch, lambda run, order: row_results(run, take(upstream, "t", order), None), ROW_AXES, orders=EAGER_ORDERS
    )
    kernel = row_results(batch.to(dtype), upstream, impl)
    for name, value in exact.items():
        assert_close(name, kernel[name], [run[name] for run in eager], value, dtype)


# Sixteen groups of 512 rows, of unequal sequences: four pairs, then twelve prompts of two samples
MANY_ROWS = [243, 269, 256, 256, *[269, 243, 256, 256], *[230, 282] * 12]
NUM_PAIRS = 4
NUM_STATES = 64
EAGER_ORDERS = 3


class ManyRows:
    """8192 rows with different targets but only 64 different hidden states.

    Full logits of 8192 rows and 151936 columns are 10 GB in float64. Rows with one hidden state have one
    distribution, so truth and eager need the logits of 64 rows, while the kernel, which cannot know, computes
    all of them; everything that it returns is compared.
    """

    def __init__(self, vocab: int, dtype: torch.dtype, device: torch.device) -> None:
        batch = random_batch(
            MANY_ROWS, vocab, width=WIDTH, num_pairs=NUM_PAIRS, ignored=0.0, cheap_reference=True,
            device=device, dtype=dtype,
        )  # fmt: skip
        gen = torch.Generator().manual_seed(1)
        self.states = batch.hidden.detach()[:NUM_STATES]
        self.index = torch.randint(NUM_STATES, (len(batch.targets),), generator=gen)  # (T,)
        hidden = self.states[self.index.to(device)].requires_grad_()
        self.batch = replace(batch, hidden=hidden)
        # Near the policy's, so that no coefficient saturates.
        noise = 2 * torch.randn(len(MANY_ROWS), generator=gen)
        ref_logps = (self.eager(torch.float64)["logps"] + noise.to(device)).float()
        self.batch = self.batch.with_options(ref_logps=ref_logps)
        self.exact = self.eager(torch.float64)

    def eager(self, dtype: torch.dtype, order: int = 0) -> Results:
        """Loss, log-probs and gradients by full logits of the states; ``order`` permutes what is summed over."""
        weight, targets = self.batch.weight.detach(), self.batch.targets
        v, d, t = self._orders(order)
        device = weight.device
        leaf = weight[v.to(device)][:, d.to(device)].to(dtype).requires_grad_()
        states = self.states[:, d.to(device)].to(dtype)
        index, shuffled = self.index[t].to(device), v.argsort()[targets[t]].to(device)
        logits = F.linear(states, leaf)
        log_p = logits.to(torch.promote_types(dtype, torch.float32)).log_softmax(-1)
        rows = log_p[index, shuffled]
        logps = torch.stack([part.sum() for part in rows.split(MANY_ROWS)])
        ref_logps = self.batch.options["ref_logps"].to(logps.dtype)
        loss = plain_objective(self.batch, logps, ref_logps)
        by_row, by_weight = torch.autograd.grad(loss, [rows, leaf])
        if dtype == torch.float64 or order:
            # log p = h·w_y − logsumexp, whose derivative by h is w_y − E_p[w].
            mean = log_p.detach().exp().to(dtype) @ leaf.detach()
            by_hidden = (by_row[:, None] * (leaf.detach()[shuffled] - mean[index])).to(dtype)
        else:  # as autograd has it, from d-logits: w_y is one of the terms that a product adds up
            by_hidden = self._from_d_logits(log_p.detach().exp(), leaf.detach(), index, shuffled, by_row)
        back_v, back_d, back_t = (x.argsort().to(device) for x in (v, d, t))
        results = {
            "loss": loss,
            "logps": logps,
            "rows": rows[back_t],
            "by_row": by_row[back_t],
            "gradient of hidden": by_hidden[back_t][:, back_d],
            "gradient of weight": by_weight[back_v][:, back_d],
        }
        return {name: value.detach().double() for name, value in results.items()}

    @staticmethod
    def _from_d_logits(p: Tensor, weight: Tensor, index: Tensor, targets: Tensor, by_row: Tensor) -> Tensor:
        parts = []
        for i, y, by in zip(index.split(512), targets.split(512), by_row.split(512), strict=True):
            d_logits = p[i]
            d_logits[torch.arange(len(y), device=y.device), y] -= 1.0
            parts.append(d_logits.mul_(-by[:, None]).to(weight.dtype) @ weight)
        return torch.cat(parts)

    def _orders(self, order: int) -> tuple[Tensor, Tensor, Tensor]:
        """Permutations of the vocabulary, of the features, and of the rows of each sequence; none for 0."""
        vocab, width = self.batch.weight.shape
        if order == 0:
            return torch.arange(vocab), torch.arange(width), torch.arange(len(self.index))
        gen = torch.Generator().manual_seed(order)
        starts = itertools.accumulate([0, *MANY_ROWS[:-1]])
        rows = [a + torch.randperm(n, generator=gen) for a, n in zip(starts, MANY_ROWS, strict=True)]
        return torch.randperm(vocab, generator=gen), torch.randperm(width, generator=gen), torch.cat(rows)

    def assert_close(self, kernel: Results, dtype: torch.dtype) -> None:
        eager = [self.eager(dtype, order) for order in range(EAGER_ORDERS)]
        ref_logps = self.batch.options["ref_logps"].double()
        scales = {"loss": loss_scale(self.batch, self.exact | {"ref_logps": ref_logps})}
        for name, value in kernel.items():
            assert_close(name, value, [run[name] for run in eager], self.exact[name], dtype, scales.get(name, 0.0))


def many_rows(*dtypes: torch.dtype) -> list[Any]:
    """(impl, dtype, vocab); no Triton under the interpreter, which takes half a minute for the smallest.

    Of the two largest vocabularies, whose number of tiles is Triton's alone, the torch implementation takes the larger.
    """
    return [
        pytest.param(
            *variant.values,
            vocab,
            marks=[*variant.marks, *([pytest.mark.slow] if vocab >= 1000 else [])],
            id=f"{variant.id}-V{vocab}",
        )
        for variant, vocab in itertools.product(variants(*dtypes), VOCABULARIES)
        if torch.cuda.is_available() or (variant.values[0] == "torch" and vocab != 128256)
    ]


@pytest.mark.parametrize(("impl", "dtype", "vocab"), many_rows(torch.float32, torch.bfloat16))
def test_loss_of_8192_rows_is_within_the_contract(
    impl: str, dtype: torch.dtype, vocab: int, device: torch.device
) -> None:
    many = ManyRows(vocab, dtype, device)
    kernel = run_fused(many.batch, impl)
    many.assert_close({name: kernel[name] for name in kernel if name != "ref_logps"}, dtype)


@pytest.mark.parametrize(("impl", "dtype", "vocab"), many_rows(torch.bfloat16))
def test_tokens_of_8192_rows_are_within_the_contract(
    impl: str, dtype: torch.dtype, vocab: int, device: torch.device
) -> None:
    """The upstream gradients are those of the loss, so that one truth serves both tests."""
    many = ManyRows(vocab, dtype, device)
    batch = many.batch
    rows = token_logprobs(batch.hidden, batch.weight, batch.targets, impl=impl)
    rows.backward(many.exact["by_row"].to(rows.dtype))
    results = {"rows": rows, "gradient of hidden": batch.hidden.grad, "gradient of weight": batch.weight.grad}
    many.assert_close({name: value.detach().double() for name, value in results.items()}, dtype)


# Sums over a sequence are the same torch operations for every implementation: one on a CPU shows both.
SUMMED = FUSED if torch.cuda.is_available() else ["torch"]


@pytest.mark.parametrize("impl", SUMMED)
def test_sequence_of_8192_tokens_is_within_the_contract(impl: str, device: torch.device) -> None:
    """Added one after another in fp32, 8192 log-probs would be rounded 8192 times at the size of their sum."""
    batch = random_batch([8192], 7, width=WIDTH, ignored=0.0, cheap_reference=True, device=device)
    gen = torch.Generator().manual_seed(2)
    orders = [torch.arange(8192), *(torch.randperm(8192, generator=gen) for _ in range(EAGER_ORDERS))]
    with torch.no_grad():
        exact = plain_logps(batch.to(torch.float64))
        eager = [
            plain_logps(replace(batch, hidden=batch.hidden[t.to(device)], targets=batch.targets[t])) for t in orders
        ]
        found = sequence_logprobs(batch.hidden, batch.weight, batch.targets, batch.cu_seqlens, impl=impl)
    assert_close("logps", found, eager, exact, torch.float32)


@pytest.mark.parametrize("impl", SUMMED)
def test_exact_kl_of_2048_tokens_is_within_the_contract(impl: str, device: torch.device) -> None:
    batch = random_batch([2048] * 4, 7, width=WIDTH, ignored=0.0, with_ref_hidden=True, device=device)
    batch = batch.with_options(kl_estimator="exact")

    def plain(batch: Batch, orders: Sequence[Tensor]) -> Tensor:
        """Return the KL (N,), with each sample's rows added in its order."""
        log_p, log_q = plain_distributions(batch), plain_distributions(batch, of_reference=True)
        divergences = (log_p.exp() * (log_p - log_q)).sum(-1).view(4, 2048)
        return torch.stack([rows[t.to(device)].sum() for rows, t in zip(divergences, orders, strict=True)])

    gen = torch.Generator().manual_seed(2)
    with torch.no_grad():
        exact = plain(batch.to(torch.float64), [torch.arange(2048)] * 4)
        eager = [plain(batch, [torch.randperm(2048, generator=gen) for _ in range(4)]) for _ in range(EAGER_ORDERS)]
        found = fused_hypo_loss(
            batch.hidden, batch.weight, batch.targets, batch.cu_seqlens, impl=impl, **batch.options
        ).kl
    assert_close("kl", found, eager, exact, torch.float32)


HOSTILE: dict[str, dict[str, Any]] = {
    # A maximum that starts above them, or a phantom column of 0, would win over every real logit.
    "all logits near -10000": {"offset": -1e4},
    # exp overflows fp32 beyond 88, in both directions.
    "logits beyond 100 with both signs": {"spread": 60.0},
    "a chosen and a sample with every token ignored": {"ignored_sequences": [0, 3]},
    "every token ignored": {"ignored_sequences": [0, 1, 2, 3]},
    "one token": {"lengths": [1, 0, 0, 0]},
}


@pytest.mark.parametrize(  # 128 is the narrowest tile
    "vocab", slow_unless(lambda vocab: vocab < LARGE, [vocab for vocab in VOCABULARIES if vocab % 128])
)
@pytest.mark.parametrize("case", HOSTILE)
@pytest.mark.parametrize(("impl", "dtype"), variants(torch.float32, torch.bfloat16))
def test_hostile_logits_are_within_the_contract(
    impl: str, dtype: torch.dtype, case: str, vocab: int, device: torch.device
) -> None:
    shape = {"lengths": [2, 3, 1, 2], "width": WIDTH, "num_pairs": 1, "ignored": 0.0}
    batch = random_batch(**{**shape, **HOSTILE[case]}, vocab=vocab, device=device, dtype=dtype)
    if case.startswith("logits beyond"):
        logits = batch.hidden.detach().double() @ batch.weight.detach().double().t()
        assert logits.max() > 100
        assert logits.min() < -100
    assert_contract(batch, impl)
