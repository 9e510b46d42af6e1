"""What a call costs: GEMM work counted from the shapes, memory from the allocator's own events."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class GemmMeter(TorchDispatchMode):
    """Shapes (m, k, n) of every matrix product that runs inside it, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, int, int]] = []

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
    """The most that ``call`` held at once, in bytes, of tensors allocated since it began.

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
