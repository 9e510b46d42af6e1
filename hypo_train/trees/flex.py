"""FlexAttention over a packed row of trees: on CUDA, one call a layer that skips what the mask leaves out.

The mask is built on the host as lists of blocks, from the lengths alone; no N x N mask exists. A run is a prompt or a
branch. A query sees its tree's prompt and its own run, up to itself:

    first <= key < prompt_stop   or   run_first <= key,   and   key <= last

so that the kernel reads four numbers for a query and none for a key. In a layer with a sliding window, ``first`` and
``run_first`` are the first key within the window, instead of the first of the prompt and of the run.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from itertools import chain
from typing import Any, NamedTuple

import torch
import torch._dynamo
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from hypo_train.trees.layout import Layout
from hypo_train.trees.scores import Scores

BLOCK = 128  # FlexAttention's default: every tile of its kernels divides it
# One model needs a handful of graphs (with and without gradients, policy and reference), whatever the lengths are.
# Beyond this limit the call raises, because uncompiled FlexAttention would build the scores of the whole row.
MAX_GRAPHS = 64


def flex_supports(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Return whether FlexAttention has a kernel: on CUDA, for 16-bit or fp32, heads of at least 16 dimensions."""
    return (
        query.device.type == "cuda"
        and all(x.dtype in (torch.float32, torch.bfloat16, torch.float16) for x in (query, key, value))
        and min(query.shape[-1], value.shape[-1]) >= 16
    )


def flex_tree_attention(query: Tensor, key: Tensor, value: Tensor, mask: BlockMask, scores: Scores) -> Tensor:
    """Return attention (1, N, H, D) of queries (1, H, N, D) over keys and values (1, H_kv, M, D).

    A sink takes its share of the softmax afterwards: a softmax with the sink is ``sigmoid(lse - sink)`` times the one
    without it, whose log-sum-exp is ``lse``.
    """
    sink = scores.sink
    device = query.device.type
    if torch.is_autocast_enabled(device):  # as it does for SDPA: RoPE may return fp32
        query, key, value = (x.to(torch.get_autocast_dtype(device)) for x in (query, key, value))
    # Scale and softcap are constants of the model; the kernel needs their values when it is compiled.
    with torch._dynamo.config.patch(specialize_float=True, recompile_limit=MAX_GRAPHS):
        output = _compiled()(
            query,
            key,
            value,
            score_mod=None if scores.softcap is None else _softcapped(scores.softcap),
            block_mask=mask,
            scale=scores.scale,
            enable_gqa=query.shape[1] != key.shape[1],
            # Without this, few queries would select the kernel for decoding, in a graph of its own.
            kernel_options={"BACKEND": "TRITON"},
            return_aux=None if sink is None else AuxRequest(lse=True),
        )
    if sink is not None:
        output, aux = output
        share = torch.sigmoid(aux.lse - sink.to(aux.lse.dtype).unsqueeze(1)).unsqueeze(-1)  # (1, H, N, 1)
        output = (output * share).to(output.dtype)
    return output.transpose(1, 2)


@cache
def _compiled() -> Callable[..., Any]:
    """Return FlexAttention, compiled once a process for every length."""
    return torch.compile(flex_attention, dynamic=True, fullgraph=True)


