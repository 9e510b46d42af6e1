"""FlexAttention over a packed row of trees: on CUDA, one call a layer that skips what the mask leaves out.

The mask is built on the host from the lengths alone, as lists of blocks and never as N x N. A query sees two
stretches of its tree, its prompt's tokens and its own run's, up to itself (a run: a prompt or a branch):

    first <= key < prompt_stop   or   run_start <= key,   and   key <= last

so that the kernel reads four numbers a query and none a key.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch._dynamo
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

if TYPE_CHECKING:
    from hypo_train.trees.attention import Layout

BLOCK = 128  # FlexAttention's own choice: every tile of its kernels divides it
# One model needs a handful of graphs (with and without gradients, policy and reference), whatever its lengths.
# Beyond the limit the call raises: uncompiled FlexAttention would build the scores of the whole row.
MAX_GRAPHS = 64


def serves(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether FlexAttention has a kernel for them: on CUDA, 16-bit or fp32, heads of at least 16 dimensions."""
    return (
        query.device.type == "cuda"
        and all(x.dtype in (torch.float32, torch.bfloat16, torch.float16) for x in (query, key, value))
        and min(query.shape[-1], value.shape[-1]) >= 16
    )


def attend(
    query: Tensor, key: Tensor, value: Tensor, mask: BlockMask, *, scale: float | None, softcap: float | None
) -> Tensor:
    """(1, H, N, D) queries over (1, H_kv, M, D) keys and values -> (1, N, H, D)."""
    device = query.device.type
    if torch.is_autocast_enabled(device):  # as it casts for SDPA: RoPE may have left queries and keys in fp32
        query, key, value = (x.to(torch.get_autocast_dtype(device)) for x in (query, key, value))
    # Scale and softcap are the model's constants; of a dynamic one the kernel would not know the value.
    with torch._dynamo.config.patch(specialize_float=True, recompile_limit=MAX_GRAPHS):
        out = _compiled()(
            query,
            key,
            value,
            score_mod=None if softcap is None else _softcapped(softcap),
            block_mask=mask,
            scale=scale,
            enable_gqa=query.shape[1] != key.shape[1],
            # Not the kernel for decoding, which it would choose for few queries, in a graph of its own.
            kernel_options={"BACKEND": "TRITON"},
        )
    return out.transpose(1, 2)


@cache
def _compiled() -> Callable[..., Any]:
    """Compiled once a process, for every length."""
    return torch.compile(flex_attention, dynamic=True, fullgraph=True)


@cache
def _softcapped(softcap: float) -> Callable[..., Tensor]:
    def score_mod(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return softcap * (score / softcap).tanh()

    return score_mod


def block_mask(layout: Layout, *, has_prompts: bool, has_branches: bool, device: torch.device) -> BlockMask:
    """Which keys the queries of a part of the row see; without branches the keys too are the prompts' alone.

    Built on the host and copied without waiting for the device.
    """
    runs = _runs(layout, has_prompts, has_branches)
    lengths = runs.stop - runs.start
    num_queries = int(lengths.sum())
    num_keys = layout.num_tokens if has_branches else layout.num_prompt_tokens
    first_row = 0 if has_prompts else layout.num_prompt_tokens
    pairs = _pairs_seen(runs, first_row, num_queries, num_keys)
    full = pairs == BLOCK * BLOCK

    first, prompt_stop, run_start, last = (
        _copied(of_query.int(), device)
        for of_query in (
            runs.prompt_start.repeat_interleave(lengths),
            runs.prompt_stop.repeat_interleave(lengths),
            runs.start.repeat_interleave(lengths),
            torch.arange(first_row, first_row + num_queries),
        )
    )

    def mask_mod(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        in_run_or_prompt = (key < prompt_stop[query]) | (key >= run_start[query])
        return (key >= first[query]) & (key <= last[query]) & in_run_or_prompt

    count, columns = _listed((pairs > 0) & ~full, device)
    full_count, full_columns = _listed(full, device)
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
    """The prompts and branches whose tokens are the queries, in the row's order: int64 (S,) indices into the row."""

    start: Tensor
    stop: Tensor
    prompt_start: Tensor  # of the run's tree; a prompt's own
    prompt_stop: Tensor


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


def _pairs_seen(runs: _Runs, first_row: int, num_queries: int, num_keys: int) -> Tensor:
    """int64 (R, C): how many of a block's 128 x 128 pairs of a query and a key are seen; 0 outside the row.

    Every run meets two stretches of keys, its prompt (none, where it is the prompt) and itself. Only the blocks
    that such a rectangle touches are looked at.
    """
    query_start, query_stop = runs.start.repeat(2), runs.stop.repeat(2)
    key_start = torch.cat([runs.prompt_start, runs.start])
    key_stop = torch.cat([runs.prompt_stop.minimum(runs.start), runs.stop])

    first_i, stop_i = (query_start - first_row) // BLOCK, _num_blocks(query_stop - first_row)
    first_j, stop_j = key_start // BLOCK, _num_blocks(key_stop)
    high, wide = stop_i - first_i, stop_j - first_j
    s = torch.arange(len(high)).repeat_interleave(high * wide)  # which rectangle
    within = torch.arange(len(s)) - ((high * wide).cumsum(0) - high * wide)[s]
    i, j = first_i[s] + within // wide[s], first_j[s] + within % wide[s]

    # Rows a to b of the queries and c to d of the keys: query q sees those up to itself, (q + 1 - c) of them if any,
    # less the (q + 1 - d) that lie beyond the stretch.
    a, b = query_start[s].maximum(first_row + i * BLOCK), query_stop[s].minimum(first_row + (i + 1) * BLOCK)
    c, d = key_start[s].maximum(j * BLOCK), key_stop[s].minimum((j + 1) * BLOCK)
    seen = _triangle(b - c) - _triangle(a - c) - _triangle(b - d) + _triangle(a - d)

    # At least two by two: the compiler would take a size of one for a case of its own.
    shape = max(2, int(_num_blocks(num_queries))), max(2, int(_num_blocks(num_keys)))
    return torch.zeros(shape, dtype=torch.long).index_put_((i, j), seen, accumulate=True)


def _num_blocks(tokens: Any) -> Any:
    return (tokens + BLOCK - 1) // BLOCK


def _triangle(n: Tensor) -> Tensor:
    """1 + 2 + ... + n, 0 for n < 0."""
    n = n.clamp_min(0)
    return n * (n + 1) // 2


def _listed(blocks: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """(R, C) bool -> int32 (1, 1, R) how many a row has, (1, 1, R, C) which columns, padded with 0."""
    count = blocks.sum(1, dtype=torch.int32)
    i, j = blocks.nonzero(as_tuple=True)
    within = torch.arange(len(i)) - (count.cumsum(0) - count)[i]
    columns = torch.zeros(blocks.shape, dtype=torch.int32)
    columns[i, within] = j.int()
    return _copied(count[None, None], device), _copied(columns[None, None], device)


def _copied(x: Tensor, device: torch.device) -> Tensor:
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)
