"""Meters of a call's cost: GEMM work from the shapes, memory from the allocator's events."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

# The functions (x, weight, …) of Triton kernels with a product in them, by module.
TRITON_PRODUCTS = {"statistics": "statistics", "exponentials": "exponentials"}


class GemmMeter(TorchDispatchMode):
    """Shapes (m, k, n) of every matrix product that runs inside it, those of Triton kernels included, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, int, int]] = []
        self._patches = pytest.MonkeyPatch()

    def __enter__(self) -> GemmMeter:
        if importlib.util.find_spec("triton") is not None:
            for module, function in TRITON_PRODUCTS.items():
                self._count(importlib.import_module(f"hypo_kernels.kernels.{module}"), function)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        self._patches.undo()
        super().__exit__(*error)

    def _count(self, module: ModuleType, name: str) -> None:
        function = getattr(module, name)

        def counted(x: torch.Tensor, weight: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            self.shapes.append((x.shape[0], x.shape[1], weight.shape[0]))
            return function(x, weight, *args, **kwargs)

        self._patches.setattr(module, name, counted)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm):
            a, b = [x for x in args if isinstance(x, torch.Tensor)][-2:]
            self.shapes.append((a.shape[0], a.shape[1], b.shape[1]))
        elif func.overloadpacket in (torch.ops.aten.bmm, torch.ops.aten.baddbmm, torch.ops.aten.matmul):
            raise AssertionError(f"{func} is not counted: teach the meter its shapes")
        return func(*args, **(kwargs or {}))

    @property
    def flops(self) -> int:
        return sum(2 * m * k * n for m, k, n in self.shapes)


def peak_bytes(device: torch.device, call: Callable[[], Any]) -> int:
    """Return the peak bytes of tensors that ``call`` allocated.

    Counts every allocation, those inside operators too. The result of the call lives to its end.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        result = call()
        torch.cuda.synchronize(device)
        del result
        return torch.cuda.max_memory_allocated(device) - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        result = call()
    del result
    assert profile.profiler is not None
    allocations = sorted(
        (event.start_ns(), event.nbytes())
        for event in profile.profiler.kineto_results.events()
        if event.name() == "[memory]"
    )
    peak = live = 0
    for _, size in allocations:
        live += size
        peak = max(peak, live)
    return peak