@cache
def _softcapped(softcap: float) -> Callable[..., Tensor]:
    def score_mod(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return softcap * (score / softcap).tanh()

    return score_mod


def block_mask(
    layout: Layout, has_prompts: bool, has_branches: bool, window: int | None, device: torch.device
) -> BlockMask:
    """Return the mask for the queries of the prompts, the branches or both, in layers with this sliding window.

    The keys are the whole row; without branches, they are the prompts. The mask is built on the host and copied without
    waiting for the device.
    """
    runs = _runs(layout, has_prompts, has_branches)
    lengths = runs.stop - runs.start
    num_queries = int(lengths.sum())
    num_keys = layout.num_tokens if has_branches else layout.num_prompt_tokens
    first_row = 0 if has_prompts else layout.num_prompt_tokens
    pairs = _pairs_seen(runs, first_row, num_queries, num_keys, window)
    full = pairs == BLOCK * BLOCK

    last_key = torch.arange(first_row, first_row + num_queries)
    prompt_start, prompt_end, run_start, distance = (
        x.repeat_interleave(lengths) for x in (runs.prompt_start, runs.prompt_stop, runs.start, runs.distance)
    )
    if window is not None:
        # A key's position is its index in the row, for a branch less the distance to its prompt.
        prompt_start = prompt_start.maximum(last_key - distance - window + 1).minimum(prompt_end)
        run_start = run_start.maximum(last_key - window + 1)
    first, prompt_stop, run_first, last = (
        _copy_to(value_per_query.int(), device) for value_per_query in (prompt_start, prompt_end, run_start, last_key)
    )

    def mask_mod(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        in_run_or_prompt = (key < prompt_stop[query]) | (key >= run_first[query])
        return (key >= first[query]) & (key <= last[query]) & in_run_or_prompt

    count, columns = _block_lists((pairs > 0) & ~full, device)
    full_count, full_columns = _block_lists(full, device)
    return BlockMask.from_kv_blocks(
        count,
        columns,
        full_count,
        full_columns,
        BLOCK_SIZE=BLOCK,
        mask_mod=mask_mod,
        seq_lengths=(num_queries, num_keys),
    )


class _Runs(NamedTuple):
    """int64 (S,) bounds, as indices into the row, of the prompts and branches whose tokens are the queries."""

    start: Tensor
    stop: Tensor
    prompt_start: Tensor  # the bounds of the prompt of the run's tree
    prompt_stop: Tensor

    @property
    def distance(self) -> Tensor:
        """Return the tokens between a branch and the end of its prompt; 0 for a prompt."""
        return (self.start - self.prompt_stop).clamp_min(0)


def _runs(layout: Layout, has_prompts: bool, has_branches: bool) -> _Runs:
    lengths = torch.tensor(layout.prompts)
    prompt_stop = lengths.cumsum(0)
    prompt_start = prompt_stop - lengths
    lengths = torch.tensor(list(chain.from_iterable(layout.branches)), dtype=torch.long)
    stop = layout.num_prompt_tokens + lengths.cumsum(0)
    tree = torch.arange(len(layout.prompts)).repeat_interleave(torch.tensor(list(map(len, layout.branches))))
    prompts = _Runs(prompt_start, prompt_stop, prompt_start, prompt_stop)
    branches = _Runs(stop - lengths, stop, prompt_start[tree], prompt_stop[tree])
    chosen = [prompts] * has_prompts + [branches] * has_branches
    return _Runs(*map(torch.cat, zip(*chosen, strict=True)))


def _pairs_seen(runs: _Runs, first_row: int, num_queries: int, num_keys: int, window: int | None) -> Tensor:
    """Return int64 (R, C): for each block of 128 x 128, the number of (query, key) pairs that the mask keeps.

    Every run sees two ranges of keys: its prompt (empty if the run is the prompt) and itself. Only blocks that touch
    such a rectangle of queries and keys are computed.
    """
    query_start, query_stop = runs.start.repeat(2), runs.stop.repeat(2)
    key_start = torch.cat([runs.prompt_start, runs.start])
    key_stop = torch.cat([runs.prompt_stop.minimum(runs.start), runs.stop])
    lag = None
    if window is not None:  # query q sees the keys up to q, but not those up to q - lag
        lag = torch.cat([runs.distance, torch.zeros_like(runs.start)]) + window
        key_start = key_start.maximum(query_start - lag + 1)

    first_i, stop_i = (query_start - first_row) // BLOCK, _num_blocks(query_stop - first_row)
    first_j, stop_j = key_start // BLOCK, _num_blocks(key_stop)
    high, wide = stop_i - first_i, stop_j - first_j
    s = torch.arange(len(high)).repeat_interleave(high * wide)  # index of the rectangle
    within = torch.arange(len(s)) - ((high * wide).cumsum(0) - high * wide)[s]
    i, j = first_i[s] + within // wide[s], first_j[s] + within % wide[s]

    a, b = query_start[s].maximum(first_row + i * BLOCK), query_stop[s].minimum(first_row + (i + 1) * BLOCK)
    c, d = key_start[s].maximum(j * BLOCK), key_stop[s].minimum((j + 1) * BLOCK)
    seen = _pairs_up_to_query(a, b, c, d)
    if lag is not None:
        seen = seen - _pairs_up_to_query(a - lag[s], b - lag[s], c, d)

    # At least two by two, because the compiler specializes on a size of one.
    shape = max(2, int(_num_blocks(num_queries))), max(2, int(_num_blocks(num_keys)))
    return torch.zeros(shape, dtype=torch.long).index_put_((i, j), seen, accumulate=True)


def _num_blocks(tokens: Any) -> Any:
    return (tokens + BLOCK - 1) // BLOCK


def _pairs_up_to_query(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
    """Return the number of pairs of a query from a to b with a key from c to d that is not behind the query."""
    # Query q sees max(0, q + 1 - c) - max(0, q + 1 - d) keys.
    return _triangle(b - c) - _triangle(a - c) - _triangle(b - d) + _triangle(a - d)


def _triangle(n: Tensor) -> Tensor:
    """Return 1 + 2 + ... + n, or 0 for n < 0."""
    n = n.clamp_min(0)
    return n * (n + 1) // 2


def _block_lists(blocks: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return int32 (1, 1, R) number of True columns a row, and (1, 1, R, C) their indices, padded with 0."""
    count = blocks.sum(1, dtype=torch.int32)
    i, j = blocks.nonzero(as_tuple=True)
    within = torch.arange(len(i)) - (count.cumsum(0) - count)[i]
    columns = torch.zeros(blocks.shape, dtype=torch.int32)
    columns[i, within] = j.int()
    return _copy_to(count[None, None], device), _copy_to(columns[None, None], device)


def _copy_to(x: Tensor, device: torch.device) -> Tensor:
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)
