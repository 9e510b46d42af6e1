"""The generate sampler: transformers' ``generate`` on the live model."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import GenerationConfig

from hypo_train.model.eval_mode import eval_mode
from hypo_train.model.positions import check_sample_length
from hypo_train.model.windows import shortened_windows
from hypo_train.sampling.comparison import SHORT_WINDOW, compute_dtype, difference, precision_of, prompts_of
from hypo_train.sampling.protocol import (
    MODELS_OWN,
    Distribution,
    Sampler,
    SampleRequest,
    Samples,
    base_model,
    forward_arguments,
    left_padded,
    positions,
)

_NEW_TOKENS = 4  # generated to compare with plain rows
_SCORE_BYTES = 64 * 2**20  # of fp32 logits at a time while scoring


class GenerateSampler(Sampler):
    """Samples with ``model.generate`` and ignores the generation config of the checkpoint.

    Rows are sampled in batches, padded on the left. A few tokens are generated first: if a row has other logits in a
    batch than alone, each row is sampled alone.

    Args:
        model: a decoder with an LM head, or a PeftModel around one. A call does not change its parameters, gradients,
            train flags and generation config, nor the global random state.
        eos_token_ids: tokens that end a completion; empty = only `max_new_tokens` does.
        pad_token_id: fills a row after its EOS; it may be an EOS itself.
        distribution: the sampling distribution; HyPO's KL estimate is unbiased for the model's own only.
        max_batch_tokens: the most tokens of a batch (rows x (longest prompt + max_new_tokens)), which bounds the KV
            cache; a batch has at least one row. None = one batch. Random numbers are drawn per batch, so another value
            gives other samples.
        score: also return `logprobs`, by one more forward pass over each batch.

    Raises:
        ValueError: a max_batch_tokens below 1; a model whose ``generate`` does not draw from its own distribution; or,
            in a draw, rows that pass the limit of the model's RoPE.
    """

    def __init__(
        self,
        model: Any,
        *,
        eos_token_ids: Sequence[int],
        pad_token_id: int,
        distribution: Distribution = MODELS_OWN,
        max_batch_tokens: int | None = None,
        score: bool = False,
    ) -> None:
        if max_batch_tokens is not None and max_batch_tokens < 1:
            raise ValueError(f"max_batch_tokens is {max_batch_tokens}: it must be at least 1, or None")
        self.model = model
        self.eos_token_ids = list(eos_token_ids)
        self.pad_token_id = pad_token_id
        self.distribution = distribution
        self.max_batch_tokens = max_batch_tokens
        self.score = score
        self._takes_batches = _takes_batches(model)

    def draw(self, request: SampleRequest) -> Samples:
        prompts, max_new_tokens, seed = request.prompts, request.max_new_tokens, request.seed
        check_sample_length(base_model(self.model), max(map(len, prompts)) + max_new_tokens)
        rows = [prompt for prompt in prompts for _ in range(request.n)]
        if request.prompt_indices is not None and request.prompt_indices[0] > 0:  # another process has prompt 0
            seed = _batch_seed(seed, -request.prompt_indices[0])
        size = self._rows_per_batch(rows, max_new_tokens)
        with torch.no_grad(), _sampling_mode(self.model):
            batches = [
                self._sample_batch(rows[start : start + size], max_new_tokens, _batch_seed(seed, start // size))
                for start in range(0, len(rows), size)
            ]
        tokens = _stacked([batch.tokens for batch in batches], self.pad_token_id)
        mask = _stacked([batch.mask for batch in batches], False)
        scores = [batch.logprobs for batch in batches if batch.logprobs is not None]
        return Samples(
            tokens=tokens,
            mask=mask,
            logprobs=_stacked(scores, 0.0) if self.score else None,
            ended=(self._is_eos(tokens) & mask).any(1),
            version=self.version,
        )

    def _rows_per_batch(self, rows: list[list[int]], max_new_tokens: int) -> int:
        longest = max(map(len, rows)) + max_new_tokens
        if not self._takes_batches or _counts_padding(self.model, longest):
            return 1
        return len(rows) if self.max_batch_tokens is None else max(1, self.max_batch_tokens // longest)

    def _sample_batch(self, rows: list[list[int]], max_new_tokens: int, seed: int) -> _Batch:
        """Draw one completion of each row."""
        device = next(self.model.parameters()).device
        input_ids, attention_mask = left_padded(rows, self.pad_token_id, device)
        with _seeded(device, seed):
            output = self.model.generate(
                input_ids=input_ids,
                attention_mask=attention_mask,
                generation_config=self._generation_config(max_new_tokens),
            )
        tokens = output[:, input_ids.shape[1] :]
        # A row ends with its first EOS; all later tokens are padding. A pad token before it was drawn by the model.
        is_eos = self._is_eos(tokens)
        mask = is_eos.cumsum(1) - is_eos.long() == 0
        logprobs = self._logprobs(input_ids, attention_mask, tokens, mask) if self.score else None
        return _Batch(tokens, mask, logprobs)

    def _generation_config(self, max_new_tokens: int) -> GenerationConfig:
        return GenerationConfig(
            max_new_tokens=max_new_tokens,
            do_sample=True,
            temperature=float(self.distribution.temperature),
            top_k=self.distribution.top_k,  # the default of transformers is 50
            top_p=float(self.distribution.top_p),
            eos_token_id=self.eos_token_ids or None,
            pad_token_id=self.pad_token_id,
            use_cache=True,
        )

    def _is_eos(self, tokens: Tensor) -> Tensor:
        return torch.isin(tokens, torch.tensor(self.eos_token_ids, device=tokens.device, dtype=tokens.dtype))

    def _logprobs(self, prompt_ids: Tensor, prompt_mask: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        """Return log-probs (B, L), teacher-forced and a few rows at a time to bound the logits (rows, L, V)."""
        length = tokens.shape[1]
        input_ids = torch.cat([prompt_ids, tokens], dim=1)
        attention_mask = torch.cat([prompt_mask, mask.long()], dim=1)
        vocab_size = self.model.get_output_embeddings().weight.shape[0]
        size = max(1, _SCORE_BYTES // (4 * (length + 1) * vocab_size))
        parts = []
        for ids, seen, drawn in zip(input_ids.split(size), attention_mask.split(size), tokens.split(size), strict=True):
            logits = _completion_logits(self.model, ids, seen, length)
            scores = self._warped(logits.float().flatten(0, 1), drawn.reshape(-1, 1))
            parts.append(scores.log_softmax(-1).gather(1, drawn.reshape(-1, 1)).view_as(drawn))
        return torch.cat(parts).masked_fill(~mask, 0.0)

    def _warped(self, logits: Tensor, drawn: Tensor) -> Tensor:
        """Return the logits (T, V) of the sampling distribution, without truncating a drawn token."""
        warped = self.distribution.scores(logits)
        # A drawn token survived truncation; rounding in this second forward pass must not remove it.
        return warped.scatter(1, drawn, logits.gather(1, drawn) / self.distribution.temperature)


@torch.no_grad()
def _takes_batches(model: Any) -> bool:
    """Return whether rows have the same logits in a padded batch as alone.

    Raises:
        ValueError: they are not those of the model's plain forward pass for a row alone either.
    """
    prompts = prompts_of(model)
    with _sampling_mode(model), precision_of(model), shortened_windows(base_model(model).config, SHORT_WINDOW):
        if _generate_difference(model, prompts) is None:
            return True
        for prompt in prompts:
            if reason := _generate_difference(model, [prompt]):
                raise ValueError(
                    f"the generate of {type(base_model(model)).__name__} gives other logits than a plain forward pass: "
                    f"{reason}; no sampler draws from this model"
                )
    return False


def _generate_difference(model: Any, prompts: list[list[int]]) -> str | None:
    """Return how the logits of ``generate``, or of scoring its tokens, differ from those of plain rows; None if not."""
    device = next(model.parameters()).device
    input_ids, attention_mask = left_padded(prompts, 0, device)
    config = GenerationConfig(
        max_new_tokens=_NEW_TOKENS, do_sample=False, output_logits=True, return_dict_in_generate=True, pad_token_id=0
    )
    output = model.generate(input_ids=input_ids, attention_mask=attention_mask, generation_config=config)
    seen = torch.cat([attention_mask, attention_mask.new_ones(len(prompts), _NEW_TOKENS)], dim=1)
    scored = _completion_logits(model, output.sequences, seen, _NEW_TOKENS)
    plain = []
    for prompt, tokens in zip(prompts, output.sequences[:, input_ids.shape[1] :].tolist(), strict=True):
        row = torch.tensor([prompt + tokens], device=device)
        plain.append(_completion_logits(model, row, torch.ones_like(row), _NEW_TOKENS))
    expected, dtype = torch.cat(plain).float(), compute_dtype(model)
    generated = torch.stack(output.logits, dim=1).float()
    return difference(generated, expected, dtype) or difference(scored.float(), expected, dtype)


def _counts_padding(model: Any, longest: int) -> bool:
    """Return whether padding changes rows of ``longest`` tokens: Llama 4 scales queries by their place in a batch."""
    config = base_model(model).config.get_text_config()
    return bool(getattr(config, "attn_temperature_tuning", False)) and longest >= config.floor_scale


class _Batch(NamedTuple):
    tokens: Tensor  # (B, L)
    mask: Tensor  # (B, L)
    logprobs: Tensor | None  # (B, L)


def _stacked(parts: Sequence[Tensor], value: float) -> Tensor:
    """Return parts (B_i, L_i) as one (sum of B_i, longest L), right-padded with ``value``."""
    length = max(part.shape[1] for part in parts)
    return torch.cat([pad(part, (0, length - part.shape[1]), value=value) for part in parts])


def _completion_logits(model: Any, input_ids: Tensor, attention_mask: Tensor, length: int) -> Tensor:
    """Return the logits (B, length, V) that predict the last ``length`` tokens of left-padded rows."""
    inputs = {
        "position_ids": positions(attention_mask),
        "logits_to_keep": length + 1,
        "use_cache": False,
    }
    inputs = {name: value for name, value in inputs.items() if name in forward_arguments(model)}
    logits = model(input_ids=input_ids, attention_mask=attention_mask, **inputs).logits
    return logits[:, -length - 1 : -1]


@contextmanager
def _sampling_mode(model: nn.Module) -> Iterator[None]:
    """Set eval mode and an empty generation config, and restore both afterwards.

    Without it, ``generate`` would take what is None in its argument from the model's generation config: a repetition
    penalty, banned words, forced tokens.
    """
    configs = {m: m.generation_config for m in model.modules() if "generation_config" in vars(m)}
    try:
        for module in configs:
            module.generation_config = GenerationConfig()  # type: ignore[assignment]
        with eval_mode(model):
            yield
    finally:
        for module, config in configs.items():
            module.generation_config = config


@contextmanager
def _seeded(device: torch.device, seed: int) -> Iterator[None]:
    """Seed the host and ``device``, and restore their global random states afterwards."""
    devices = [] if device.type == "cpu" else [device]
    with torch.random.fork_rng(devices, device_type=device.type):
        torch.random.default_generator.manual_seed(seed)
        # torch.manual_seed would also seed all other devices, which are not restored.
        for accelerator in devices:
            module = torch.get_device_module(accelerator)
            with module.device(accelerator):
                module.manual_seed(seed)
        yield


def _batch_seed(seed: int, batch: int) -> int:
    """Return a seed mixed from both: with a sum, batch 1 of seed 0 would equal batch 0 of seed 1."""
    return random.Random(f"{seed}/{batch}").getrandbits(63)
