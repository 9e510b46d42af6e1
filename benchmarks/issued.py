"""Count FLOP and bytes of every operation that torch issues, from its operands, to check `cost.py`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
GEMMS = {aten.mm, aten.addmm}
NOT_COUNTED = {aten.bmm, aten.baddbmm, aten.matmul, aten.linear}
# These allocate without writing.
FREE = {
    aten.empty,
    aten.empty_like,
    aten.new_empty,
    aten.empty_strided,
    aten.new_empty_strided,
    aten._local_scalar_dense,
    torch.ops.prim.device,
}
# These overwrite their first argument or use only its shape; they do not read it.
OVERWRITE = {aten.copy_, aten.zero_, aten.fill_, aten.zeros_like, aten.ones_like, aten.new_zeros, aten.new_ones}
# These touch only the selected elements of their first argument.
PICK = {aten.index, aten.gather, aten.index_select}
PLACE = {aten.index_copy_, aten.index_add_, aten.scatter_add_, aten.scatter_, aten.index_put_}


@dataclass(frozen=True)
class Issued:
    """One operation; ``shapes`` are the shapes of its tensors, results last."""

    name: str
    flop: int
    read: int  # bytes
    written: int  # bytes
    shapes: tuple[torch.Size, ...]

    @property
    def bytes(self) -> int:
        return self.read + self.written

    @property
    def is_gemm(self) -> bool:
        return self.flop > 0

    def touches(self, columns: int) -> bool:
        """Return whether a tensor of the operation has that many columns."""
        return any(len(shape) == 2 and shape[1] == columns for shape in self.shapes)


class OperationMeter(TorchDispatchMode):
    """Record every operation inside the ``with`` block that moves data; views and allocations do not."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[Issued] = []

    @property
    def gemms(self) -> list[Issued]:
        return [operation for operation in self.operations if operation.is_gemm]

    @property
    def rest(self) -> list[Issued]:
        return [operation for operation in self.operations if not operation.is_gemm]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        packet = func.overloadpacket
        if packet in NOT_COUNTED:
            raise AssertionError(f"{func} is not counted: teach the meter its FLOP")
        if packet not in FREE:
            operation = _issued(func, packet, args, kwargs, result)
            if operation.bytes:
                self.operations.append(operation)
        return result


def _issued(func: Any, packet: Any, args: Any, kwargs: Any, result: Any) -> Issued:
    inputs, targets = _operands(func, args, kwargs)
    aliased = [returned.alias_info is not None for returned in func._schema.returns]
    results = [] if any(aliased) else [x for x in tree_leaves(result) if isinstance(x, Tensor)]
    if any(aliased) and not targets:  # a view
        return Issued(str(packet), 0, 0, 0, ())
    if packet in PICK:
        read = sum(map(_bytes, inputs[1:])) + sum(map(_bytes, results))
        written = sum(map(_bytes, results))
    elif packet in PLACE:
        read = written = _bytes(inputs[-1])  # the source, and an equal part of the target
        read += sum(map(_bytes, inputs[1:-1])) + (written if packet in (aten.scatter_add_, aten.index_add_) else 0)
    else:
        kept = inputs[1:] if packet in OVERWRITE else inputs
        read, written = sum(map(_bytes, kept)), sum(map(_bytes, [*targets, *results]))
    return Issued(
        str(packet), _flop(packet, args), read, written, tuple(x.shape for x in (*inputs, *targets, *results))
    )


def _operands(func: Any, args: Any, kwargs: Any) -> tuple[list[Tensor], list[Tensor]]:
    """Return the tensors that are read and those that are written; an in-place operation does both."""
    read: list[Tensor] = []
    written: list[Tensor] = []
    for argument, value in _arguments(func, args, kwargs):
        tensors = [x for x in tree_leaves(value) if isinstance(x, Tensor)]
        is_written = argument.alias_info is not None and argument.alias_info.is_write
        if is_written:
            written += tensors
        if not (is_written and argument.is_out):
            read += tensors
    return read, written


def _arguments(func: Any, args: Any, kwargs: Any) -> Iterator[tuple[Any, Any]]:
    for i, argument in enumerate(func._schema.arguments):
        if i < len(args) and not argument.kwarg_only:
            yield argument, args[i]
        elif argument.name in kwargs:
            yield argument, kwargs[argument.name]


def _bytes(x: Tensor) -> int:
    """Return the bytes in memory: an expanded dimension counts once."""
    size = x.element_size()
    for length, stride in zip(x.shape, x.stride(), strict=True):
        size *= length if stride != 0 else min(length, 1)
    return size


def _flop(packet: Any, args: Any) -> int:
    if packet not in GEMMS:
        return 0
    a, b = [x for x in args if isinstance(x, Tensor)][-2:]
    return 2 * a.shape[0] * a.shape[1] * b.shape[1]
