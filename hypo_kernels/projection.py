"""The product of hidden states and a head, with LoRA applied and sharded weights gathered."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch.nn.functional as F
from torch import Tensor

from hypo_kernels.head import LMHead, LoRA


@dataclass(frozen=True)
class Projection:
    """The factors of the raw logits: packed (T, ·) or padded (S, L, ·) features, and the head."""

    head: LMHead
    hidden: Tensor  # (..., D), multiplied by the head's weight
    lora: Tensor | None = None  # (..., r), scale · hidden·Aᵀ, multiplied by LoRA's B

    @classmethod
    def of(cls, hidden: Tensor, head: LMHead) -> Projection:
        """Return the projection of ``hidden`` by ``head``.

        A LoRA update becomes a second, narrow term of the product: ``W + scale·B·A`` is never formed, and autograd
        computes the gradient of A. A DTensor weight (FSDP2) is gathered, and its gradient averaged over the ranks.
        """
        head = replace(
            head,
            weight=gathered(head.weight),
            bias=None if head.bias is None else gathered(head.bias),
            lora=None if head.lora is None else LoRA(gathered(head.lora.A), gathered(head.lora.B), head.lora.scale),
        )
        head.check_lora(hidden)
        if head.lora is None:
            return cls(head, hidden)
        return cls(head, hidden, F.linear(hidden, head.lora.A) * head.lora.scale)

    def without_tensors(self) -> Projection:
        """Return a copy that holds constants only, for a graph whose tensors autograd saves itself."""
        empty = self.hidden.new_empty(0)
        lora = None if self.head.lora is None else LoRA(empty, empty)
        return Projection(replace(self.head, weight=empty, bias=None, lora=lora), empty)

    def terms(self) -> list[tuple[Tensor, Tensor]]:
        """Return (features, matrix) of each term of the raw product ``Σ features·matrixᵀ``."""
        terms = [(self.hidden, self.head.weight)]
        if self.lora is not None and self.head.lora is not None:
            terms.append((self.lora, self.head.lora.B))
        return terms


def gathered(weight: Tensor) -> Tensor:
    """Return the full tensor of a DTensor, or any other tensor unchanged.

    Each rank computes the gradient of its part of the data, so gradients are averaged over the ranks.
    """
    if not hasattr(weight, "full_tensor"):  # importing DTensor takes half a second
        return weight
    from torch.distributed.tensor import DTensor, Partial

    assert isinstance(weight, DTensor)
    return weight.full_tensor(grad_placements=[Partial("avg")] * weight.device_mesh.ndim)
