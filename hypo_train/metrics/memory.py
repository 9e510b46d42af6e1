"""Measure the peak memory of a run, and format sizes."""

from __future__ import annotations

import resource
import sys

import torch

GIB = 2**30


def readable(num_bytes: int) -> str:
    """Return ``num_bytes`` as text: in MiB below a hundredth of a GiB, else in GiB."""
    return f"{num_bytes / GIB:.2f} GiB" if num_bytes >= GIB / 100 else f"{num_bytes / 2**20:.2f} MiB"


def peak_memory(device: torch.device) -> dict[str, float]:
    """Return ``memory/peak_gb`` and, on CUDA, ``memory/reserved_gb``, in GiB.

    On CUDA: the peaks of allocated and of reserved memory since the last call, without waiting for the device. On a
    CPU: the peak resident memory of the process since its start, libraries included; the system cannot reset it.
    """
    if device.type == "cuda":
        peaks = {
            "memory/peak_gb": torch.cuda.max_memory_allocated(device) / GIB,
            "memory/reserved_gb": torch.cuda.max_memory_reserved(device) / GIB,
        }
        torch.cuda.reset_peak_memory_stats(device)
        return peaks
    unit = 1 if sys.platform == "darwin" else 2**10  # macOS reports bytes, Linux KiB
    return {"memory/peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB}
