"""Embedding and LM head in parts of the vocabulary: each process keeps and multiplies its own rows of both.

A tensor of the vocabulary is split as ``torch.chunk`` splits it, ⌈V/n⌉ entries a process, and is no part of what FSDP
puts together. The processes have rows of data of their own, so they take turns: all of them work on one's rows, each
with its part of the vocabulary, and what their parts give is summed. In an owner's turn each process sends or gets

    tokens looked up    T · D numbers forward (summed at the owner), T · D backward where the embedding is trained
    tokens predicted    T · D forward, and 2 · T · D in fp32 for the gradient of hidden states (summed everywhere)

for its T tokens, in the dtype that is computed in where nothing else is said, and a few numbers a token. To put a head
together takes V · D numbers forward, as many backward, and again in fp32 for its gradient, whatever there is to do. So
parts take less to send where a micro-batch's tokens, of all processes together, are fewer than the vocabulary's.
Nothing of this overlaps with other work: a turn's rows are sent, and then worked on. A product's rows are an owner's,
and there are as many products as processes, each with an n-th of the columns. Memory does not grow with the processes:
one owner's rows are there at a time.
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
from hypo_train.distributed.exchange import Exchange
from hypo_train.distributed.fsdp import Spread, of_first, whole


def processes_without_a_part(vocab_size: int, count: int) -> int:
    """How many of ``count`` processes, of a split into parts of ⌈V/n⌉."""
    return count - -(-vocab_size // -(-vocab_size // count))


class VocabParts:
    """The parameters of a model's embedding and head, as this process's parts of them.

    Args:
        embedding: with all of it, on the first process, as all modules here are; their parameters are replaced.
        head: the LM head, first, and what else multiplies to logits.
    """

    def __init__(self, embedding: nn.Embedding, head: Sequence[nn.Module], spread: Spread) -> None:
        self.exchange = Exchange()
        self._dtype = spread.dtype
        modules = [embedding, *head]
        places = [(module, name, p) for module in modules for name, p in module.named_parameters(recurse=False)]
        parts = {p: _part(p, spread) for _, _, p in places}  # a tied one once
        self._places = [(module, name, parts[p]) for module, name, p in places]
        for module, name, part in self._places:
            module._parameters[name] = part
        self.shard = VocabShard.even(_vocab_size(head[0]))
        embedding.forward = _looking_up(embedding.forward, self.exchange, spread.dtype)  # type: ignore[method-assign]

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Each once, in an order that all processes have."""
        return list(dict.fromkeys(part for _, _, part in self._places))

    @contextmanager
    def replaced(self, others: Mapping[nn.Parameter, Tensor]) -> Iterator[None]:
        """The model with ``others`` in the place of these of its parts."""
        with self._as({part: nn.Parameter(other, requires_grad=False) for part, other in others.items()}):
            yield

    @contextmanager
    def together(self) -> Iterator[None]:
        """The model with whole weights, without gradients, on every process."""
        with self._as({part: nn.Parameter(self._whole(part), requires_grad=False) for part in self.parameters}):
            yield

    @torch.no_grad()
    def _whole(self, part: nn.Parameter) -> Tensor:
        return whole(part.detach().to(self._dtype or part.dtype))

    @contextmanager
    def _as(self, others: Mapping[nn.Parameter, nn.Parameter]) -> Iterator[None]:
        for module, name, part in self._places:
            module._parameters[name] = others.get(part, part)
        try:
            yield
        finally:
            for module, name, part in self._places:
                module._parameters[name] = part


def _vocab_size(head: nn.Module) -> int:
    assert isinstance(head.weight, Tensor)
    return head.weight.shape[0]


def _part(parameter: nn.Parameter, spread: Spread) -> nn.Parameter:
    """This process's part of a parameter of the first one's, in memory of its own."""
    shard = VocabShard.even(parameter.shape[0])
    whole_one = of_first(parameter, spread.device).detach()
    own = whole_one[shard.start : shard.start + shard.size].clone()
    part = DTensor.from_local(
        own, spread.mesh, [Shard(0)], run_check=False, shape=parameter.shape, stride=parameter.stride()
    )
    return nn.Parameter(part, requires_grad=parameter.requires_grad)


def _looking_up(forward: Callable[..., Tensor], exchange: Exchange, dtype: torch.dtype | None) -> Callable[..., Tensor]:
    """An embedding's ``forward``, whatever else it does, that looks tokens up in parts while its weight is in parts."""

    class InParts(TorchFunctionMode):
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

    def in_parts(*args: Any, **kwargs: Any) -> Tensor:
        with InParts():
            return forward(*args, **kwargs)

    return in_parts


class _Lookup(torch.autograd.Function):
    """Rows (T, D) of this process's tokens, of which every process has some."""

    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor,  # this process's part
        ids: Tensor,  # (T,)
        start: int,
        padding: int | None,  # whose row gets no gradient
        dtype: torch.dtype | None,
        exchange: Exchange,
    ) -> Tensor:
        everyones, own = [], ids
        for owner, count in enumerate(exchange.gather(len(ids))):
            theirs = exchange.of(owner, ids, (count,), ids.dtype)
            here, place = _here(theirs, start, len(weight))
            rows = weight[place].to(dtype or weight.dtype).mul_(here)
            rows = exchange.add_up_at(owner, rows)
            own = rows if owner == exchange.rank else own
            everyones.append(theirs)
        ctx.save_for_backward(*everyones)
        ctx.start, ctx.padding, ctx.exchange = start, padding, exchange
        ctx.like = weight.new_empty(()).expand(weight.shape)
        return own

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        exchange: Exchange = ctx.exchange
        found = torch.zeros_like(ctx.like, memory_format=torch.contiguous_format)
        for owner, theirs in enumerate(ctx.saved_tensors):
            rows = exchange.of(owner, gradient, (len(theirs), gradient.shape[1]), gradient.dtype)
            here, place = _here(theirs, ctx.start, len(found))
            if ctx.padding is not None:
                here = here & (theirs != ctx.padding).unsqueeze(1)
            # As the embedding's own backward has it: on CUDA too, equal tokens' gradients are added in a fixed order.
            found += torch.ops.aten.embedding_dense_backward(rows.to(found.dtype) * here, place, len(found), -1, False)
        return found / exchange.count, None, None, None, None, None


def _here(ids: Tensor, start: int, size: int) -> tuple[Tensor, Tensor]:
    """Which tokens (T, 1) are of this part of the vocabulary, and where in it (T,); others are at its first."""
    place = ids - start
    here = (place >= 0) & (place < size)
    return here.unsqueeze(1), place.where(here, 0)
