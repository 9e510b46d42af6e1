"""Log-probabilities of tokens and sequences, differentiable: the blocks that other losses are built on.

logp = log_softmax((hidden @ weight.T).float(), -1).gather(-1, target)
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hypo_kernels import checks, chunks, reference
from hypo_kernels.chunks import Layout, split
from hypo_kernels.head import LMHead
from hypo_kernels.room import Gradients, HeadRoom, sequence_sums


def token_logprobs(
    hidden: Tensor,
    lm_head_weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    logit_softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float = 1.0,
    max_chunk_bytes: int = 2**30,
    impl: str = "auto",
) -> Tensor:
    """Log-probability of each target token, differentiable by hidden, weight and bias.

    Args:
        hidden: (T, D) or (S, L, D), float; row t predicts ``targets[t]`` (shift before the call).
        lm_head_weight: (V, D), the dtype of ``hidden`` (any float dtype under autocast).
        targets: (T,) or (S, L), integers; -100 ignores a row, which then costs nothing. On the CPU, the
            call never waits for the GPU.
        bias, logit_softcap, logit_scale, temperature: logits are
            ``softcap(logit_scale · (hidden·Wᵀ + bias)) / temperature``.
        max_chunk_bytes: bound on the temporaries of the call, in bytes, beside the gradients.
        impl: "auto" (Triton on CUDA, blockwise torch elsewhere), "triton", "torch", or "reference".

    Returns:
        fp32 (fp64 for fp64 inputs) of the shape of ``targets``, in nats; 0 at ignored rows.

    Raises:
        ValueError: an argument is wrong; the message names it, its value and the fix.

    Each row's softmax norms are saved and the logits are recomputed in backward: 2 NVD forward and 6 NVD backward
    (4 with a frozen head), with NVD = counted rows × V × D.
    """
    head = LMHead(lm_head_weight, bias, logit_softcap, logit_scale, temperature)
    layout, rows = _checked_rows(hidden, head, targets, None, max_chunk_bytes, impl)
    flat = rows.new_zeros(targets.numel()).index_copy(0, layout.rows.to(rows.device), rows)
    return flat.view(targets.shape)


def sequence_logprobs(
    hidden: Tensor,
    lm_head_weight: Tensor,
    targets: Tensor,
    cu_seqlens: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    logit_softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float = 1.0,
    max_chunk_bytes: int = 2**30,
    impl: str = "auto",
) -> Tensor:
    """Log-probability of each sequence: :func:`token_logprobs` summed over its counted tokens.

    ``hidden`` (T, D), ``targets`` (T,) and ``cu_seqlens`` (S+1,) packed, or ``hidden`` (S, L, D) and
    ``targets`` (S, L) padded. Returns (S,) fp32; a sequence without counted tokens has log-prob 0.
    Under ``torch.no_grad()`` it does no gradient work: the reference's and the evaluation's path.
    """
    head = LMHead(lm_head_weight, bias, logit_softcap, logit_scale, temperature)
    if hidden.ndim == 2 and cu_seqlens is None:
        raise ValueError("cu_seqlens is missing: packed hidden (T, D) needs it to tell its sequences apart")
    layout, rows = _checked_rows(hidden, head, targets, cu_seqlens, max_chunk_bytes, impl)
    return sequence_sums(rows, layout.lengths.to(rows.device))


def _checked_rows(
    hidden: Tensor, head: LMHead, targets: Tensor, cu_seqlens: Tensor | None, max_chunk_bytes: int, impl: str
) -> tuple[Layout, Tensor]:
    """The layout of a call and the log-prob of each of its counted rows, (N,)."""
    checks.inputs(hidden, head, targets, cu_seqlens)
    if cu_seqlens is not None:
        checks.sequences(cu_seqlens, len(targets))
    checks.chunk_budget(max_chunk_bytes)
    dtype = checks.compute_dtype(hidden, head.weight)
    impl = checks.implementation(impl, hidden.device, dtype)
    layout = chunks.layout(targets, cu_seqlens if hidden.ndim == 2 else None)
    checks.targets_in_vocabulary(layout, head.vocab_size)
    if impl == "reference":
        return layout, reference.row_logprobs(hidden, head, layout, dtype)
    plan = _RowPlan(head, layout, dtype, impl, max_chunk_bytes)
    return layout, _RowLogprobs.apply(hidden, head.weight, head.bias, plan)


@dataclass(frozen=True)
class _RowPlan:
    head: LMHead
    layout: Layout
    compute_dtype: torch.dtype
    impl: str
    max_chunk_bytes: int


class _RowLogprobs(torch.autograd.Function):
    """Log-prob of each counted row (N,): statistics forward, recompute and finish backward."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, plan: _RowPlan) -> Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            room = HeadRoom([plan.head], plan.layout, plan.compute_dtype, plan.impl, plan.max_chunk_bytes)
            norms, logps = room.statistics(hidden, plan.head, room.all_rows)
        ctx.save_for_backward(hidden, weight, bias, norms)
        ctx.plan = plan
        return logps

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logps: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, norms = ctx.saved_tensors
        plan: _RowPlan = ctx.plan
        head = replace(plan.head, weight=weight, bias=bias)
        with torch.autocast(hidden.device.type, enabled=False):
            room = HeadRoom([head], plan.layout, plan.compute_dtype, plan.impl, plan.max_chunk_bytes)
            gradients = Gradients.like(hidden, head, ctx.needs_input_grad[:3], plan.compute_dtype)
            for rows in split(room.all_rows, room.max_rows):
                unit, _, _ = room.unit_gradients(hidden, head, rows, norms[rows])
                room.finish(gradients, unit, hidden, head, rows, grad_logps[rows])
            return (*gradients.scaled(None, hidden, head), None)
