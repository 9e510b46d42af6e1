"""On-policy completions, drawn from the weights as they are now: one protocol, several engines."""

from hypo_train.sampling.decode import DecodeSampler
from hypo_train.sampling.generate import GenerateSampler
from hypo_train.sampling.protocol import PromptKV, Sampler, Samples
from hypo_train.sampling.sharded import ShardedSampler
from hypo_train.sampling.support import serves
from hypo_train.sampling.vllm import VLLMSampler

__all__ = [
    "DecodeSampler",
    "GenerateSampler",
    "PromptKV",
    "Sampler",
    "Samples",
    "ShardedSampler",
    "VLLMSampler",
    "serves",
]
