"""What a row of logits is reduced to, and how the shares of several ranks make one.

    top = max_v z_v        total = Σ_v exp(z_v − top)        log p_v = z_v − top − log total

The norms of a row, top and total, are kept apart: added up to a log-sum-exp, they would be rounded at the
size of the logits, and every probability with them. The moment of a row against reference logits w is
``Σ_v exp(z_v − top)·((z_v − top) − (w_v − top_w))``: with it,
``KL(p‖q) = Σ_v p_v (log p_v − log q_v) = moment/total − log total + log total_w``, and without reference
logits (w − top_w = 0, total_w = 1) the same expression is minus the entropy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hypo_kernels.vocab import VocabShard


@dataclass(frozen=True)
class RowStatistics:
    """Of C rows, in fp32 (fp64 for fp64 inputs)."""

    norms: Tensor  # (C, 2), top and total
    target: Tensor  # (C,), the target's logit; 0 where it is in another rank's vocabulary
    moment: Tensor | None = None  # (C,)

    def logps(self) -> Tensor:
        """log p(target), (C,)."""
        top, total = self.norms.unbind(1)
        return self.target - top - total.log()

    def divergence(self, ref: RowStatistics | None) -> Tensor:
        """KL(p‖q) of each row, (C,), or minus the entropy without a reference."""
        assert self.moment is not None
        total = self.norms[:, 1]
        out = self.moment / total - total.log()
        return out if ref is None else out + ref.norms[:, 1].log()

    def __getitem__(self, rows: slice) -> RowStatistics:
        return RowStatistics(self.norms[rows], self.target[rows], None if self.moment is None else self.moment[rows])

    @staticmethod
    def cat(parts: Sequence[RowStatistics]) -> RowStatistics:
        moments = [part.moment for part in parts if part.moment is not None]
        return RowStatistics(
            torch.cat([part.norms for part in parts]),
            torch.cat([part.target for part in parts]),
            torch.cat(moments) if moments else None,
        )


def over_ranks(
    stats: RowStatistics, ref: RowStatistics | None, shard: VocabShard
) -> tuple[RowStatistics, RowStatistics | None]:
    """The statistics of the whole vocabulary, on every rank, from each rank's own."""
    whole_ref = None if ref is None else over_ranks(ref, None, shard)[0]
    top, total = stats.norms.unbind(1)
    whole_top = shard.max_(top.clone())
    shift = top - whole_top
    sums = [total * shift.exp(), stats.target]
    if stats.moment is not None:
        if ref is not None and whole_ref is not None:
            shift = shift - (ref.norms[:, 0] - whole_ref.norms[:, 0])
        sums.append((stats.moment + total * shift) * (top - whole_top).exp())
    summed = shard.sum_(torch.stack(sums))
    norms = torch.stack([whole_top, summed[0]], dim=1)
    return RowStatistics(norms, summed[1], None if stats.moment is None else summed[2]), whole_ref


def sequence_sums(rows: Tensor, lengths: Tensor) -> Tensor:
    """Deterministic sum of each sequence's rows, (N, ...) -> (S, ...); ``lengths`` (S,) on the rows' device.

    Added in fp64: thousands of fp32 additions, one after another, would each round at the size of the sum.
    """
    return torch.segment_reduce(rows.double(), "sum", lengths=lengths, unsafe=True, initial=0.0).to(rows.dtype)
