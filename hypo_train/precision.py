"""The precision that a run computes in, and why."""

from __future__ import annotations

from hypo_kernels import amx
from hypo_train.config import Config


def computes_in_bf16(config: Config, device_type: str) -> bool:
    """Return whether a run on ``device_type`` computes under bfloat16 autocast.

    The default on a CPU is fp32 even if it has AMX: casts take what products save in a small model, and whole steps
    of SmolLM2-135M were measured faster and slower in bfloat16.
    """
    return device_type == "cuda" if config.bf16 is None else config.bf16


def describe_precision(config: Config, device_type: str) -> str:
    """Return a line that says what a run computes in, and why."""
    dtype = "bfloat16" if computes_in_bf16(config, device_type) else "float32"
    device = "CUDA" if device_type == "cuda" else "a CPU"
    why = f"the default on {device}" if config.bf16 is None else f"bf16: {str(config.bf16).lower()}"
    line = f"computing in {dtype} ({why})"
    if device_type != "cpu" or config.bf16 is False:
        return line
    if config.bf16:
        return f"{line}; this CPU {'multiplies bfloat16 with AMX' if amx.is_supported() else 'has no AMX for bfloat16'}"
    if amx.is_supported():
        return f"{line}; this CPU has AMX: compare the seconds of a few steps with bf16: true"
    return line
