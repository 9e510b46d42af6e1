"""Memory of a measured process: its peak, its allocator, and giving it back between two measurements."""

from __future__ import annotations

import ctypes
import gc
import os
import platform
import resource
import sys
from collections.abc import Mapping
from pathlib import Path

import torch

from benchmarks.step.contender import Contender

ALLOCATORS = ("jemalloc", "tcmalloc", "mimalloc")
VARIABLES = ("MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD", "TCMALLOC_", "MIMALLOC_")


class Parking:
    """Takes the weights and AdamW's state of a contender out of memory while others are measured, and puts them back.

    All contenders of a case park in one folder. Their weights are equal and do not move (see ``LEARNING_RATE``), so
    each weight is one file. AdamW's moments come back as zeros: their values do not change a step's work.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._sizes: dict[str, int] = {}  # bytes of each parked storage

    def park(self, contender: Contender) -> None:
        """Free the memory of all weights and moments."""
        for kind, name, tensor in contender.held():
            if not tensor.untyped_storage().resizable():  # a part of a mapped file
                tensor.data = tensor.data.clone()
            path = self.folder / kind / f"{name}.pt"
            if kind != "moment" and not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                torch.save(tensor.detach().clone(), path)
        for kind, name, tensor in contender.held():
            storage = tensor.untyped_storage()
            if storage.nbytes():  # else tied to one that is parked already
                self._sizes[f"{kind}/{name}"] = storage.nbytes()
                storage.resize_(0)
        give_back()

    def bring_back(self, contender: Contender) -> None:
        """Put weights and zeroed moments back into memory."""
        for kind, name, tensor in contender.held():
            size = self._sizes.pop(f"{kind}/{name}", None)
            if size is not None:
                tensor.untyped_storage().resize_(size)
            if kind == "moment":
                tensor.data.zero_()
            else:
                tensor.data.copy_(torch.load(self.folder / kind / f"{name}.pt", mmap=True))


def give_back() -> None:
    """Give unused memory back to the device or the operating system."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    elif trim := getattr(ctypes.CDLL(None), "malloc_trim", None):  # glibc keeps gigabytes in pieces otherwise
        trim(0)


def forget_peak() -> None:
    """Let the peak of this process's resident memory start again at its present size; only Linux can."""
    if sys.platform == "linux":
        Path("/proc/self/clear_refs").write_text("5")


def peak_bytes() -> int:
    """Return the most resident memory of this process since ``forget_peak``."""
    if sys.platform == "linux":
        [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
        return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def allocator(environment: Mapping[str, str] = os.environ) -> str:
    """Return the name of the process's memory allocator and the environment variables that tune it."""
    maps = Path("/proc/self/maps")
    loaded = maps.read_text() if maps.exists() else ""
    libc = " ".join(platform.libc_ver()).strip() or platform.system()
    name = next((name for name in ALLOCATORS if f"lib{name}" in loaded), f"{libc} malloc")
    tuned = [f"{key}={value}" for key, value in sorted(environment.items()) if key.startswith(VARIABLES)]
    return f"{name}, {' '.join(tuned) or 'no MALLOC_* variables'}"
