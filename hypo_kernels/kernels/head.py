"""What every Triton kernel has to know of a head to turn raw products into the model's logits."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from hypo_kernels.head import LMHead
from hypo_kernels.kernels.tiles import INTERPRETER


@triton.jit
def tanh(x):
    # exp(−2|x|) never overflows; libdevice's tanh does not run under the interpreter.
    e = tl.exp(-2.0 * tl.abs(x))
    t = (1.0 - e) / (1.0 + e)
    return tl.where(x < 0, -t, t)


def head_arguments(head: LMHead) -> dict[str, Any]:
    """``factor`` is logit_scale / temperature, or logit_scale / softcap under a softcap; ``softcap`` is softcap /
    temperature: ``z = (raw + bias)·factor``, or ``tanh((raw + bias)·factor)·softcap``.
    """
    softcap = head.logit_softcap
    return {
        "bias_ptr": head.bias,
        "factor": head.logit_scale / (head.temperature if softcap is None else softcap),
        "softcap": 0.0 if softcap is None else softcap / head.temperature,
        "HAS_BIAS": head.bias is not None,
        "HAS_SOFTCAP": softcap is not None,
    }


def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability, or what stands for the interpreter on a CPU."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else INTERPRETER
