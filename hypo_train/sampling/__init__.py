"""Samplers, which draw completions from the policy: one protocol, several engines.

The names below are imported on first use, so that ``hypo_train.sampling.registry`` can be read without torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hypo_train.sampling.decode.sampler import DecodeSampler
    from hypo_train.sampling.decode.support import serves
    from hypo_train.sampling.generate import GenerateSampler
    from hypo_train.sampling.protocol import Distribution, PromptKV, Sampler, SampleRequest, Samples
    from hypo_train.sampling.sharded import ShardedSampler
    from hypo_train.sampling.vllm import VLLMSampler

_MODULES = {
    "DecodeSampler": "decode.sampler",
    "Distribution": "protocol",
    "GenerateSampler": "generate",
    "PromptKV": "protocol",
    "SampleRequest": "protocol",
    "Sampler": "protocol",
    "Samples": "protocol",
    "ShardedSampler": "sharded",
    "VLLMSampler": "vllm",
    "serves": "decode.support",
}
__all__ = [
    "DecodeSampler",
    "Distribution",
    "GenerateSampler",
    "PromptKV",
    "SampleRequest",
    "Sampler",
    "Samples",
    "ShardedSampler",
    "VLLMSampler",
    "serves",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
