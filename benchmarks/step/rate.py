"""The machine's rate of bare matrix products."""

from __future__ import annotations

import time

import torch

ROWS, WIDTH, INNER = 2048, 576, 1536  # an MLP of SmolLM2-135M on the tokens of a step
REPEATS = 20


def gemm_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Return the FLOP per second of a linear layer's product on torch's threads: the median of ``REPEATS``."""
    x = torch.randn(ROWS, WIDTH, device=device, dtype=dtype)
    weight = torch.randn(INNER, WIDTH, device=device, dtype=dtype)
    seconds = []
    for _ in range(REPEATS):
        _wait(device)
        start = time.perf_counter()
        torch.nn.functional.linear(x, weight)
        _wait(device)
        seconds.append(time.perf_counter() - start)
    return 2.0 * ROWS * WIDTH * INNER / sorted(seconds)[REPEATS // 2]


def why_no_bf16(device: torch.device) -> str:
    """Return why bf16 gains nothing on this device, or an empty text."""
    if device.type == "cuda":
        return ""
    share = gemm_rate(device, torch.bfloat16) / gemm_rate(device, torch.float32)
    return f"bf16 products run at {share:.1f} x the rate of fp32 here (--bf16 measures it anyway)" if share < 1 else ""


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
