"""Any engine over a model whose weights are spread over processes: they are put together while it draws."""

from __future__ import annotations

from typing import Any

from hypo_train.model.policy import Policy
from hypo_train.sampling.protocol import Sampler, Samples


class ShardedSampler:
    """``engine``, which draws from ``policy``'s model, inside a forward pass of the policy.

    Each process holds all weights while it draws, and draws as many tokens as its own samples need.
    """

    takes_prompt_kv = False

    def __init__(self, engine: Sampler, policy: Policy) -> None:
        self.engine = engine
        self.policy = policy

    @property
    def live(self) -> bool:
        return self.engine.live

    def sample(
        self,
        prompts: list[list[int]],
        n: int,
        max_new_tokens: int,
        **options: Any,
    ) -> Samples:
        """See `Sampler.sample`."""
        return self.policy.with_full_weights(lambda: self.engine.sample(prompts, n, max_new_tokens, **options))

    def weights_changed(self, step: int) -> None:
        self.engine.weights_changed(step)

    def release(self) -> None:
        self.engine.release()
