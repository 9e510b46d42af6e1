"""Check that the decode sampler supports a model: by its structure, then by decoding a few tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hypo_train.model.eval_mode import eval_mode
from hypo_train.model.positions import rope_limit
from hypo_train.model.windows import shortened_windows
from hypo_train.sampling.comparison import SHORT_WINDOW, compute_dtype, difference, precision_of, prompts_of
from hypo_train.sampling.decode.branches import Branches, KVShape, Rules, attention, takes_packed
from hypo_train.sampling.decode.prefill import prefill
from hypo_train.sampling.decode.windows import Windows
from hypo_train.sampling.protocol import Distribution, base_model, cache_argument, forward_arguments

_STEPS = 3


def serves(model: Any) -> str | None:
    """Return the reason why `DecodeSampler` cannot draw from `model`, or None if it can.

    A few tokens are decoded, with sliding windows that are shorter than their rows, and their logits must equal those
    of a plain forward pass over the same row, to half the digits of the model's dtype.
    """
    return _unsupported_structure(model) or _wrong_logits(model)


def text_config(model: Any) -> Any:
    return base_model(model).config.get_text_config()


@torch.no_grad()
def kv_shape(model: Any) -> KVShape:
    """Return the sizes of the KV cache, read from the cache of one token because configs name sizes differently."""
    config = text_config(model)
    with eval_mode(model), attention(config, packed=False), precision_of(model):
        kv = prefill(model, [[0]], pad_token_id=0)
    return KVShape(
        layers=tuple((k.shape[1], k.shape[3], v.shape[3]) for k, v in zip(kv.keys, kv.values, strict=True)),
        dtype=compute_dtype(model),
        query_groups=config.num_attention_heads // kv.keys[0].shape[1],
    )


def _unsupported_structure(model: Any) -> str | None:
    config, name = text_config(model), type(base_model(model)).__name__
    if getattr(base_model(model).config, "is_encoder_decoder", False):
        return f"{name} is an encoder-decoder"
    try:
        Windows.of(config)
    except ValueError as error:
        return f"{name} cannot decode branches of a prompt: {error}"
    if (rope := rope_limit(config)) is not None and rope.is_chosen_on_host:
        return f"{name} has RoPE whose frequencies wait for the longest row of a call (rope_type {rope.rope_type!r})"
    missing = {"position_ids", cache_argument(model), "attention_mask"} - forward_arguments(model)
    if missing:
        return f"the forward of {name} takes no {', '.join(sorted(missing))}"
    return None


def _wrong_logits(model: Any) -> str | None:
    name = type(base_model(model)).__name__
    try:
        with (
            torch.no_grad(),
            eval_mode(model),
            precision_of(model),
            shortened_windows(text_config(model), SHORT_WINDOW),
        ):
            dtype = compute_dtype(model)
            decoded, expected = _decoded_and_plain_logits(model)
    except torch.OutOfMemoryError:
        raise
    except Exception as failure:  # models raise different exceptions
        words = str(failure).strip().splitlines() or [type(failure).__name__]
        return f"{name} cannot decode branches of a prompt: {words[0]}"
    if (reason := difference(decoded, expected, dtype)) is not None:
        return f"{name} decodes branches of a prompt to other logits than a plain forward pass: {reason}"
    return None


def _decoded_and_plain_logits(model: Any) -> tuple[Tensor, Tensor]:
    """Return two (tokens, V) fp32: the logits of decoding, and those of plain forward passes over the same rows."""
    n, device = 2, next(model.parameters()).device
    prompts = prompts_of(model)
    uniforms = torch.rand(2, n, _STEPS + 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    rules = Rules(Distribution(), torch.empty(0, dtype=torch.int64, device=device), pad_token_id=0)
    packed, length = takes_packed(text_config(model)), max(map(len, prompts))
    branches = Branches(model, kv_shape(model), rules, uniforms.to(device), length, packed=packed)
    with attention(text_config(model), packed=False):
        kv = prefill(model, prompts, pad_token_id=0)
    branches.load(0, kv)
    branches.start()
    decoded = [kv.logits.unsqueeze(1).expand(-1, n, -1)]
    with attention(text_config(model), packed=packed):
        for step in range(1, _STEPS + 1):
            width = length + n * step
            decoded.append(branches.forward(width))
            branches.step(width)
    stacked = torch.stack(decoded, dim=2).flatten(0, 1)  # (2 * n, _STEPS + 1, V)
    plain = []
    with attention(text_config(model), packed=False):
        for row, tokens in enumerate(branches.tokens.flatten(0, 1).tolist()):
            ids = torch.tensor([prompts[row // n] + tokens[:-1]], device=device)
            plain.append(model(input_ids=ids, use_cache=False).logits[0, -_STEPS - 1 :])
    return stacked.float().flatten(0, 1), torch.cat(plain).float()
