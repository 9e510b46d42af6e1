"""The gradients of a call: the inputs that can have one, and the buffers in which they are summed."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hypo_kernels import gemm
from hypo_kernels.projection import Projection
from hypo_kernels.vocab import VocabShard


class Leaves(NamedTuple):
    """The tensors of a projection that can require a gradient, or their gradients."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None = None
    lora: Tensor | None = None  # scale · hidden·Aᵀ
    lora_weight: Tensor | None = None  # B

    @classmethod
    def of(cls, projection: Projection) -> Leaves:
        """Return the tensors of ``projection``."""
        head = projection.head
        return cls(projection.hidden, head.weight, head.bias, projection.lora, head.lora_weight)

    def put_into(self, projection: Projection) -> Projection:
        """Return a copy of ``projection`` that uses these tensors."""
        assert self.hidden is not None
        assert self.weight is not None
        return Projection(
            projection.head.with_tensors(self.weight, self.bias, self.lora_weight), self.hidden, self.lora
        )


class Gradients:
    """Gradients that are summed chunk by chunk: (rows, features), or in the shape of the matrix; None if not needed.

    A 16-bit matrix's gradient is summed in fp32 and rounded once, at the end. If it is a single product
    (``in_one_product``), no sum is needed: a GEMM of 16-bit operands rounds it once.
    """

    def __init__(
        self,
        leaves: Leaves,
        needed: Sequence[bool],
        compute_dtype: torch.dtype,
        shard: VocabShard | None,
        *,
        in_one_product: bool = False,
        scale_: Callable[[Tensor, Tensor], object] = Tensor.mul_,
    ) -> None:
        shapes = shapes_of_sums(leaves, compute_dtype, shard, in_one_product=in_one_product)
        sums = [None if x is None or not wanted else x for x, wanted in zip(shapes, needed, strict=True)]
        self.sums = Leaves(*(None if x is None else torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in sums))
        for row_sums in (self.sums.hidden, self.sums.lora):
            if row_sums is not None:
                row_sums.zero_()  # ignored rows are never written
        self._begun: set[int] = set()
        self._leaves = [None if x is None else (x.shape, x.dtype) for x in leaves]
        self._scale_ = scale_

    @property
    def any(self) -> bool:
        """True if any gradient is needed."""
        return any(x is not None for x in self.sums)

    def begun(self, matrix: Tensor) -> bool:
        """Return whether this matrix's gradient was written before, and mark it as written."""
        begun = id(matrix) in self._begun
        self._begun.add(id(matrix))
        return begun

    def close(self, shard: VocabShard | None) -> None:
        """Finish after the last product: zero unwritten gradients, and sum partial ones over the shard's ranks."""
        for matrix in (self.sums.weight, self.sums.bias, self.sums.lora_weight):
            if matrix is not None and id(matrix) not in self._begun:
                matrix.zero_()
        if shard is not None:
            for partial in (self.sums.hidden, self.sums.lora):
                if partial is not None:
                    shard.sum_(partial)

    def scaled(self, factor: Tensor | None = None) -> tuple[Tensor | None, ...]:
        """Return the gradients, times ``factor`` (), in the shapes and dtypes of the leaves.

        Scales the sums in place, so it can be called once.
        """
        out: list[Tensor | None] = []
        for gradient, like in zip(self.sums, self._leaves, strict=True):
            if gradient is None or like is None:
                out.append(None)
                continue
            shape, dtype = like
            if factor is not None and gradient.is_cuda and gradient.dtype != dtype:  # one pass over the memory
                out.append(torch.mul(gradient, factor, out=gradient.new_empty(gradient.shape, dtype=dtype)).view(shape))
                continue
            if factor is not None:
                self._scale_(gradient, factor)
            out.append(gradient.view(shape).to(dtype))
        return tuple(out)


def shapes_of_sums(
    leaves: Leaves, compute_dtype: torch.dtype, shard: VocabShard | None, *, in_one_product: bool = False
) -> list[Tensor | None]:
    """Return the leaves' summed gradients as tensors without memory: shapes, dtypes and devices only."""
    accumulator_dtype = gemm.accumulator_dtype(compute_dtype)

    def row_sum(x: Tensor) -> Tensor:
        # fp16 would flush gradients that a later loss scale could still have saved; ranks sum theirs in fp32.
        dtype = accumulator_dtype if shard is not None or x.dtype == torch.float16 else x.dtype
        return x.new_empty((), dtype=dtype).expand(math.prod(x.shape[:-1]), x.shape[-1])

    def matrix_sum(x: Tensor) -> Tensor:
        rounded_by_gemm = x.dtype == gemm.operand_dtype(x.device, compute_dtype) == torch.bfloat16
        dtype = x.dtype if in_one_product and rounded_by_gemm else accumulator_dtype
        return x.new_empty((), dtype=dtype).expand(x.shape)

    kinds = (row_sum, matrix_sum, matrix_sum, row_sum, matrix_sum)
    return [None if x is None else kind(x) for kind, x in zip(kinds, leaves, strict=True)]
