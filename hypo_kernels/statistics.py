"""The statistics of a row of logits, and how those of several ranks are merged.

    top = max_v z_v    total = Σ_v exp(z_v − top)    others = Σ_{v ≠ y} exp(z_v − top), without the target y
    log p_v = z_v − top − log total
    log p_y = −softplus(lse_others − z_y), lse_others = top + log others            p_y − 1 = −others / total

The norms of a row, top, total and others, are stored separately: their log-sum-exp would be rounded at the magnitude of
the logits, and so would every probability. The others are summed without the target: of a likely target, with a term
near 1, their sum would be what the rounding of the total leaves, and so would log p_y and its gradient.

The moment of a row with reference logits w is ``Σ_v exp(z_v − top)·((z_v − top) − (w_v − top_w))``. Then
``KL(p‖q) = Σ_v p_v (log p_v − log q_v) = moment/total − log total + log total_w``. Without reference logits
(w − top_w = 0, total_w = 1) this expression is minus the entropy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from hypo_kernels.vocab import VocabShard


@dataclass(frozen=True)
class RowStatistics:
    """Statistics of C rows of logits, in fp32 (fp64 for fp64 inputs)."""

    norms: Tensor  # (C, 3): top, total and others
    target: Tensor  # (C,), the target's logit; 0 if another rank holds it
    moment: Tensor | None = None  # (C,)

    def logps(self) -> Tensor:
        """Return log p(target), (C,)."""
        top, _, others = self.norms.unbind(1)
        return F.logsigmoid(self.target - top - others.log())

    def divergence(self, ref: RowStatistics | None) -> Tensor:
        """Return KL(p‖q) of each row, (C,), or minus the entropy without a reference."""
        assert self.moment is not None
        total = self.norms[:, 1]
        negative_entropy = self.moment / total - total.log()
        return negative_entropy if ref is None else negative_entropy + ref.norms[:, 1].log()

    def __getitem__(self, rows: slice) -> RowStatistics:
        return RowStatistics(self.norms[rows], self.target[rows], None if self.moment is None else self.moment[rows])

    @staticmethod
    def cat(parts: Sequence[RowStatistics]) -> RowStatistics:
        """Concatenate the rows of ``parts``."""
        moments = [part.moment for part in parts if part.moment is not None]
        return RowStatistics(
            torch.cat([part.norms for part in parts]),
            torch.cat([part.target for part in parts]),
            torch.cat(moments) if moments else None,
        )


def over_ranks(
    stats: RowStatistics, ref: RowStatistics | None, shard: VocabShard
) -> tuple[RowStatistics, RowStatistics | None]:
    """Merge the ranks' statistics into those of the full vocabulary, on every rank."""
    merged_ref = None if ref is None else over_ranks(ref, None, shard)[0]
    top, total, others = stats.norms.unbind(1)
    merged_top = shard.max_(top.clone())
    shift = top - merged_top
    sums = [others * shift.exp(), stats.target]
    if stats.moment is not None:
        if ref is not None and merged_ref is not None:
            shift = shift - (ref.norms[:, 0] - merged_ref.norms[:, 0])
        sums.append((stats.moment + total * shift) * (top - merged_top).exp())
    summed = shard.sum_(torch.stack(sums))
    merged_others, target = summed[0], summed[1]
    norms = torch.stack([merged_top, merged_others + (target - merged_top).exp(), merged_others], dim=1)
    return RowStatistics(norms, target, None if stats.moment is None else summed[2]), merged_ref


def sequence_sums(rows: Tensor, lengths: Tensor) -> Tensor:
    """Return the sum of each sequence's rows, (N, ...) -> (S, ...), deterministic; ``lengths`` (S,) on their device.

    Summed in fp64: each of thousands of fp32 additions would round at the size of the sum.
    """
    return torch.segment_reduce(rows.double(), "sum", lengths=lengths, unsafe=True, initial=0.0).to(rows.dtype)
