"""Which tiles of the logit gradients can be left out: a budget for each row, and the choice.

The gradient of a row's log-prob by its logits is ``g = onehot − p``, with ``Σ|g| = 2 (1 − p_y)``. A bf16 number has 8
significant bits: between 2^e and 2^(e+1) its neighbours are 2^(e−7) apart, so rounding to the nearest moves a number by
at most 2^(e−8), by 2^(e−9) on average. So rounding g to bf16 takes at most 2^-8 Σ|g| and on average no more
than 2^-9 Σ|g| from a row. The latter is the budget.
"""

from __future__ import annotations

import torch
from torch import Tensor

AVERAGE_ROUNDING = 2.0**-9


def unit_gradients(probs: Tensor, targets: Tensor) -> Tensor:
    """Return ``onehot(target) − probs``, (N, V), in place of ``probs``."""
    grad = probs.neg_()
    return grad.scatter_add_(1, targets[:, None], torch.ones_like(targets[:, None], dtype=grad.dtype))


def block_mass(grad: Tensor, vocab_block: int) -> Tensor:
    """Return ``Σ|g|`` over each block of the vocabulary, (N, V / vocab_block). The target's block is never small."""
    return grad.unflatten(1, (-1, vocab_block)).norm(p=1, dim=2)


def kept_tiles(mass: Tensor, row_block: int, *, each_row: bool, budget: float = AVERAGE_ROUNDING) -> Tensor:
    """Return which tiles must be kept, (N / row_block, V / vocab_block) bool, leaving out as many as the budget bears.

    ``mass`` is (N, V / vocab_block) from ``block_mass``, and ``budget`` a share of a row's ``Σ|g|``. The smallest tiles
    are left out first. With ``each_row`` the mass left out stays within the budget in every row of a tile; otherwise
    within the sum of the budgets of the tile's rows, so that a row may lose what its neighbours do not.
    """
    parts = mass.unflatten(0, (-1, row_block))  # (blocks of rows, row_block, blocks of vocabulary)
    if not each_row:
        parts = parts.sum(1, keepdim=True)
    used = parts / (budget * parts.sum(2, keepdim=True))  # the share of the budget that a tile takes
    order = used.amax(1).argsort(1)
    left_out = used.gather(2, order[:, None].expand(used.shape)).cumsum(2).amax(1) <= 1
    return torch.empty_like(left_out).scatter_(1, order, ~left_out)


def tiles_of_likely_tokens(grad: Tensor, row_block: int, vocab_block: int, threshold: float) -> Tensor:
    """Return the tiles in which an entry of |g| reaches ``threshold``: Cut Cross-Entropy's rule, with 2^-12 in bf16."""
    return grad.abs().view(-1, row_block, grad.shape[1] // vocab_block, vocab_block).amax((1, 3)) >= threshold


def apply(keep: Tensor, grad: Tensor) -> Tensor:
    """Return ``grad`` (N, V) with zeros in the tiles that are not kept."""
    row_block, vocab_block = grad.shape[0] // keep.shape[0], grad.shape[1] // keep.shape[1]
    tiles = grad.view(keep.shape[0], row_block, keep.shape[1], vocab_block)
    return (tiles * keep[:, None, :, None]).view_as(grad)
