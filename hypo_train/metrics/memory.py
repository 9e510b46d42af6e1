"""How much memory a run took."""

from __future__ import annotations

import resource
import sys

import torch

GIB = 2**30


def readable(num_bytes: int) -> str:
    """In GiB, or in MiB where that would be next to nothing."""
    return f"{num_bytes / GIB:.2f} GiB" if num_bytes >= GIB / 100 else f"{num_bytes / 2**20:.2f} MiB"


def peak_memory(device: torch.device) -> dict[str, float]:
    """``memory/peak_gb`` and, on CUDA, ``memory/reserved_gb``.

    On CUDA the most that tensors took, and that torch's allocator held for them, since the last call; the peaks
    start anew, and nothing waits for the device. On a CPU the most that the process ever had resident, all of its
    libraries included: the system does not let that start anew.
    """
    if device.type == "cuda":
        peaks = {
            "memory/peak_gb": torch.cuda.max_memory_allocated(device) / GIB,
            "memory/reserved_gb": torch.cuda.max_memory_reserved(device) / GIB,
        }
        torch.cuda.reset_peak_memory_stats(device)
        return peaks
    unit = 1 if sys.platform == "darwin" else 2**10  # bytes there, KiB on Linux
    return {"memory/peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB}
