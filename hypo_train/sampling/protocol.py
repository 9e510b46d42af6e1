"""What an engine takes and gives: the `Sampler` protocol, and the rows and checks that engines share.

An engine is anything that keeps the protocol; `tests/train/test_sampler.py` is the suite that every one passes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper


@dataclass(frozen=True)
class Samples:
    """`n` completions of each of N prompts, on the model's device; row r belongs to prompt r // n."""

    tokens: Tensor  # int64 (N * n, L), right-padded with pad_token_id
    mask: Tensor  # bool (N * n, L), True up to and including EOS
    logprobs: Tensor | None  # float32 (N * n, L), under the sampling distribution, 0 where masked
    ended: Tensor  # bool (N * n,), EOS seen; False = cut at max_new_tokens
    version: int  # optimizer step of the weights used

    def completions(self) -> list[list[int]]:
        """The token ids of each row, EOS included, read from the device in one go."""
        lengths = self.mask.sum(1, keepdim=True)
        return [row[1 : 1 + row[0]] for row in torch.cat([lengths, self.tokens], dim=1).tolist()]


@dataclass(frozen=True)
class PromptKV:
    """What a forward pass of the same weights already knows about P prompts; padding may be on either side."""

    keys: Sequence[Tensor]  # one a layer: (P, H_kv, L, D_head), after RoPE
    values: Sequence[Tensor]  # one a layer: (P, H_kv, L, D_value)
    mask: Tensor  # bool (P, L), True at a prompt's own tokens
    logits: Tensor  # (P, V) of each prompt's last token, as the model returns them: before any temperature

    def rows(self, prompts: Sequence[int]) -> PromptKV:
        """Of these prompts alone."""
        index = torch.tensor(prompts, device=self.mask.device)
        return PromptKV(
            keys=[keys[index] for keys in self.keys],
            values=[values[index] for values in self.values],
            mask=self.mask[index],
            logits=self.logits[index],
        )


class Sampler(Protocol):
    """An engine that draws completions from the policy."""

    takes_prompt_kv: bool  # True: `prompt_kv` saves the prefill; False: it is ignored

    @property
    def live(self) -> bool:
        """True: reads the trainer's parameters. False: holds a copy, brought up to date when it is drawn from."""

    def sample(
        self,
        prompts: list[list[int]],
        n: int,
        max_new_tokens: int,
        *,
        seed: int,
        prompt_kv: PromptKV | None = None,
        prompt_indices: Sequence[int] | None = None,
    ) -> Samples:
        """Draw `n` completions of each prompt; the same weights, arguments and seed give the same ones.

        `prompt_kv` may come from a pass of the caller's own over the same prompts and weights, in eval mode.
        `prompt_indices`: the indices of these prompts in a larger draw that several processes divide; None = all of it.
        """

    def weights_changed(self, step: int) -> None:
        """The optimizer made step `step`: what is drawn from now on comes from the new weights."""

    def release(self) -> None:
        """Give back the memory that only sampling needs; the next `sample` takes it again."""


@dataclass(frozen=True)
class Distribution:
    """What tokens are drawn from: the softmax of tempered, truncated logits.

    Raises:
        ValueError: a temperature, top_k or top_p that is no distribution.
    """

    temperature: float = 1.0
    top_k: int = 0  # 0 = no truncation
    top_p: float = 1.0  # 1 = no truncation

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(f"temperature is {self.temperature}: it must be above 0")
        if self.top_k < 0:
            raise ValueError(f"top_k is {self.top_k}: it must be 0 (no truncation) or more")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}: it must be above 0 and at most 1 (no truncation)")

    def scores(self, logits: Tensor) -> Tensor:
        """(..., V) fp32 logits of this distribution, by the warpers that `generate` applies, in its order."""
        warpers = LogitsProcessorList()
        if self.temperature != 1:
            warpers.append(TemperatureLogitsWarper(float(self.temperature)))
        if self.top_k:
            warpers.append(TopKLogitsWarper(self.top_k))
        if self.top_p < 1:
            warpers.append(TopPLogitsWarper(float(self.top_p)))
        rows = logits.float().flatten(0, -2)
        for warper in warpers:  # none of them looks at the tokens so far
            rows = warper(None, rows)
        return rows.view(logits.shape)


MODELS_OWN = Distribution()


def check_request(prompts: list[list[int]], n: int, max_new_tokens: int) -> None:
    """Raises ValueError: no prompts, an empty one, n or max_new_tokens below 1."""
    if not prompts:
        raise ValueError("there are no prompts to sample from: pass at least one")
    for p, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"prompt {p} is empty, so nothing predicts what follows it: give it at least a BOS")
    if n < 1:
        raise ValueError(f"n is {n}: ask for at least 1 completion a prompt")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}: a completion has at least 1 token")


def left_padded(rows: Sequence[Sequence[int]], pad_token_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(P, L) token ids and 0/1 attention mask."""
    length = max(map(len, rows))
    padding = [length - len(row) for row in rows]
    flat = chain.from_iterable([pad_token_id] * gap + list(row) for gap, row in zip(padding, rows, strict=True))
    input_ids = torch.tensor(list(flat)).view(len(rows), length)
    attention_mask = torch.arange(length) >= torch.tensor(padding).unsqueeze(1)
    return input_ids.to(device), attention_mask.long().to(device)


def positions(attention_mask: Tensor) -> Tensor:
    """(P, L) each token's position in its row, padding left out."""
    return (attention_mask.cumsum(1) - 1).clamp(min=0)


def base_model(model: Any) -> Any:
    """The transformers model, without peft's wrapper."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model
