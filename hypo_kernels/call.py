"""One loss call, checked and laid out: what an implementation is handed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hypo_kernels.chunks import Layout
from hypo_kernels.objective import Objective
from hypo_kernels.projection import Projection


@dataclass(frozen=True)
class Call:
    """Everything per sequence is in group order: each pair's two sequences, then each prompt's samples."""

    policy: Projection
    layout: Layout
    objective: Objective
    compute_dtype: torch.dtype
    impl: str
    kl_estimator: str
    max_chunk_bytes: int
    ref_logps: Tensor | None  # (S,)
    ref: Projection | None

    def largest_group(self) -> int:
        """Rows of the largest pair or group, the smallest chunk that keeps every group whole."""
        pairs, samples = self.layout.lengths.split(
            [2 * self.objective.num_pairs, len(self.layout.lengths) - 2 * self.objective.num_pairs]
        )
        sizes = torch.cat([pairs.view(-1, 2).sum(1), samples.view(-1, self.objective.num_generations).sum(1)])
        return int(sizes.max())
