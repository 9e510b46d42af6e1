"""Which rows count, and to which sequence they belong: what a call has to know of its targets on the host.

Pass ``targets`` and ``cu_seqlens`` as CPU tensors, and laying them out never waits for the GPU. Lay them out
once (:class:`TargetLayout`), and a call copies nothing to the device either: it can be captured in a CUDA graph.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from hypo_kernels import checks
from hypo_kernels.checks import IGNORE_INDEX


class OnDevice(NamedTuple):
    rows: Tensor  # (N,)
    targets: Tensor  # (N,)
    lengths: Tensor  # (S,)


@dataclass(frozen=True)
class TargetLayout:
    """The rows that count, sequence after sequence; stands in for ``targets`` and ``cu_seqlens`` in every function.

    Copies to a device are made by the first call there and kept: calls after it have nothing to copy.
    """

    rows: Tensor  # (N,) int64 on the CPU, index into hidden seen as (T, D)
    targets: Tensor  # (N,) int64 on the CPU
    lengths: Tensor  # (S,) int64 on the CPU, counted rows of each sequence
    shape: torch.Size  # of the targets: (T,) or (S, L)
    _copies: dict[torch.device, OnDevice] = field(default_factory=dict, repr=False, compare=False)
    _groups: dict[tuple[int, torch.device], tuple[TargetLayout, Tensor]] = field(
        default_factory=dict, repr=False, compare=False
    )

    @classmethod
    def of(cls, targets: Tensor, cu_seqlens: Tensor | None = None) -> TargetLayout:
        """Drop the ignored rows of packed (T,) targets with ``cu_seqlens`` (S+1,), or of padded (S, L) ones.

        Packed targets without ``cu_seqlens`` are one sequence. Raises ValueError for bounds that do not fit.
        """
        flat = targets.cpu().flatten().long()
        if cu_seqlens is None:
            num_sequences = len(targets) if targets.ndim == 2 else 1
            bounds = torch.arange(num_sequences + 1) * targets.shape[-1]
        else:
            checks.sequences(cu_seqlens, len(targets))
            bounds = cu_seqlens.cpu().long()
        counted = flat != IGNORE_INDEX
        before = torch.cat([torch.zeros(1, dtype=torch.long), counted.cumsum(0)])
        lengths = before[bounds[1:]] - before[bounds[:-1]]
        rows = counted.nonzero().squeeze(1)
        return cls(rows, flat[rows], lengths, targets.shape)

    def on(self, device: torch.device) -> OnDevice:
        """The same, there."""
        if device not in self._copies:
            self._copies[device] = OnDevice(
                *(x.to(device, non_blocking=True) for x in (self.rows, self.targets, self.lengths))
            )
        return self._copies[device]

    def num_rows(self, num_sequences: int) -> int:
        """Counted rows of the first ``num_sequences``."""
        return int(self.lengths[:num_sequences].sum())

    def in_groups(self, num_pairs: int, device: torch.device) -> tuple[TargetLayout, Tensor]:
        """The same rows in group order, each pair's two sequences side by side, and that order (S,) on ``device``."""
        key = (num_pairs, device)
        if key not in self._groups:
            order = group_order(len(self.lengths), num_pairs)
            self._groups[key] = (self._reordered(order), order.to(device, non_blocking=True))
        return self._groups[key]

    def _reordered(self, order: Tensor) -> TargetLayout:
        """The same rows with the sequences in ``order`` (S,)."""
        starts = self.lengths.cumsum(0) - self.lengths
        lengths = self.lengths[order]
        shift = starts[order] - (lengths.cumsum(0) - lengths)
        index = torch.arange(len(self.rows)) + shift.repeat_interleave(lengths)
        return TargetLayout(self.rows[index], self.targets[index], lengths, self.shape)


def sequence_layout(targets: Tensor | TargetLayout, cu_seqlens: Tensor | None) -> TargetLayout:
    """The layout of several sequences, which packed targets do not have without their bounds."""
    if isinstance(targets, TargetLayout):
        return targets
    if targets.ndim == 1 and cu_seqlens is None:
        raise ValueError("cu_seqlens is missing: packed hidden (T, D) needs it to tell its sequences apart")
    return TargetLayout.of(targets, cu_seqlens)


def group_order(num_sequences: int, num_pairs: int) -> Tensor:
    """Sequence indices with each pair's two sequences next to each other; samples are grouped already."""
    pairs = torch.arange(2 * num_pairs).view(2, num_pairs).t().flatten()
    return torch.cat([pairs, torch.arange(2 * num_pairs, num_sequences)])
