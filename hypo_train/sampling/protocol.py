"""The base class of all samplers, their arguments and results, and shared helpers.

``tests/train/test_sampler.py`` has the tests that every sampler must pass.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper


@dataclass(frozen=True)
class Samples:
    """``n`` completions of each of P prompts, on the model's device; row r belongs to prompt r // n."""

    tokens: Tensor  # int64 (P * n, L), right-padded with pad_token_id
    mask: Tensor  # bool (P * n, L), True up to and including EOS
    logprobs: Tensor | None  # float32 (P * n, L), under the sampling distribution, 0 where masked
    ended: Tensor  # bool (P * n,), the completion has an EOS; False = cut at max_new_tokens
    version: int  # optimizer step of the weights used

    def completions(self) -> list[list[int]]:
        """Return the token ids of each row, EOS included. The device is read once."""
        lengths = self.mask.sum(1, keepdim=True)
        return [row[1 : 1 + row[0]] for row in torch.cat([lengths, self.tokens], dim=1).tolist()]


@dataclass(frozen=True)
class PromptKV:
    """Keys, values and last logits of P prompts from an earlier forward pass; padding may be on either side."""

    keys: Sequence[Tensor]  # one a layer: (P, H_kv, L, D_head), after RoPE
    values: Sequence[Tensor]  # one a layer: (P, H_kv, L, D_value)
    mask: Tensor  # bool (P, L), False = padding
    logits: Tensor  # (P, V) at each prompt's last token, as the model returns them: before any temperature

    def rows(self, prompts: Sequence[int]) -> PromptKV:
        """Return the part that belongs to the prompts with these indices."""
        index = torch.tensor(prompts, device=self.mask.device)
        return PromptKV(
            keys=[keys[index] for keys in self.keys],
            values=[values[index] for values in self.values],
            mask=self.mask[index],
            logits=self.logits[index],
        )


@dataclass(frozen=True)
class SampleRequest:
    """The arguments of one call of :meth:`Sampler.sample`.

    Raises:
        ValueError: no prompts, an empty prompt, or n or max_new_tokens below 1.
    """

    prompts: list[list[int]]
    n: int
    max_new_tokens: int
    seed: int
    prompt_kv: PromptKV | None = None
    prompt_indices: Sequence[int] | None = None

    def __post_init__(self) -> None:
        if not self.prompts:
            raise ValueError("there are no prompts to sample from: pass at least one")
        for p, prompt in enumerate(self.prompts):
            if not prompt:
                raise ValueError(f"prompt {p} is empty, so no token predicts its completion: give it at least a BOS")
        if self.n < 1:
            raise ValueError(f"n is {self.n}: ask for at least 1 completion a prompt")
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {self.max_new_tokens}: a completion has at least 1 token")


class Sampler(ABC):
    """Draws completions from the policy. A subclass has to define :meth:`draw`."""

    version = 0
    """The optimizer step of the weights, for ``Samples.version``."""
    takes_prompt_kv = False
    """``prompt_kv`` saves the forward pass over the prompts; False: it is ignored."""

    @property
    def live(self) -> bool:
        """Return True if the sampler reads the trainer's parameters, False if it has a copy that follows them."""
        return True

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
        """Draw ``n`` completions of each prompt. Equal weights, arguments and seed give equal completions.

        Args:
            prompts: token ids of each prompt.
            prompt_kv: from a forward pass of the same prompts and weights, in eval mode.
            prompt_indices: the indices of these prompts in a larger draw that several processes divide; None = the
                draw has these prompts only.

        Raises:
            ValueError: no prompts, an empty prompt, n or max_new_tokens below 1, or what :meth:`draw` refuses.
        """
        return self.draw(SampleRequest(prompts, n, max_new_tokens, seed, prompt_kv, prompt_indices))

    @abstractmethod
    def draw(self, request: SampleRequest) -> Samples:
        """Draw the completions that ``request`` asks for."""

    def skip(self) -> None:
        """Take part in a draw of other processes without prompts of its own, if the sampler exchanges anything."""
        return

    def weights_changed(self, step: int) -> None:
        """Record that optimizer step ``step`` was made: the next samples come from the new weights."""
        self.version = step

    def release(self) -> None:
        """Free the memory that only sampling needs; the next call of ``sample`` allocates it again."""
        return


@dataclass(frozen=True)
class Distribution:
    """The distribution of a token: the softmax of tempered, truncated logits.

    Raises:
        ValueError: a temperature, top_k or top_p out of range.
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
        """Return the fp32 logits (..., V) of this distribution, by the warpers of ``generate`` in its order."""
        warpers = LogitsProcessorList()
        if self.temperature != 1:
            warpers.append(TemperatureLogitsWarper(float(self.temperature)))
        if self.top_k:
            warpers.append(TopKLogitsWarper(self.top_k))
        if self.top_p < 1:
            warpers.append(TopPLogitsWarper(float(self.top_p)))
        rows = logits.float().flatten(0, -2)
        for warper in warpers:  # none of them reads the tokens, its first argument
            rows = warper(None, rows)
        return rows.view(logits.shape)


MODELS_OWN = Distribution()


def left_padded(rows: Sequence[Sequence[int]], pad_token_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return token ids (P, L) and their 0/1 attention mask (P, L)."""
    length = max(map(len, rows))
    padding = [length - len(row) for row in rows]
    flat = chain.from_iterable([pad_token_id] * gap + list(row) for gap, row in zip(padding, rows, strict=True))
    input_ids = torch.tensor(list(flat)).view(len(rows), length)
    attention_mask = torch.arange(length) >= torch.tensor(padding).unsqueeze(1)
    return input_ids.to(device), attention_mask.long().to(device)


def positions(attention_mask: Tensor) -> Tensor:
    """Return each token's position (P, L) in its row, not counting padding."""
    return (attention_mask.cumsum(1) - 1).clamp(min=0)


def base_model(model: Any) -> Any:
    """Return the transformers model, without PEFT's wrapper."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def forward_arguments(model: Any) -> set[str]:
    """Return the names of the arguments that the model's forward declares."""
    return set(inspect.signature(base_model(model).forward).parameters)


def cache_argument(model: Any) -> str:
    """Return the name of the KV cache in the arguments and outputs of the model's forward.

    It is "cache" since transformers 5.24, and "past_key_values" before, and in models that have their own code.
    """
    return "cache" if "cache" in forward_arguments(model) else "past_key_values"
