"""The state of decoding: n growing completions (branches) of each prompt, which share the prompt's keys and values.

Each prompt has one row. Its KV slots are

    prompt tokens (L, padding included) | token 0 of samples 0 .. n-1 | token 1 of samples 0 .. n-1 | ...

A step feeds the n newest tokens of every prompt as n queries of its row. A mask lets sample j see the prompt's tokens
and its own earlier slots, so plain attention serves samples that share their prompt's KV. In layers with a sliding
window it hides those that lie too far back in the sample's own text.

All state that a step changes is a tensor on the device, updated in place. A step therefore never waits for the device,
and can be captured in a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, Cache
from transformers.cache_utils import StaticLayer

from hypo_train.sampling.decode.windows import Windows
from hypo_train.sampling.protocol import Distribution, PromptKV, base_model, cache_argument
from hypo_train.trees.attention import NAME
from hypo_train.trees.scores import Scores, stepwise_attention

_PACKED = "hypo_packed_sdpa"


@dataclass(frozen=True)
class KVShape:
    """The sizes of a token's keys and values in every layer."""

    layers: tuple[tuple[int, int, int], ...]  # (H_kv, D_head of the keys, of the values) of each layer
    dtype: torch.dtype
    query_groups: int  # query heads that share a key head

    def bytes_per_token(self) -> int:
        return sum(heads * (key + value) for heads, key, value in self.layers) * self.dtype.itemsize


@dataclass(frozen=True)
class Rules:
    """The rules for drawing tokens and for ending a completion."""

    distribution: Distribution
    eos_token_ids: Tensor  # int64 (E,)
    pad_token_id: int


