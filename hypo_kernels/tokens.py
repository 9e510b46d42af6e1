"""The per-token pass: forward computes log-probs and entropies of counted rows, backward computes the logits again.

The upstream gradient of a token is not known before the backward pass, so this costs 2 NVD more than the group-closed
schedule.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from hypo_kernels import checks, gemm
from hypo_kernels.chunked_head import ChunkedLMHead
from hypo_kernels.chunks import split
from hypo_kernels.gradients import Gradients, Leaves
from hypo_kernels.layout import TargetLayout, sequence_layout
from hypo_kernels.projection import Projection


class TokenResults(NamedTuple):
    """The results of the forward pass for each counted row."""

    logps: Tensor  # (N,)
    entropies: Tensor | None  # (N,)
    norms: Tensor  # (N, 3), reused by the backward pass


@dataclass(frozen=True)
class TokenPass:
    """The checked arguments of a call of ``token_logprobs`` or ``sequence_logprobs``."""

    projection: Projection
    layout: TargetLayout
    compute_dtype: torch.dtype
    impl: str
    max_chunk_bytes: int
    with_entropy: bool

    def forward(self) -> TokenResults:
        """Return log-probs, entropies if ``with_entropy``, and norms."""
        with gemm.undisturbed(self.projection.hidden.device):
            lm_head = self._lm_head(self.projection, statistics_only=True)
            stats = lm_head.statistics(self.projection, lm_head.all_rows, with_moment=self.with_entropy)
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
        """Return the gradients of ``leaves``, the tensors of the call as autograd has saved them.

        With ``sums_are_wide``, the gradients' dtypes do not depend on the number of chunks.
        """
        projection = leaves.put_into(self.projection)
        with gemm.undisturbed(projection.hidden.device):
            lm_head = self._lm_head(projection)
            gradients = Gradients(
                leaves,
                needed,
                self.compute_dtype,
                lm_head.shard,
                in_one_product=len(self.layout.rows) <= lm_head.max_rows and not sums_are_wide,
            )
            for rows in split(lm_head.all_rows, lm_head.max_rows):
                row_factor = None
                if entropies is None or by_entropies is None:
                    unit, row_factor, _ = lm_head.unit_gradients(projection, rows, norms[rows])
                    coefficients = -by_logps[rows]
                else:
                    (raw,) = lm_head.raw_logits([projection], rows)
                    row_norms, divergence = norms[rows], -entropies[rows]
                    if lm_head.fused_statistics:  # they come from another GEMM (see ChunkedLMHead.unit_gradients)
                        stats, _ = lm_head.divergence_statistics(projection, raw, None, None, rows)
                        row_norms, divergence = stats.norms, stats.divergence(None)
                    unit, coefficients = lm_head.mixed_gradients(
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
                lm_head.accumulate(gradients, unit, projection, rows, coefficients, row_factor)
            gradients.close(lm_head.shard)
        return gradients

    def _lm_head(self, projection: Projection, *, statistics_only: bool = False) -> ChunkedLMHead:
        return ChunkedLMHead(
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
    max_chunk_bytes: int | None,
    impl: str,
    with_entropy: bool = False,
    *,
    of_sequences: bool = False,
) -> TokenPass:
    """Check the arguments of ``token_logprobs`` or ``sequence_logprobs``, and return them as a ``TokenPass``."""
    checks.inputs(projection, targets, cu_seqlens)
    if of_sequences or isinstance(targets, TargetLayout):
        layout = sequence_layout(targets, cu_seqlens)
    else:  # packed targets without bounds are treated as one sequence
        layout = TargetLayout.of(targets, cu_seqlens)
    budget = checks.chunk_budget(max_chunk_bytes, projection.hidden.device)
    dtype = checks.compute_dtype(projection.hidden, projection.head.weight)
    impl = checks.implementation(impl, projection.head, dtype)
    checks.targets_in_vocabulary(layout, projection.head)
    return TokenPass(projection, layout, dtype, impl, budget, with_entropy)
