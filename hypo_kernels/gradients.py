"""The gradients of a call: which inputs may want one, and what they are summed in."""

from __future__ import annotations

from collections.abc import Sequence
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

    A 16-bit matrix's gradient is summed in fp32 and rounded once, at the end.
    """

    def __init__(self, leaves: Leaves, needed: Sequence[bool], compute_dtype: torch.dtype, shard: VocabShard | None):
        wide = gemm.accumulator_dtype(compute_dtype)

        def rows(x: Tensor | None, wanted: bool) -> Tensor | None:
            # fp16 would flush gradients that a later loss scale could still have saved; ranks add theirs up wide.
            dtype = wide if shard is not None or (x is not None and x.dtype == torch.float16) else None
            return x.new_zeros(x.flatten(0, -2).shape, dtype=dtype) if x is not None and wanted else None

        def matrix(x: Tensor | None, wanted: bool) -> Tensor | None:
            return x.new_zeros(x.shape, dtype=wide) if x is not None and wanted else None

        shapes = (rows, matrix, matrix, rows, matrix)
        self.sums = Leaves(*(zeros(x, wanted) for zeros, x, wanted in zip(shapes, leaves, needed, strict=True)))
        self.like = [None if x is None else (x.shape, x.dtype) for x in leaves]

    @property
    def any(self) -> bool:
        return any(x is not None for x in self.sums)

    def over_ranks(self, shard: VocabShard) -> None:
        """Each rank has seen its own vocabulary's part of the gradients by the features: add them up."""
        for partial in (self.sums.hidden, self.sums.lora):
            if partial is not None:
                shard.sum_(partial)

    def scaled(self, factor: Tensor | None = None) -> tuple[Tensor | None, ...]:
        """The gradients, times ``factor`` (), in the shapes and dtypes of the leaves.

        Scales the sums in place: a call's gradients are handed out once.
        """
        out: list[Tensor | None] = []
        for gradient, like in zip(self.sums, self.like, strict=True):
            if gradient is None or like is None:
                out.append(None)
                continue
            if factor is not None:
                gradient.mul_(factor)
            shape, dtype = like
            out.append(gradient.view(shape).to(dtype))
        return tuple(out)
