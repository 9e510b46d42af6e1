"""The two products of the backward pass, dense and with tiles left out.

Both take the logit gradients (N, V), the weight (V, D) and the hidden states (N, D), and return the gradients of hidden
states (N, D) and weight (V, D).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor


def dense(grad: Tensor, weight: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
    return grad @ weight, grad.t() @ hidden


def sparse(grad: Tensor, weight: Tensor, hidden: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
    """``keep`` (blocks of rows, blocks of vocabulary) says which tiles of ``grad`` are multiplied.

    Neighbouring tiles are multiplied together and where they lie: nothing is copied.
    """
    row_block, vocab_block = grad.shape[0] // keep.shape[0], grad.shape[1] // keep.shape[1]
    grad_hidden, grad_weight = torch.zeros_like(hidden), torch.zeros_like(weight)
    for i, kept in enumerate(keep.tolist()):
        rows = slice(i * row_block, (i + 1) * row_block)
        for columns in _runs(kept, vocab_block):
            grad_hidden[rows].addmm_(grad[rows, columns], weight[columns])
    for j, kept in enumerate(keep.t().tolist()):
        columns = slice(j * vocab_block, (j + 1) * vocab_block)
        for rows in _runs(kept, row_block):
            grad_weight[columns].addmm_(grad[rows, columns].t(), hidden[rows])
    return grad_hidden, grad_weight


def gathered(grad: Tensor, weight: Tensor, hidden: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
    """Do the work of ``sparse`` with one product a block, on copies of the kept tiles."""
    row_blocks, vocab_blocks = keep.shape
    tiles = grad.view(row_blocks, -1, vocab_blocks, grad.shape[1] // vocab_blocks)
    weights, hiddens = weight.unflatten(0, (vocab_blocks, -1)), hidden.unflatten(0, (row_blocks, -1))
    grad_hidden, grad_weight = torch.empty_like(hiddens), torch.empty_like(weights)
    for i in range(row_blocks):
        torch.mm(tiles[i, :, keep[i]].flatten(1), weights[keep[i]].flatten(0, 1), out=grad_hidden[i])
    for j in range(vocab_blocks):
        torch.mm(tiles[keep[:, j], :, j].flatten(0, 1).t(), hiddens[keep[:, j]].flatten(0, 1), out=grad_weight[j])
    return grad_hidden.view_as(hidden), grad_weight.view_as(weight)


def _runs(kept: list[bool], size: int) -> Iterator[slice]:
    """Yield the elements of neighbouring kept blocks of ``size`` elements as one slice."""
    start = None
    for i, is_kept in enumerate([*kept, False]):
        if is_kept and start is None:
            start = i
        elif not is_kept and start is not None:
            yield slice(start * size, i * size)
            start = None
