"""One chunk through the LM head, for the kernels that do it in one GEMM: inputs, float64 truth, eager fp32."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from contract import EAGER_ORDERS
from torch import Tensor

from hypo_kernels.head import LMHead

# Narrow tiles: several of them, and partial ones, along every dimension of a small chunk.
NARROW = {"BLOCK_M": 16, "BLOCK_N": 64, "BLOCK_K": 32, "num_warps": 4, "num_stages": 2, "group": 2}
HEADS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bias": {"bias": True},
    "softcap": {"logit_softcap": 3.0},
    "scale and temperature": {"logit_scale": 0.5, "temperature": 0.8},
    "all": {"logit_softcap": 3.0, "logit_scale": 0.5, "temperature": 0.8, "bias": True},
}


@dataclass(frozen=True)
class Case:
    """C rows of hidden states as a GEMM operand, and a head. A target outside the vocabulary has no logit."""

    x: Tensor  # (C, D)
    weight: Tensor  # (V, D)
    targets: Tensor  # (C,) int64
    head: LMHead

    @property
    def inside(self) -> Tensor:
        return (self.targets >= 0) & (self.targets < len(self.weight))

    def to(self, dtype: torch.dtype) -> Case:
        """Return the case with the same numbers in a wider dtype."""
        bias = None if self.head.bias is None else self.head.bias.to(dtype)
        x, weight = self.x.to(dtype), self.weight.to(dtype)
        return replace(self, x=x, weight=weight, head=replace(self.head, weight=weight, bias=bias))

    def pick(self, z: Tensor) -> Tensor:
        """Return each row's entry of ``z`` (C, V) at its target, (C,), 0 without a target."""
        index = self.targets.clamp(0, len(self.weight) - 1)[:, None]
        return z.gather(1, index).squeeze(1).masked_fill(~self.inside, 0.0)

    def others(self, z: Tensor) -> Tensor:
        """Return ``z`` (C, V) with −inf at the targets."""
        at_target = torch.arange(z.shape[1], device=z.device) == self.targets[:, None]
        return z.masked_fill(at_target, float("-inf"))

    def results(self) -> dict[str, Tensor]:
        """Return what plain torch computes at the dtype of the inputs.

        ``gradient`` (C, V) is that of −logp by raw; of the log-sum-exp, where a row has no target.
        """
        raw = (self.x @ self.weight.t()).requires_grad_()
        z = self.head.logits(raw)
        lse = z.logsumexp(-1)
        logp = self.pick(z.log_softmax(-1))
        (gradient,) = torch.autograd.grad(torch.where(self.inside, -logp, lse).sum(), raw)
        z = z.detach()
        p = z.softmax(-1)
        return {
            "lse": lse.detach(),
            "target logit": self.pick(z),
            "lse of the others": self.others(z).logsumexp(-1),
            "entropy": -torch.xlogy(p, p).sum(-1),
            "gradient": gradient,
        }

    def eager_runs(self) -> list[dict[str, Tensor]]:
        """Results in fp32, with the features added up in several orders (see ``contract``)."""
        case, gen = self.to(torch.float32), torch.Generator().manual_seed(0)
        runs = [case.results()]
        for _ in range(EAGER_ORDERS - 1):
            d = torch.randperm(self.x.shape[1], generator=gen).to(self.x.device)
            runs.append(replace(case, x=case.x[:, d], weight=case.weight[:, d]).results())
        return runs

    def size(self) -> float:
        """The largest logit: its rounding is that of every difference of logits."""
        z = self.head.logits(self.x.double() @ self.weight.double().t())
        return float(z[z.isfinite()].abs().max())


def make_case(
    rows: int,
    vocab: int,
    width: int,
    *,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    head: str = "plain",
    spread: float = 2.0,
    shift: float = 0.0,
    aligned: bool = False,
    seed: int = 0,
) -> Case:
    """Logits ~ N(shift, spread²) before the head's scale. Beyond their last feature, rows hold NaN.

    ``aligned`` rows are a multiple of 16 bytes apart, as tensor descriptors want it.
    """
    gen = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, width, generator=gen)
    weight = torch.randn(vocab, width, generator=gen) * spread / width**0.5
    if shift:
        x[:, 0], weight[:, 0] = 1.0, shift
    pitch = -(-width // 8) * 8 if aligned else width + 3
    padded = []
    for matrix in (x, weight):
        buffer = torch.full((len(matrix), pitch), float("nan"), device=device, dtype=dtype)
        padded.append(buffer[:, :width])
        padded[-1].copy_(matrix)
    targets = torch.randint(vocab, (rows,), generator=gen)
    targets[0], targets[-1] = 0, vocab - 1  # the ends of the row
    options = dict(HEADS[head])
    if options.pop("bias", False):
        options["bias"] = torch.randn(vocab, generator=gen).to(device, dtype)
    return Case(padded[0], padded[1], targets.to(device), LMHead(padded[1], **options))
