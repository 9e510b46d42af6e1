"""Tiles of the softmax left out of the backward products: the budget, the products, the error."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")

from benchmarks.sparse_softmax import products, tiles
from benchmarks.sparse_softmax.errors import CHUNK, DENSE, errors
from benchmarks.sparse_softmax.rows import Rows

# Blocks of 4 rows and 8 tokens: V = 64 has 8 blocks, of which peaked rows need a few.
ROW_BLOCK, VOCAB_BLOCK, VOCAB, WIDTH = 4, 8, 64, 6


def peaked(count: int) -> Rows:
    """Rows from surprised to nearly certain of their target."""
    rng = torch.Generator().manual_seed(0)
    weight = torch.randn(VOCAB, WIDTH, generator=rng).bfloat16().float()
    targets = torch.randint(VOCAB, (count,), generator=rng)
    hidden = (weight[targets] * torch.linspace(0, 6, count)[:, None]).bfloat16().float()
    return Rows(hidden, weight, targets, torch.ones(count).neg_())


def gradients(rows: Rows) -> Tensor:
    return tiles.unit_gradients(rows.probs(), rows.targets)


def left_out(grad: Tensor, keep: Tensor) -> Tensor:
    """The share of each row's mass that is left out, (N,)."""
    return (grad - tiles.apply(keep, grad)).abs().sum(1) / grad.abs().sum(1)


def test_rounding_takes_no_more_than_it_is_said_to_take() -> None:
    grad = gradients(peaked(64)).double()
    taken = (grad.bfloat16().double() - grad).abs().sum(1) / grad.abs().sum(1)
    assert taken.max() <= 2 * tiles.AVERAGE_ROUNDING  # the bound of each number
    assert tiles.AVERAGE_ROUNDING / 4 < taken.mean() <= tiles.AVERAGE_ROUNDING


def test_every_row_stays_within_its_budget() -> None:
    grad = gradients(peaked(64))
    budget = 0.02  # larger than bf16's, so that a vocabulary of 64 has tiles to leave out
    keep = tiles.kept_tiles(tiles.block_mass(grad, VOCAB_BLOCK), ROW_BLOCK, each_row=True, budget=budget)
    assert 0 < left_out(grad, keep).max() <= budget * (1 + 1e-5)  # fp32 sums


def test_rows_of_a_tile_can_share_their_budgets() -> None:
    grad = gradients(peaked(64))
    mass = tiles.block_mass(grad, VOCAB_BLOCK)
    alone, shared = (tiles.kept_tiles(mass, ROW_BLOCK, each_row=each, budget=0.02) for each in (True, False))
    assert shared.sum() < alone.sum()
    of_blocks = (grad - tiles.apply(shared, grad)).abs().view(-1, ROW_BLOCK * VOCAB).sum(1)
    assert (of_blocks <= 0.02 * (1 + 1e-5) * grad.abs().view(-1, ROW_BLOCK * VOCAB).sum(1)).all()
    assert left_out(grad, shared).max() > 0.02


def test_a_likely_token_keeps_its_tile() -> None:
    grad = torch.zeros(2 * ROW_BLOCK, VOCAB)
    grad[5, 17] = -0.5  # the second block of rows, the third of the vocabulary
    keep = tiles.tiles_of_likely_tokens(grad, ROW_BLOCK, VOCAB_BLOCK, 0.5)
    assert keep.nonzero().tolist() == [[1, 2]]


@pytest.mark.parametrize("product", [products.sparse, products.gathered])
@pytest.mark.parametrize("kept", [0.0, 0.5, 1.0])  # nothing, runs of tiles of different lengths, everything
def test_left_out_tiles_count_as_zeros(product, kept: float) -> None:
    rows = peaked(16)
    grad = gradients(rows)
    keep = torch.rand(4, 8, generator=torch.Generator().manual_seed(1)) < kept
    expected = products.dense(tiles.apply(keep, grad), rows.weight, rows.hidden)
    torch.testing.assert_close(product(grad, rows.weight, rows.hidden, keep), expected)


def test_the_error_grows_with_what_is_left_out() -> None:
    rows = peaked(2 * CHUNK)  # two chunks, and an order that is not the vocabulary's own
    order = torch.arange(VOCAB).flip(0)
    everything = torch.ones(len(rows) // ROW_BLOCK, VOCAB // VOCAB_BLOCK, dtype=torch.bool)
    without_first = everything.clone()
    without_first[:, 0] = False  # the last eight tokens
    found = errors(rows, order, {"all": everything, "without": without_first})
    assert found["all"] == found[DENSE]
    assert 1e-4 < found[DENSE].hidden_norm < 2**-8  # of rounding to 8 bits
    assert found["without"].weight_norm > 10 * found[DENSE].weight_norm
    assert found["without"].dropped_tokens == VOCAB_BLOCK / VOCAB
    assert 0 == found["all"].mass < found["without"].mass
