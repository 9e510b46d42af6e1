"""Functions of the LM head that also work where each rank has only a shard of the vocabulary."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hypo_kernels import LoRA
from hypo_train.distributed.exchange import RowExchange
from hypo_train.model.policy import Head

T = TypeVar("T")


class _Turn(NamedTuple):
    """One rank's rows, on which all ranks work."""

    is_ours: bool
    hidden: Tensor  # (T, D)
    arguments: dict[str, Any]
    loss_weight: float


@dataclass(frozen=True)
class HeadCall(Generic[T]):
    """Call ``compute(hidden, head, **arguments)`` on the hidden states (T, D) that predict a tree's targets.

    With gradients, the result has a field ``loss`` (), and only that is differentiable.

    If ``head`` is a shard of the vocabulary (it has an ``exchange``), every rank calls ``compute`` on the rows of each
    rank in turn, and keeps the result of its own. A turn also computes its gradients, so that other ranks' hidden
    states are freed after it. They are right for a ``backward`` of ``loss_weight`` times the loss on each rank, with
    gradients averaged over the ranks, as FSDP does.
    """

    compute: Callable[..., T]
    arguments: Mapping[str, Any]  # of this rank's rows: floating-point tensors, and what can be pickled
    loss_weight: float = 1.0
    around: Callable[[], AbstractContextManager[Any]] = nullcontext  # entered for the call, for example a timer

    def __call__(self, hidden: Tensor, head: Any) -> T:
        with self.around():
            exchange = getattr(head, "exchange", None)  # a reward model's score has none
            if exchange is None:
                return self.compute(hidden, head, **self.arguments)
            return self._on_every_rank(hidden, head, exchange)

    def _on_every_rank(self, hidden: Tensor, head: Head, exchange: RowExchange) -> T:
        if torch.is_grad_enabled():
            return self._with_gradients(hidden, head, exchange)
        for turn in self._turns(hidden, exchange):
            result = self.compute(turn.hidden, head, **turn.arguments)
            if turn.is_ours:
                our_result = result
        return our_result

    def _turns(self, hidden: Tensor, exchange: RowExchange) -> Iterator[_Turn]:
        """Yield each rank's rows, by rank."""
        tensors = {n: x for n, x in self.arguments.items() if isinstance(x, Tensor) and x.is_floating_point()}
        others = {name: x for name, x in self.arguments.items() if name not in tensors}
        shapes = {name: (x.shape, x.dtype) for name, x in tensors.items()}
        for owner, header in enumerate(exchange.gather((hidden.shape, shapes, others, self.loss_weight))):
            hidden_shape, owner_shapes, arguments, loss_weight = header
            received = {n: exchange.broadcast(owner, tensors[n], *like) for n, like in owner_shapes.items()}
            owner_hidden = exchange.broadcast(owner, hidden.detach(), hidden_shape, hidden.dtype)
            yield _Turn(owner == exchange.rank, owner_hidden, arguments | received, loss_weight)

    def _with_gradients(self, hidden: Tensor, head: Head, exchange: RowExchange) -> T:
        inputs = _Leaves.of(hidden, head)
        shards = inputs.detached()
        for turn in self._turns(hidden, exchange):
            turn_hidden = turn.hidden.requires_grad_(hidden.requires_grad)
            leaves = shards._replace(hidden=turn_hidden, lora_a=inputs.detached().lora_a)
            result: Any = self.compute(leaves.hidden, leaves.put_into(head), **turn.arguments)
            with torch.autocast(hidden.device.type, enabled=False):  # as in every backward pass
                (turn.loss_weight * result.loss).backward()
            if turn.is_ours:  # LoRA's A is full on every rank: like any layer, it gets its own rank's gradient
                our_result, our_leaves = result, leaves
        for shard in (shards.weight, shards.bias, shards.lora_b):
            if shard is not None and shard.grad is not None:
                shard.grad /= exchange.world_size
        gradients = [None if leaf is None else leaf.grad for leaf in our_leaves]
        loss = _ReadyGradients.apply(our_result.loss.detach(), self.loss_weight, gradients, *inputs)
        return our_result._replace(loss=loss)


class _Leaves(NamedTuple):
    """The tensors that a gradient is computed for."""

    hidden: Tensor
    lora_a: Tensor | None
    # This rank's shards of the vocabulary:
    weight: Tensor
    bias: Tensor | None
    lora_b: Tensor | None

    @classmethod
    def of(cls, hidden: Tensor, head: Head) -> _Leaves:
        lora = head.lora
        return cls(hidden, None if lora is None else lora.A, head.weight, head.bias, None if lora is None else lora.B)

    def detached(self) -> _Leaves:
        leaves: list[Any] = [None if x is None else x.detach().requires_grad_(x.requires_grad) for x in self]
        return _Leaves(*leaves)

    def put_into(self, head: Head) -> Head:
        lora = None
        if head.lora is not None:
            assert self.lora_a is not None
            assert self.lora_b is not None
            lora = LoRA(self.lora_a, self.lora_b, head.lora.scale)
        return replace(head, weight=self.weight, bias=self.bias, lora=lora)


class _ReadyGradients(torch.autograd.Function):
    """A loss whose gradients, times ``loss_weight``, are computed already: backward returns them."""

    @staticmethod
    def forward(
        ctx: Any, loss: Tensor, loss_weight: float, gradients: list[Tensor | None], *inputs: Tensor | None
    ) -> Tensor:
        ctx.loss_weight, ctx.gradients = loss_weight, gradients
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None
        factor = upstream / ctx.loss_weight
        return (None, None, None, *(None if x is None else x.mul_(factor.to(x.dtype)) for x in gradients))
