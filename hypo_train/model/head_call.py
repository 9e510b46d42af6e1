"""What is asked of a head, as something that processes with parts of one can do for each other."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hypo_kernels import LoRA
from hypo_train.distributed.exchange import Exchange
from hypo_train.model.policy import Head

T = TypeVar("T")


class _Turn(NamedTuple):
    """One process's rows, for all of them to work on."""

    is_own: bool
    hidden: Tensor  # (T, D)
    arguments: dict[str, Any]
    share: float


@dataclass(frozen=True)
class HeadCall(Generic[T]):
    """A function of the hidden states (T, D) that predict a tree's targets, and of the head above them.

    ``compute(hidden, head, **own)`` is called; with gradients, its result has a field ``loss`` (), the only one that is
    differentiable.

    Where ``head`` is a part of the vocabulary (``head.exchange``), each process calls ``compute`` on every process's
    hidden states and ``own``, one after the other, and keeps what its own have given. Gradients are taken in the turn,
    so that no others' hidden states outlast it: they are right for a ``backward`` of ``share`` times the loss, on each
    process, and of the mean of that over the processes, as FSDP takes it.
    """

    compute: Callable[..., T]
    own: Mapping[str, Any]  # what goes with this process's rows: floating-point tensors, and what can be pickled
    share: float = 1.0
    around: Callable[[], AbstractContextManager[Any]] = nullcontext  # entered for the call, as by a timer

    def __call__(self, hidden: Tensor, head: Any) -> T:
        with self.around():
            exchange = getattr(head, "exchange", None)  # a reward model's score has none
            if exchange is None:
                return self.compute(hidden, head, **self.own)
            return self._on_every_rank(hidden, head, exchange)

    def _on_every_rank(self, hidden: Tensor, head: Head, exchange: Exchange) -> T:
        if torch.is_grad_enabled():
            return self._with_gradients(hidden, head, exchange)
        for turn in self._turns(hidden, exchange):
            result = self.compute(turn.hidden, head, **turn.arguments)
            if turn.is_own:
                found = result
        return found

    def _turns(self, hidden: Tensor, exchange: Exchange) -> Iterator[_Turn]:
        """By rank."""
        tensors = {name: x for name, x in self.own.items() if isinstance(x, Tensor) and x.is_floating_point()}
        others = {name: x for name, x in self.own.items() if name not in tensors}
        shapes = {name: (x.shape, x.dtype) for name, x in tensors.items()}
        for owner, header in enumerate(exchange.gather((hidden.shape, shapes, others, self.share))):
            shape, their_shapes, their_others, share = header
            sent = {name: exchange.of(owner, tensors[name], *like) for name, like in their_shapes.items()}
            theirs = exchange.of(owner, hidden.detach(), shape, hidden.dtype)
            yield _Turn(owner == exchange.rank, theirs, their_others | sent, share)

    def _with_gradients(self, hidden: Tensor, head: Head, exchange: Exchange) -> T:
        inputs = _Leaves.of(hidden, head)
        parts = inputs.detached()
        for turn in self._turns(hidden, exchange):
            of_rows = inputs.detached()
            leaves = parts._replace(hidden=turn.hidden.requires_grad_(hidden.requires_grad), lora_a=of_rows.lora_a)
            result: Any = self.compute(leaves.hidden, leaves.put_into(head), **turn.arguments)
            with torch.autocast(hidden.device.type, enabled=False):  # as backward passes are
                (turn.share * result.loss).backward()
            if turn.is_own:  # what is whole everywhere has its gradient from its process's own rows, as all layers have
                found, own = result, leaves
        for part in (parts.weight, parts.bias, parts.lora_b):
            if part is not None and part.grad is not None:
                part.grad /= exchange.count
        gradients = [None if leaf is None else leaf.grad for leaf in own]
        return found._replace(loss=_Finished.apply(found.loss.detach(), self.share, gradients, *inputs))


class _Leaves(NamedTuple):
    """What has a gradient."""

    hidden: Tensor
    lora_a: Tensor | None
    # Of this process's part of the vocabulary:
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


class _Finished(torch.autograd.Function):
    """A loss whose gradients, times ``share``, are there already: backward hands them out."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, share: float, gradients: list[Tensor | None], *inputs: Tensor | None) -> Tensor:
        ctx.share, ctx.gradients = share, gradients
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None
        factor = upstream / ctx.share
        return (None, None, None, *(None if x is None else x.mul_(factor.to(x.dtype)) for x in gradients))