def num_slots(prompt: int, new: int) -> int:
    """Return the KV slots for a prompt and its new tokens, rounded up because masks need aligned rows on CUDA."""
    return -(-(prompt + new) // 16) * 16


class Branches:
    """P prompts with n branches each, of up to T tokens. `load` the prompts, `start`, then `step` T - 1 times.

    Args:
        uniforms: float64 (P, n, T) in [0, 1): the random number of each token, drawn in advance, so that batches and
            the order of rows do not change the samples.
    """

    def __init__(
        self, model: Any, shape: KVShape, rules: Rules, uniforms: Tensor, max_prompt_length: int, *, packed: bool
    ) -> None:
        P, n, T = uniforms.shape
        device = uniforms.device
        self.model, self.rules, self.n, self.T, self.L = model, rules, n, T, max_prompt_length
        self.uniforms = uniforms
        self.windows = Windows.of(base_model(model).config)
        self.slots = num_slots(self.L, n * T)
        # Zeros, not empty: an attention weight of 0 times an unwritten value must be 0.
        self.layers = [
            _BranchLayer(
                torch.zeros(P, heads, self.slots, key, dtype=shape.dtype, device=device),
                torch.zeros(P, heads, self.slots, value, dtype=shape.dtype, device=device),
            )
            for heads, key, value in shape.layers
        ]
        self.cache = Cache(layers=list(self.layers))
        self.cache_argument = cache_argument(model)
        # An additive mask: a bool mask would be converted in every layer. Packed attention needs a row of it for
        # each query head of a group.
        groups = shape.query_groups if packed else 1
        self.hidden = torch.finfo(shape.dtype).min
        self.mask = torch.full((P, 1, groups * n, self.slots), self.hidden, dtype=shape.dtype, device=device)
        # The columns of the mask for the slots of one step: each sample sees its own slot only.
        step_mask = torch.full((n, n), self.hidden, dtype=shape.dtype, device=device).fill_diagonal_(0.0)
        self.step_mask = step_mask.repeat(groups, 1).expand(P, 1, -1, -1).contiguous()
        self.lengths = torch.zeros(P, 1, dtype=torch.int64, device=device)
        self.logits: Tensor | None = None  # (P, V) of the prompts' last tokens
        # The newest tokens, and their index in the completion.
        self.token = torch.zeros(P, n, dtype=torch.int64, device=device)
        self.done = torch.zeros(P, n, dtype=torch.bool, device=device)
        self.newest = torch.zeros(1, dtype=torch.int64, device=device)
        self.branch = torch.arange(n, device=device)
        # The index of each slot's token: in a completion from 0 on, in a prompt (known once it is loaded) up to -1.
        index = torch.arange(self.slots, device=device) - self.L
        self.index = (index // n).repeat(P, 1)
        # The results. Row r of the state above belongs to prompt `prompt[r]` of the results.
        self.prompt = torch.arange(P, device=device).unsqueeze(1)
        self.tokens = torch.full((P, n, T), rules.pad_token_id, dtype=torch.int64, device=device)
        self.drawn = torch.zeros(P, n, T, dtype=torch.bool, device=device)
        self.logprobs = torch.zeros(P, n, T, dtype=torch.float32, device=device)

    def reset(self, uniforms: Tensor) -> None:
        """Restore the state before `load`, in place; the mask hides the old keys and values."""
        self.uniforms.copy_(uniforms)
        self.mask.fill_(self.hidden)
        self.tokens.fill_(self.rules.pad_token_id)
        for state in (self.newest, self.done, self.drawn, self.logprobs):
            state.zero_()

    def nbytes(self) -> int:
        """Return the size of the KV buffers."""
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in self.layers)

    def load(self, first: int, kv: PromptKV) -> None:
        """Store the prompts `first`, `first` + 1, ... in their rows, at the right end of the prompt's slots."""
        rows = slice(first, first + len(kv.mask))
        slots = slice(self.L - kv.mask.shape[1], self.L)
        is_token = kv.mask[:, None, :, None]  # padding can hold NaN, and 0 times NaN is NaN
        for layer, keys, values in zip(self.layers, kv.keys, kv.values, strict=True):
            layer.keys[rows, :, slots] = keys.where(is_token, 0)
            layer.values[rows, :, slots] = values.where(is_token, 0)
        self.mask[rows, :, :, slots].masked_fill_(kv.mask[:, None, None], 0.0)
        self.lengths[rows] = kv.mask.sum(1, keepdim=True)
        self.index[rows, slots] = kv.mask.cumsum(1) - 1 - self.lengths[rows]
        if self.logits is None:
            self.logits = kv.logits.new_empty(len(self.lengths), kv.logits.shape[1])
        self.logits[rows] = kv.logits

    def start(self) -> None:
        """Draw every branch's first token from its prompt's logits."""
        assert self.logits is not None
        self._draw(self.logits.unsqueeze(1), self.uniforms[..., 0].unsqueeze(1))
        self.logits = None

    def step(self, width: int) -> None:
        """Draw one more token for every branch, with attention over `width` slots, the new ones included."""
        logits = self.forward(width)
        self.newest += 1
        self._draw(logits, self.uniforms[self.prompt, self.branch, self.newest].unsqueeze(-1))

    def forward(self, width: int) -> Tensor:
        """Return the logits (P, n, V) after each branch's newest token, and store its keys and values."""
        slots = self.L + self.newest * self.n + self.branch
        self.mask.index_copy_(3, slots, self.step_mask)
        for layer in self.layers:
            layer.slots, layer.width = slots, width
        return self.model(
            input_ids=self.token,
            position_ids=(self.lengths + self.newest).expand(-1, self.n),
            attention_mask=self.windows.masks(self.mask[..., :width], self.newest - self.index[:, :width]),
            use_cache=True,
            **{self.cache_argument: self.cache},
        ).logits

    def _draw(self, logits: Tensor, uniforms: Tensor) -> None:
        """Draw the next n tokens of each prompt from `logits` (P, 1 or n, V) with `uniforms` (P, 1 or n, draws)."""
        probabilities = self.rules.distribution.scores(logits).softmax(-1)
        token = draw(probabilities, uniforms)
        logprob = probabilities.gather(-1, token).log()
        token, logprob = token.view_as(self.token), logprob.view_as(self.token)
        live = ~self.done
        token = token.where(live, self.rules.pad_token_id)
        where = (self.prompt, self.branch, self.newest)
        self.tokens.index_put_(where, token)
        self.drawn.index_put_(where, live)
        self.logprobs.index_put_(where, logprob.where(live, 0.0))
        # Ended rows emit padding, which may be an EOS.
        self.done |= (token.unsqueeze(-1) == self.rules.eos_token_ids).any(-1)
        self.token.copy_(token)

    def ended(self) -> Tensor:
        """Return bool (P, n): the branches that have drawn an EOS."""
        is_eos = (self.tokens.unsqueeze(-1) == self.rules.eos_token_ids).any(-1)
        return (is_eos & self.drawn).any(-1)

    def drop(self, row: int) -> None:
        """Remove a row from decoding; the last row takes its place."""
        last = len(self.token) - 1
        state = ("mask", "step_mask", "lengths", "index", "token", "done", "prompt")
        if row != last:
            for layer in self.layers:
                layer.keys[row].copy_(layer.keys[last])
                layer.values[row].copy_(layer.values[last])
            for name in state:
                getattr(self, name)[row] = getattr(self, name)[last]
        for layer in self.layers:
            layer.keys, layer.values = layer.keys[:last], layer.values[:last]
        for name in state:
            setattr(self, name, getattr(self, name)[:last])


def draw(probabilities: Tensor, uniforms: Tensor) -> Tensor:
    """Return tokens (..., m), by the inverse distribution function of `probabilities` (..., V) fp32 at `uniforms`.

    `uniforms` (..., m) are fp64 in [0, 1). The sums are fp64, because in fp32 the tail of a large vocabulary would be
    lost in rounding. A token of probability 0 is never drawn. If probabilities are NaN, some valid token is drawn: the
    loss then shows the NaN, while an index beyond the vocabulary would end the process on CUDA.
    """
    cumulative = probabilities.cumsum(-1, dtype=torch.float64)
    below_one = uniforms.clamp(max=1 - 2**-52)  # so that the product stays below the last sum
    drawn = torch.searchsorted(cumulative, below_one * cumulative[..., -1:], right=True)
    return drawn.clamp_(max=probabilities.shape[-1] - 1)


class _BranchLayer(StaticLayer):
    """The key and value buffers of a layer, (P, H_kv, slots, D_head) each."""

    keys: Tensor
    values: Tensor
    slots: Tensor  # int64 (n,), the slots that a step writes
    width: int  # the number of slots that it attends to

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__(max_cache_len=keys.shape[2])
        self.keys, self.values, self.is_initialized = keys, values, True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.keys.index_copy_(2, self.slots, key_states.to(self.keys.dtype))
        self.values.index_copy_(2, self.slots, value_states.to(self.values.dtype))
        return self.keys[:, :, : self.width], self.values[:, :, : self.width]


def _packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Return attention of (P, H, n, D_head) queries; heads that share a key head become rows of one product.

    transformers' SDPA would copy the KV buffers for each query head of a group, at every step.
    """
    batch, heads, length, _ = query.shape
    kv_heads = key.shape[1]
    packed = query.reshape(batch, kv_heads, heads // kv_heads * length, -1)
    sink = None if s_aux is None else s_aux.view(kv_heads, -1).repeat_interleave(length, dim=1)
    scores = Scores(scaling, softcap, sink)
    if scores.is_plain:
        out = scaled_dot_product_attention(packed, key, value, attn_mask=attention_mask, scale=scaling)
    else:
        out = stepwise_attention(packed, key, value, attention_mask, scores)
    return out.reshape(batch, heads, length, -1).transpose(1, 2).contiguous(), None


AttentionInterface.register(_PACKED, _packed_attention)


def takes_packed(config: Any) -> bool:
    """Return whether decoding may use packed attention; a model with eager attention keeps it."""
    return config._attn_implementation != "eager"


@contextmanager
def attention(config: Any, *, packed: bool) -> Iterator[None]:
    """Use packed attention for steps, or the attention of trees for prefill, unless the model has eager attention."""
    chosen = config._attn_implementation
    if chosen != "eager":
        config._attn_implementation = _PACKED if packed else NAME
    try:
        yield
    finally:
        config._attn_implementation = chosen
