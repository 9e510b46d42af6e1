"""Hidden states on their way through a head, with the caller's forms of weight and update made plain."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch.nn.functional as F
from torch import Tensor

from hypo_kernels import checks
from hypo_kernels.head import LMHead, LoRA


@dataclass(frozen=True)
class Projection:
    """A row a token: packed (T, ·) or padded (S, L, ·)."""

    head: LMHead
    hidden: Tensor  # (..., D), multiplied by the weight
    lora: Tensor | None = None  # (..., r), scale · hidden·Aᵀ, multiplied by LoRA's B

    @classmethod
    def of(cls, hidden: Tensor, head: LMHead, lora: LoRA | None = None) -> Projection:
        """A LoRA update is a second, narrow term of the product, so that ``W + scale·B·A`` is never formed and
        autograd finishes A. A DTensor weight (FSDP2) is gathered, and its gradient averaged over the ranks.
        """
        head = replace(head, weight=whole(head.weight), bias=None if head.bias is None else whole(head.bias))
        if lora is None:
            return cls(head, hidden)
        lora = LoRA(whole(lora.A), whole(lora.B), lora.scale)
        checks.lora(lora, hidden, head)
        return cls(replace(head, lora_weight=lora.B), hidden, F.linear(hidden, lora.A) * lora.scale)

    def terms(self) -> list[tuple[Tensor, Tensor]]:
        """(features, matrix) of each term of the raw product ``Σ features·matrixᵀ``."""
        out = [(self.hidden, self.head.weight)]
        if self.lora is not None and self.head.lora_weight is not None:
            out.append((self.lora, self.head.lora_weight))
        return out


def whole(weight: Tensor) -> Tensor:
    """A sharded parameter's full tensor. Each rank's gradient is of its own rows of data: they are averaged."""
    if not hasattr(weight, "full_tensor"):  # DTensor's; its module takes half a second to import
        return weight
    from torch.distributed.tensor import DTensor, Partial

    assert isinstance(weight, DTensor)
    return weight.full_tensor(grad_placements=[Partial("avg")] * weight.device_mesh.ndim)
