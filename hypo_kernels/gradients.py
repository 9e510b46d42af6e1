"""The gradients of a call: which inputs may want one, and what they are summed in."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from hypo_kernels import gemm
from hypo_kernels.projection import Projection
from hypo_kernels.vocab import VocabShard


class Leaves(NamedTuple):
    """The tensors of a projection that may want a gradient, or those gradients."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None = None
    lora: Tensor | None = None  # scale · hidden·Aᵀ
    lora_weight: Tensor | None = None  # B

    @classmethod
    def of(cls, projection: Projection) -> Leaves:
        head = projection.head
        return cls(projection.hidden, head.weight, head.bias, projection.lora, head.lora_weight)

    def put_into(self, projection: Projection) -> Projection:
        """The projection with these tensors in place of its own."""
        assert self.hidden is not None
        assert self.weight is not None
        head = replace(projection.head, weight=self.weight, bias=self.bias, lora_weight=self.lora_weight)
        return Projection(head, self.hidden, self.lora)


class Gradients:
    """Sums over the counted rows, (rows, features) and in the shape of each matrix; None where none is wanted.

    A 16-bit matrix's gradient is summed in fp32 and rounded once, at the end. One that a single product makes
    (``in_one_product``) needs no sum: a GEMM of 16-bit operands rounds it once by itself.
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
        for of_rows in (self.sums.hidden, self.sums.lora):
            if of_rows is not None:
                of_rows.zero_()  # ignored rows are never written
        self._begun: set[int] = set()
        self._leaves = [None if x is None else (x.shape, x.dtype) for x in leaves]
        self._scale_ = scale_

    @property
    def any(self) -> bool:
        return any(x is not None for x in self.sums)

    def begun(self, matrix: Tensor) -> bool:
        """Whether the sum of a matrix's gradient holds something to add to; from now on it does."""
        before = id(matrix) in self._begun
        self._begun.add(id(matrix))
        return before

    def close(self, shard: VocabShard | None) -> None:
        """After the last product: what got none is zero, and ranks of a shard add up their vocabularies' parts."""
        for matrix in (self.sums.weight, self.sums.bias, self.sums.lora_weight):
            if matrix is not None and id(matrix) not in self._begun:
                matrix.zero_()
        if shard is not None:
            for partial in (self.sums.hidden, self.sums.lora):
                if partial is not None:
                    shard.sum_(partial)

    def scaled(self, factor: Tensor | None = None) -> tuple[Tensor | None, ...]:
        """The gradients, times ``factor`` (), in the shapes and dtypes of the leaves.

        Scales the sums in place: a call's gradients are handed out once.
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
    """Tensors without memory, of the shapes, dtypes and devices in which the leaves' gradients are summed."""
    wide = gemm.accumulator_dtype(compute_dtype)

    def of_rows(x: Tensor) -> Tensor:
        # fp16 would flush gradients that a later loss scale could still have saved; ranks add theirs up wide.
        dtype = wide if shard is not None or x.dtype == torch.float16 else x.dtype
        return x.new_empty((), dtype=dtype).expand(math.prod(x.shape[:-1]), x.shape[-1])

    def of_matrix(x: Tensor) -> Tensor:
        rounded_by_gemm = x.dtype == gemm.operand_dtype(x.device, compute_dtype) == torch.bfloat16
        return x.new_empty((), dtype=x.dtype if in_one_product and rounded_by_gemm else wide).expand(x.shape)

    kinds = (of_rows, of_matrix, of_matrix, of_rows, of_matrix)
    return [None if x is None else like(x) for like, x in zip(kinds, leaves, strict=True)]
