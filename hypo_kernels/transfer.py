"""Copies from the host to the device for which the host does not wait."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def on_device(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Return copies on ``device`` of the host's int64 tensors, of any shapes, by a single transfer.

    CUDA reads pinned memory while the host goes on. Any other memory passes through a buffer of the driver, and a copy
    of more than 64 KB waits there until the work before it is done, whatever ``non_blocking`` says.
    """
    if device.type != "cuda":
        return [x.to(device) for x in tensors]
    sizes = [x.numel() for x in tensors]
    staged = torch.empty(sum(sizes), dtype=torch.int64, pin_memory=True)
    torch.cat([x.flatten() for x in tensors], out=staged)
    parts = staged.to(device, non_blocking=True).split(sizes)
    return [part.view(x.shape) for part, x in zip(parts, tensors, strict=True)]
