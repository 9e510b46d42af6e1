"""Split the embedding and the LM head by the vocabulary: each rank stores its rows of both and computes with them.

A tensor of the vocabulary is split as ``torch.chunk`` splits it, ⌈V/n⌉ entries a rank, and FSDP does not gather it.
Each rank has different rows of data, so the ranks take turns: all of them work on one rank's rows, the owner's, each
with its shard of the vocabulary, and their results are summed. In an owner's turn each rank sends or receives

    tokens looked up    T · D numbers forward (summed on the owner), T · D backward if the embedding is trained
    tokens predicted    T · D forward, and 2 · T · D in fp32 for the gradient of hidden states (summed on every rank)

for the owner's T tokens, in the compute dtype unless it says fp32, and a few numbers a token. Gathering a head instead
takes V · D numbers forward, as many backward, and V · D in fp32 for its gradient, however few the tokens. So shards
send less if a micro-batch has fewer tokens, over all ranks, than the vocabulary.
This communication does not overlap with other work. There are n products, each with 1/n of the columns. Memory
does not grow with the number of ranks: only one owner's rows are held at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard
from torch.overrides import TorchFunctionMode

from hypo_kernels import VocabShard
from hypo_train.distributed.exchange import RowExchange
from hypo_train.distributed.fsdp import Sharding, broadcast_from_first, full_tensor


def ranks_without_a_shard(vocab_size: int, world_size: int) -> int:
    """Return how many ranks have no entries if the vocabulary is split into shards of ⌈V/n⌉ entries."""
    return world_size - -(-vocab_size // -(-vocab_size // world_size))


class VocabShards:
    """This rank's shards of the parameters of a model's embedding and head, in place of those parameters.

    Args:
        embedding: full on rank 0.
        head: the LM head, full on rank 0, then other modules whose products are added to the logits.
    """

    def __init__(self, embedding: nn.Embedding, head: Sequence[nn.Module], sharding: Sharding) -> None:
        self.exchange = RowExchange()
        self._dtype = sharding.dtype
        modules = [embedding, *head]
        places = [(module, name, p) for module in modules for name, p in module.named_parameters(recurse=False)]
        shards = {p: _shard_of(p, sharding) for _, _, p in places}  # a tied parameter is split once
        self._places = [(module, name, shards[p]) for module, name, p in places]
        self._put({})
        assert isinstance(head[0].weight, Tensor)
        self.shard = VocabShard.even(head[0].weight.shape[0])
        embedding.forward = _sharded_lookup(embedding.forward, self.exchange, sharding.dtype)  # type: ignore[method-assign]

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Return the distinct shards, in the same order on all ranks."""
        return list(dict.fromkeys(shard for _, _, shard in self._places))

    @contextmanager
    def replaced(self, others: Mapping[nn.Parameter, Tensor]) -> Iterator[None]:
        """Run a block with ``others`` in place of shards, given as a mapping from the shard to its replacement."""
        self._put({shard: nn.Parameter(other, requires_grad=False) for shard, other in others.items()})
        try:
            yield
        finally:
            self._put({})

    @torch.no_grad()
    def gathered(self) -> Any:
        """Return a context manager that runs a block with full weights, without gradients, on every rank."""
        return self.replaced({s: full_tensor(s.detach().to(self._dtype or s.dtype)) for s in self.parameters})

    def _put(self, others: Mapping[nn.Parameter, nn.Parameter]) -> None:
        for module, name, shard in self._places:
            module._parameters[name] = others.get(shard, shard)


def _shard_of(parameter: nn.Parameter, sharding: Sharding) -> nn.Parameter:
    """Return this rank's shard of rank 0's parameter, in memory of its own."""
    shard = VocabShard.even(parameter.shape[0])
    full = broadcast_from_first(parameter, sharding.device).detach()
    rows = full[shard.start : shard.start + shard.size].clone()
    distributed = DTensor.from_local(
        rows, sharding.mesh, [Shard(0)], run_check=False, shape=parameter.shape, stride=parameter.stride()
    )
    return nn.Parameter(distributed, requires_grad=parameter.requires_grad)


def _sharded_lookup(
    forward: Callable[..., Tensor], exchange: RowExchange, dtype: torch.dtype | None
) -> Callable[..., Tensor]:
    """Return an embedding's ``forward`` with its lookup done in shards whenever the weight is sharded."""

    class ShardedLookup(TorchFunctionMode):
        def __torch_function__(
            self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
        ) -> Any:
            if func is not F.embedding or not isinstance(args[1], DTensor):
                return func(*args, **(kwargs or {}))
            ids, weight = args[:2]
            shard = VocabShard.even(weight.shape[0])
            padding = (kwargs or {}).get("padding_idx", args[2] if len(args) > 2 else None)
            rows: Tensor = _Lookup.apply(weight.to_local(), ids.flatten(), shard.start, padding, dtype, exchange)
            return rows.view(*ids.shape, weight.shape[1])

    def sharded(*args: Any, **kwargs: Any) -> Tensor:
        with ShardedLookup():
            return forward(*args, **kwargs)

    return sharded


class _Lookup(torch.autograd.Function):
    """The embeddings (T, D) of this rank's tokens, each looked up by the rank that holds it."""

    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor,  # (V/n, D), this rank's shard
        ids: Tensor,  # (T,)
        start: int,  # of the shard
        padding: int | None,  # its row gets no gradient
        dtype: torch.dtype | None,
        exchange: RowExchange,
    ) -> Tensor:
        all_ids = []
        for owner, count in enumerate(exchange.gather(len(ids))):
            owner_ids = exchange.broadcast(owner, ids, (count,), ids.dtype)
            is_ours, index = _locate(owner_ids, start, len(weight))
            rows = exchange.reduce(owner, weight[index].to(dtype or weight.dtype).mul_(is_ours))
            if owner == exchange.rank:
                result = rows
            all_ids.append(owner_ids)
        ctx.save_for_backward(*all_ids)
        ctx.start, ctx.padding, ctx.exchange = start, padding, exchange
        ctx.like = weight.new_empty(()).expand(weight.shape)
        return result

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        exchange: RowExchange = ctx.exchange
        total = torch.zeros_like(ctx.like, memory_format=torch.contiguous_format)
        for owner, owner_ids in enumerate(ctx.saved_tensors):
            rows = exchange.broadcast(owner, gradient, (len(owner_ids), gradient.shape[1]), gradient.dtype)
            is_ours, index = _locate(owner_ids, ctx.start, len(total))
            if ctx.padding is not None:
                is_ours = is_ours & (owner_ids != ctx.padding).unsqueeze(1)
            # The embedding's own backward: on CUDA too, it adds the gradients of equal tokens in a fixed order.
            total += torch.ops.aten.embedding_dense_backward(
                rows.to(total.dtype) * is_ours, index, len(total), -1, False
            )
        return total / exchange.world_size, None, None, None, None, None


def _locate(ids: Tensor, start: int, size: int) -> tuple[Tensor, Tensor]:
    """Return which tokens are in a shard (T, 1), and their index in it (T,), 0 for those outside."""
    index = ids - start
    is_inside = (index >= 0) & (index < size)
    return is_inside.unsqueeze(1), index.where(is_inside, 0)
