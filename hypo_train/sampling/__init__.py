"""On-policy completions, drawn from the weights as they are now: one protocol, several engines."""

from hypo_train.sampling.decode.sampler import DecodeSampler
from hypo_train.sampling.decode.support import serves
from hypo_train.sampling.generate import GenerateSampler
from hypo_train.sampling.protocol import Distribution, PromptKV, Sampler, Samples
from hypo_train.sampling.sharded import ShardedSampler
from hypo_train.sampling.vllm import VLLMSampler

__all__ = [
    "DecodeSampler",
    "Distribution",
    "GenerateSampler",
    "PromptKV",
    "Sampler",
    "Samples",
    "ShardedSampler",
    "VLLMSampler",
    "serves",
]
