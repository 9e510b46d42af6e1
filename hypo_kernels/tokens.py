"""The per-token pass: log-probs and entropies of counted rows forward, logits once more backward.

The upstream gradient of a token is not known before the backward pass, which is why this costs 2 NVD more than
the group-closed schedule.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from hypo_kernels import checks, gemm
from hypo_kernels.chunks import split
from hypo_kernels.gradients import Gradients, Leaves
from hypo_kernels.layout import TargetLayout, sequence_layout
from hypo_kernels.projection import Projection
from hypo_kernels.room import HeadRoom


class TokenResults(NamedTuple):
    logps: Tensor  # (N,)
    entropies: Tensor | None  # (N,)
    norms: Tensor  # (N, 2), what the backward pass needs to skip the statistics


@dataclass(frozen=True)
class TokenPass:
    """One call, checked and laid out."""

    projection: Projection
    layout: TargetLayout
    compute_dtype: torch.dtype
    impl: str
    max_chunk_bytes: int
    with_entropy: bool

    def forward(self) -> TokenResults:
        with gemm.undisturbed(self.projection.hidden.device):
            room = self._room(self.projection, statistics_only=True)
            stats = room.statistics(self.projection, room.all_rows, with_moment=self.with_entropy)
            entropies = -stats.divergence(None) if self.with_entropy else None
            return TokenResults(stats.logps(), entropies, stats.norms)

    def backward(
        self,
        leaves: Leaves,
        norms: Tensor,
        entropies: Tensor | None,
        by_logps: Tensor,  # (N,)
        by_entropies: Tensor | None,  # (N,)
        needed: Sequence[bool],
        *,
        sums_are_wide: bool = False,
    ) -> Gradients:
        """The gradients of ``leaves``, the call's own or what autograd has saved of them.

        ``sums_are_wide`` asks for the same dtypes whatever the number of chunks.
        """
        projection = leaves.put_into(self.projection)
        with gemm.undisturbed(projection.hidden.device):
            room = self._room(projection)
            gradients = Gradients(
                leaves,
                needed,
                self.compute_dtype,
                room.shard,
                in_one_product=len(self.layout.rows) <= room.max_rows and not sums_are_wide,
            )
            for rows in split(room.all_rows, room.max_rows):
                own = None
                if entropies is None or by_entropies is None:
                    unit, own, _ = room.unit_gradients(projection, rows, norms[rows])
                    factor = -by_logps[rows]
                else:
                    (raw,) = room.logits([projection], rows)
                    row_norms, divergence = norms[rows], -entropies[rows]
                    if room.straight:  # of another product than these logits (see HeadRoom.unit_gradients)
                        stats, _ = room.divergence_statistics(projection, raw, None, None, rows)
                        row_norms, divergence = stats.norms, stats.divergence(None)
                    unit, factor = room.mixed_gradients(
                        projection,
                        raw,
                        None,
                        None,
                        rows,
                        norms=row_norms,
                        ref_norms=None,
                        divergence=divergence,
                        by_logp=by_logps[rows],
                        by_divergence=-by_entropies[rows],
                    )
                room.finish(gradients, unit, projection, rows, factor, own)
            gradients.close(room.shard)
        return gradients

    def _room(self, projection: Projection, *, statistics_only: bool = False) -> HeadRoom:
        return HeadRoom(
            [projection.head],
            self.layout,
            self.compute_dtype,
            self.impl,
            self.max_chunk_bytes,
            with_divergence=self.with_entropy,
            statistics_only=statistics_only,
        )


def token_pass(
    projection: Projection,
    targets: Tensor | TargetLayout,
    cu_seqlens: Tensor | None,
    max_chunk_bytes: int,
    impl: str,
    with_entropy: bool = False,
    *,
    of_sequences: bool = False,
) -> TokenPass:
    """Check the arguments of ``token_logprobs`` or ``sequence_logprobs``, and lay them out."""
    checks.inputs(projection, targets, cu_seqlens)
    if of_sequences or isinstance(targets, TargetLayout):
        layout = sequence_layout(targets, cu_seqlens)
    else:  # packed targets without bounds are as good as one sequence
        layout = TargetLayout.of(targets, cu_seqlens)
    checks.chunk_budget(max_chunk_bytes)
    dtype = checks.compute_dtype(projection.hidden, projection.head.weight)
    impl = checks.implementation(impl, projection.head, dtype)
    checks.targets_in_vocabulary(layout, projection.head)
    return TokenPass(projection, layout, dtype, impl, max_chunk_bytes, with_entropy)
