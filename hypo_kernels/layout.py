"""The layout of a batch: the counted rows, and the sequence of each. Computed on the CPU.

With ``targets`` and ``cu_seqlens`` on the CPU, computing a layout never waits for the GPU. Pass one
:class:`TargetLayout` to several calls to copy it to the device only once; a CUDA graph can capture these calls.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from hypo_kernels.errors import require
from hypo_kernels.transfer import on_device

IGNORE_INDEX = -100


class OnDevice(NamedTuple):
    """A layout's tensors on a device."""

    rows: Tensor  # (N,)
    targets: Tensor  # (N,)
    lengths: Tensor  # (S,)


@dataclass(frozen=True)
class TargetLayout:
    """The counted rows, sequence after sequence. Public functions accept it instead of targets and cu_seqlens.

    The first call on a device copies the layout there; later calls reuse the copy.
    """

    rows: Tensor  # (N,) int64 on the CPU, index into hidden seen as (T, D)
    targets: Tensor  # (N,) int64 on the CPU
    lengths: Tensor  # (S,) int64 on the CPU, counted rows of each sequence
    shape: torch.Size  # shape of the targets: (T,) or (S, L)
    _copies: dict[torch.device, OnDevice] = field(default_factory=dict, repr=False, compare=False)
    _groups: dict[tuple[int, torch.device], tuple[TargetLayout, Tensor]] = field(
        default_factory=dict, repr=False, compare=False
    )

    @classmethod
    def of(cls, targets: Tensor, cu_seqlens: Tensor | None = None) -> TargetLayout:
        """Return the layout of packed targets (T,) with ``cu_seqlens`` (S+1,), or of padded targets (S, L).

        Rows whose target is -100 are left out. Packed targets without ``cu_seqlens`` are one sequence. Raises
        ValueError if ``cu_seqlens`` does not fit the targets.
        """
        flat = targets.cpu().flatten().long()
        if cu_seqlens is None:
            num_sequences = len(targets) if targets.ndim == 2 else 1
            bounds = torch.arange(num_sequences + 1) * targets.shape[-1]
        else:
            _check_bounds(cu_seqlens, len(targets))
            bounds = cu_seqlens.cpu().long()
        counted = flat != IGNORE_INDEX
        before = torch.cat([torch.zeros(1, dtype=torch.long), counted.cumsum(0)])
        lengths = before[bounds[1:]] - before[bounds[:-1]]
        rows = counted.nonzero().squeeze(1)
        return cls(rows, flat[rows], lengths, targets.shape)

    def on(self, device: torch.device) -> OnDevice:
        """Return the layout's tensors on ``device`` (cached)."""
        if device not in self._copies:
            self._copies[device] = OnDevice(*on_device((self.rows, self.targets, self.lengths), device))
        return self._copies[device]

    def num_rows(self, num_sequences: int) -> int:
        """Return the number of counted rows in the first ``num_sequences`` sequences."""
        return int(self.lengths[:num_sequences].sum())

    def in_groups(self, num_pairs: int, device: torch.device) -> tuple[TargetLayout, Tensor]:
        """Return the layout in group order (see :func:`group_order`), and that order (S,) on ``device``.

        Cached.
        """
        key = (num_pairs, device)
        if key not in self._groups:
            order = group_order(len(self.lengths), num_pairs)
            self._groups[key] = (self._reordered(order), on_device((order,), device)[0])
        return self._groups[key]

    def _reordered(self, order: Tensor) -> TargetLayout:
        starts = self.lengths.cumsum(0) - self.lengths
        lengths = self.lengths[order]
        shift = starts[order] - (lengths.cumsum(0) - lengths)
        index = torch.arange(len(self.rows)) + shift.repeat_interleave(lengths)
        return TargetLayout(self.rows[index], self.targets[index], lengths, self.shape)


def sequence_layout(targets: Tensor | TargetLayout, cu_seqlens: Tensor | None) -> TargetLayout:
    """Return the layout of several sequences. Raises ValueError if packed targets come without ``cu_seqlens``."""
    if isinstance(targets, TargetLayout):
        return targets
    require(
        targets.ndim != 1 or cu_seqlens is not None,
        "cu_seqlens is missing: packed hidden (T, D) needs it to tell its sequences apart",
    )
    return TargetLayout.of(targets, cu_seqlens)


def group_order(num_sequences: int, num_pairs: int) -> Tensor:
    """Return sequence indices (S,): each chosen followed by its rejected, then the samples in their order."""
    pairs = torch.arange(2 * num_pairs).view(2, num_pairs).t().flatten()
    return torch.cat([pairs, torch.arange(2 * num_pairs, num_sequences)])


def _check_bounds(cu_seqlens: Tensor, num_rows: int) -> None:
    """Raise ValueError unless ``cu_seqlens`` (S+1,) starts at 0, never decreases and ends at ``num_rows``."""
    require(
        cu_seqlens.ndim == 1 and len(cu_seqlens) >= 1 and not cu_seqlens.dtype.is_floating_point,
        f"cu_seqlens is {cu_seqlens.dtype} of shape {tuple(cu_seqlens.shape)}: must be integers of shape (S+1,)",
    )
    bounds = cu_seqlens.tolist()
    require(bounds[0] == 0, f"cu_seqlens starts at {bounds[0]}: must start at 0")
    require(
        bounds[-1] == num_rows,
        f"cu_seqlens ends at {bounds[-1]}: must end at T={num_rows}, the number of rows",
    )
    for i, (a, b) in enumerate(itertools.pairwise(bounds)):
        require(b >= a, f"cu_seqlens falls from {a} to {b} at position {i + 1}: must not decrease")
