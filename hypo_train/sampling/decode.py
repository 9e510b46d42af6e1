"""The fast engine: the model's own forward over the live weights, each prompt computed and kept once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from hypo_train.sampling.branches import Branches, KVShape, Rules, attention, takes_packed
from hypo_train.sampling.prefill import prefill
from hypo_train.sampling.protocol import Distribution, PromptKV, Samples, check_request, eval_mode
from hypo_train.sampling.support import attention_window, compute_dtype, kv_shape, serves, text_config

_FREE_MEMORY_SHARE = 0.6  # of what a device has free goes to KV; the rest is for activations and logits
_STEPS_BETWEEN_CHECKS = 16  # of `done`, which an accelerator must be waited for
_PREFILL_TOKENS = 16384  # a pass; large enough to keep an accelerator busy, small enough for its memory
_PREFILL_TOKENS_CPU = 1024  # large products already, and rows of one pass differ little in length


class DecodeSampler:
    """Draws by decoding all branches of all prompts together; prompts are prefilled, and their KV held, once.

    Random numbers belong to (seed, row, token), so neither the plan of batches nor an early end of other rows
    changes a draw by more than the rounding of a product of another shape.

    Args:
        model: a decoder with a language-model head, or a PeftModel around one, that `serves` finds nothing
            against. A call leaves its parameters, gradients, train flags and configs, and the global random
            state, as they were.
        eos_token_ids: tokens that end a completion; empty = only `max_new_tokens` does.
        pad_token_id: what fills a row after its EOS; may be an EOS itself.
        temperature, top_k, top_p: the sampling distribution. Under the defaults it is the model's own, the
            only one for which HyPO's KL estimate is unbiased. top_k = 0 and top_p = 1 do not truncate.
        max_kv_bytes: prompts are decoded in batches whose KV takes at most this much, at least a prompt each.
            None = all at once on the CPU, and as many as fit 0.6 of the free memory elsewhere.
        score: also give `logprobs`; they cost nothing.

    Raises:
        ValueError: a model that is not served, a temperature, top_k or top_p that is no distribution, or a
            max_kv_bytes below 1.
    """

    live = True
    takes_prompt_kv = True

    def __init__(
        self,
        model: Any,
        *,
        eos_token_ids: Sequence[int],
        pad_token_id: int,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        max_kv_bytes: int | None = None,
        score: bool = False,
    ) -> None:
        if max_kv_bytes is not None and max_kv_bytes < 1:
            raise ValueError(f"max_kv_bytes is {max_kv_bytes}: it must be at least 1, or None")
        self.model = model
        self.eos_token_ids = list(eos_token_ids)
        self.pad_token_id = pad_token_id
        self.distribution = Distribution(temperature, top_k, top_p)
        self.max_kv_bytes = max_kv_bytes
        self.score = score
        self.version = 0
        if reason := serves(model):
            raise ValueError(f"{reason}: sample with GenerateSampler")
        self._kv_shape = kv_shape(model)

    def sample(
        self,
        prompts: list[list[int]],
        n: int,
        max_new_tokens: int,
        *,
        seed: int,
        prompt_kv: PromptKV | None = None,
    ) -> Samples:
        """See `Sampler.sample`.

        Raises:
            ValueError: no prompts, an empty one, n or max_new_tokens below 1, rows that outgrow the model's
                sliding window, or a `prompt_kv` of other prompts.
        """
        check_request(prompts, n, max_new_tokens)
        self._check_window(max(map(len, prompts)) + max_new_tokens)
        if prompt_kv is not None:
            _check_prompt_kv(prompt_kv, prompts)
        device = next(self.model.parameters()).device
        shape = replace(self._kv_shape, dtype=compute_dtype(self.model))
        # On the host: the same numbers whatever the device.
        generator = torch.Generator().manual_seed(seed)
        uniforms = torch.rand(len(prompts), n, max_new_tokens, dtype=torch.float64, generator=generator)
        tokens = torch.full(uniforms.shape, self.pad_token_id, device=device)
        drawn = torch.zeros(uniforms.shape, dtype=torch.bool, device=device)
        logprobs = torch.zeros(uniforms.shape, device=device)
        ended = torch.zeros(uniforms.shape[:2], dtype=torch.bool, device=device)
        length = 0
        with torch.no_grad(), eval_mode(self.model):
            for batch in self._batches(prompts, n, max_new_tokens, shape, device):
                branches = self._planted(batch, prompts, uniforms[batch].to(device), shape, prompt_kv)
                length = max(length, self._decode(branches))
                rows = torch.tensor(batch, device=device)
                tokens[rows], drawn[rows], logprobs[rows] = branches.tokens, branches.drawn, branches.logprobs
                ended[rows] = branches.ended()
        return Samples(
            tokens=tokens[..., :length].flatten(0, 1),
            mask=drawn[..., :length].flatten(0, 1),
            logprobs=logprobs[..., :length].flatten(0, 1) if self.score else None,
            ended=ended.flatten(),
            version=self.version,
        )

    def weights_changed(self, step: int) -> None:
        """The weights are read live; only `Samples.version` follows."""
        self.version = step

    def release(self) -> None:
        """Nothing is held between calls."""

    def _check_window(self, longest: int) -> None:
        window = attention_window(self.model)
        if window is not None and longest > window:
            raise ValueError(
                f"prompt and completion may have {longest} tokens, more than the {window} that the model's sliding "
                "window shows: sample with GenerateSampler, or lower max_new_tokens"
            )

    def _batches(
        self, prompts: list[list[int]], n: int, max_new_tokens: int, shape: KVShape, device: torch.device
    ) -> Iterator[list[int]]:
        """Prompts by number, from the shortest to the longest, in batches whose KV fits."""
        limit = self.max_kv_bytes
        if limit is None and device.type != "cpu":
            limit = int(_FREE_MEMORY_SHARE * _free_bytes(device))
        batch: list[int] = []
        for p in sorted(range(len(prompts)), key=lambda p: len(prompts[p])):
            slots = len(prompts[p]) + n * max_new_tokens  # the longest so far sets the width of all
            if batch and limit is not None and (len(batch) + 1) * slots * shape.bytes_per_token() > limit:
                yield batch
                batch = []
            batch.append(p)
        yield batch

    def _planted(
        self,
        batch: list[int],
        prompts: list[list[int]],
        uniforms: Tensor,
        shape: KVShape,
        prompt_kv: PromptKV | None,
    ) -> Branches:
        """Branches on the prompts of `batch`, computed here or taken from `prompt_kv`."""
        config = text_config(self.model)
        rules = Rules(
            self.distribution,
            torch.tensor(self.eos_token_ids, dtype=torch.int64, device=uniforms.device),
            self.pad_token_id,
        )
        length = len(prompts[batch[-1]]) if prompt_kv is None else prompt_kv.mask.shape[1]
        branches = Branches(self.model, shape, rules, uniforms, length, packed=takes_packed(config))
        if prompt_kv is not None:
            branches.load(0, prompt_kv.rows(batch))
            return branches
        with attention(config, packed=False):
            for part in _prefill_parts(batch, prompts, uniforms.device):
                rows = [prompts[batch[i]] for i in part]
                branches.load(part.start, prefill(self.model, rows, pad_token_id=self.pad_token_id))
        return branches

    def _decode(self, branches: Branches) -> int:
        """Grow every branch to its end; how many tokens the longest may have."""
        on_cpu = branches.token.device.type == "cpu"
        branches.start()
        with attention(text_config(self.model), packed=takes_packed(text_config(self.model))):
            for count in range(1, branches.T):  # tokens drawn so far
                if on_cpu:
                    for row in reversed(branches.done.all(1).nonzero().flatten().tolist()):
                        branches.drop(row)
                    if not len(branches.token):
                        return count
                elif count % _STEPS_BETWEEN_CHECKS == 0 and branches.done.all():
                    return count
                branches.step(branches.L + branches.n * count)
        return branches.T


def _check_prompt_kv(kv: PromptKV, prompts: list[list[int]]) -> None:
    if kv.mask.sum(1).tolist() != [len(prompt) for prompt in prompts]:
        raise ValueError("prompt_kv is not of these prompts: its mask counts other numbers of tokens")


def _prefill_parts(batch: list[int], prompts: list[list[int]], device: torch.device) -> Iterator[range]:
    """Consecutive places in `batch` whose prompts, padded, are one pass."""
    limit = _PREFILL_TOKENS_CPU if device.type == "cpu" else _PREFILL_TOKENS
    start = 0
    for i, p in enumerate(batch):
        if i > start and (i + 1 - start) * len(prompts[p]) > limit:
            yield range(start, i)
            start = i
    yield range(start, len(batch))


def _free_bytes(device: torch.device) -> int:
    """What the driver has, and what torch holds without using it."""
    module = torch.get_device_module(device)
    free, _ = module.mem_get_info(device)
    return free + module.memory_reserved(device) - module.memory_allocated(device)
