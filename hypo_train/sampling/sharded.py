"""Sampling from a model whose weights FSDP shards."""

from __future__ import annotations

from hypo_train.model.policy import Policy
from hypo_train.sampling.protocol import Sampler, SampleRequest, Samples


class ShardedSampler(Sampler):
    """Runs ``engine``, which samples from ``policy``'s model, inside a forward pass of the policy.

    The weights are gathered for that pass, so each process holds all of them while it samples. Each process draws as
    many tokens as its own completions need.
    """

    def __init__(self, engine: Sampler, policy: Policy) -> None:
        self.engine = engine
        self.policy = policy

    @property
    def live(self) -> bool:
        return self.engine.live

    def draw(self, request: SampleRequest) -> Samples:
        return self.policy.with_full_weights(lambda: self.engine.draw(request))

    def skip(self) -> None:
        self.policy.with_full_weights(self.engine.skip)

    def weights_changed(self, step: int) -> None:
        self.engine.weights_changed(step)

    def release(self) -> None:
        self.engine.release()
