"""Differentiable log-probabilities of tokens and sequences, from which other losses can be built.

logp = log_softmax((hidden @ weight.T).float(), -1).gather(-1, target)
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hypo_kernels import ops, reference
from hypo_kernels.gradients import Leaves
from hypo_kernels.head import LMHead, LoRA
from hypo_kernels.layout import TargetLayout
from hypo_kernels.projection import Projection
from hypo_kernels.statistics import sequence_sums
from hypo_kernels.tokens import TokenPass, token_pass
from hypo_kernels.vocab import VocabShard

Targets = Tensor | TargetLayout


@overload
def token_logprobs(
    hidden: Tensor,
    lm_head_weight: Tensor | LMHead,
    targets: Targets,
    *,
    return_entropy: Literal[False] = ...,
    **options: Any,
) -> Tensor: ...
@overload
def token_logprobs(
    hidden: Tensor, lm_head_weight: Tensor | LMHead, targets: Targets, *, return_entropy: Literal[True], **options: Any
) -> tuple[Tensor, Tensor]: ...


def token_logprobs(  # type: ignore[misc]  # the overloads name only the argument that decides the result's type
    hidden: Tensor,
    lm_head_weight: Tensor | LMHead,
    targets: Targets,
    *,
    return_entropy: bool = False,
    bias: Tensor | None = None,
    logit_softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float = 1.0,
    lora: LoRA | None = None,
    vocab_shard: VocabShard | None = None,
    max_chunk_bytes: int | None = None,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Return the log-probability of each target token, differentiable by hidden, weight, bias and LoRA's matrices.

    Args:
        hidden: (T, D) or (S, L, D), float; row t predicts ``targets[t]`` (shift before the call).
        lm_head_weight: (V, D), the dtype of ``hidden`` (any float dtype under autocast); or an :class:`LMHead`
            instead of this and of ``bias``, ``logit_softcap``, ``logit_scale``, ``temperature``, ``lora`` and
            ``vocab_shard``.
        targets: (T,) or (S, L), integers; rows with -100 are ignored and cost nothing. If they are on the CPU, the
            call never waits for the GPU. Or a :class:`TargetLayout`.
        return_entropy: also return each row's entropy ``−Σ_v p_v log p_v``, differentiable, from the same pass over
            the logits.
        bias, logit_softcap, logit_scale, temperature: logits are
            ``softcap(logit_scale · (hidden·Wᵀ + bias)) / temperature``.
        lora: a low-rank update of the head, ``W + scale·B·A``; ``B·A`` is never computed.
        vocab_shard: the part of the vocabulary that weight, bias and B hold on this rank. ``hidden``, ``targets``
            and the results are equal on all ranks.
        max_chunk_bytes: bound on the temporaries of the call, in bytes, without the gradients. By default 1 GiB,
            and on CUDA 1/28 of the device's memory if that is more.
        impl: "auto" (Triton on CUDA, blockwise torch elsewhere), "triton", "torch", or "reference";
            "triton-rows" and "triton-epilogue" force one of Triton's schedules (README).

    Returns:
        Log-probs in nats, fp32 (fp64 for fp64 inputs), of the shape of ``targets``; 0 at ignored rows. With
        ``return_entropy``, a tuple of log-probs and entropies.

    Raises:
        ValueError: an argument is wrong; the message names it, its value and the fix.

    The softmax norms of each row are saved, and backward computes the logits again: 2 NVD forward and 6 NVD backward
    (4 with a frozen head), with NVD = counted rows × V × D.
    """
    head = LMHead.of(
        lm_head_weight,
        bias=bias,
        logit_softcap=logit_softcap,
        logit_scale=logit_scale,
        temperature=temperature,
        lora=lora,
        vocab_shard=vocab_shard,
    )
    if torch.compiler.is_compiling():
        logps, entropies = ops.token_logprobs(
            hidden, head, targets, max_chunk_bytes=max_chunk_bytes, impl=impl, with_entropy=return_entropy
        )
        return (logps, entropies) if return_entropy else logps
    projection = Projection.of(hidden, head)
    plan = token_pass(projection, targets, None, max_chunk_bytes, impl, return_entropy)
    rows = _rows(plan)

    def as_targets(x: Tensor) -> Tensor:
        shape = plan.layout.shape
        return x.new_zeros(shape.numel()).index_copy(0, plan.layout.on(x.device).rows, x).view(shape)

    return (as_targets(rows[0]), as_targets(rows[1])) if return_entropy else as_targets(rows[0])


def sequence_logprobs(
    hidden: Tensor,
    lm_head_weight: Tensor | LMHead,
    targets: Targets,
    cu_seqlens: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    logit_softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float = 1.0,
    lora: LoRA | None = None,
    vocab_shard: VocabShard | None = None,
    max_chunk_bytes: int | None = None,
    impl: str = "auto",
) -> Tensor:
    """Return the log-probability of each sequence: :func:`token_logprobs` summed over its counted tokens.

    ``hidden`` (T, D), ``targets`` (T,) and ``cu_seqlens`` (S+1,) are packed, or ``hidden`` (S, L, D) and ``targets``
    (S, L) padded. The other arguments are those of :func:`token_logprobs`. Returns (S,) in nats, fp32 (fp64 for fp64
    inputs); a sequence without counted tokens has log-prob 0. Under ``torch.no_grad()`` no gradient work is done.
    Raises ValueError if an argument is wrong.
    """
    head = LMHead.of(
        lm_head_weight,
        bias=bias,
        logit_softcap=logit_softcap,
        logit_scale=logit_scale,
        temperature=temperature,
        lora=lora,
        vocab_shard=vocab_shard,
    )
    if torch.compiler.is_compiling():
        logps, _ = ops.token_logprobs(hidden, head, targets, max_chunk_bytes=max_chunk_bytes, impl=impl)
        if cu_seqlens is None:
            return logps.sum(dim=1)
        return sequence_sums(logps, cu_seqlens.to(logps.device).diff())
    projection = Projection.of(hidden, head)
    plan = token_pass(projection, targets, cu_seqlens, max_chunk_bytes, impl, of_sequences=True)
    (rows,) = _rows(plan)
    return sequence_sums(rows, plan.layout.on(hidden.device).lengths)


def _rows(plan: TokenPass) -> tuple[Tensor, ...]:
    """Return the log-prob (N,) and, if the call returns entropies, the entropy (N,) of each counted row."""
    if plan.impl == "reference":
        log_p = reference.row_distributions(plan.projection, plan.layout, plan.compute_dtype)
        return reference.logprobs_and_entropies(log_p, plan.layout)[: 1 + plan.with_entropy]
    return _Rows.apply(*Leaves.of(plan.projection), plan)


class _Rows(torch.autograd.Function):
    """Compute the log-prob (N,) and entropy (N,) of each counted row. Backward computes the logits again."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, ...]:
        *leaves, plan = args
        results = plan.forward()
        ctx.plan = replace(plan, projection=plan.projection.without_tensors())
        ctx.save_for_backward(*leaves, results.norms, results.entropies)
        return (results.logps,) if results.entropies is None else (results.logps, results.entropies)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        *leaves, norms, entropies = ctx.saved_tensors
        plan: TokenPass = ctx.plan
        by_logps, by_entropies = upstream if len(upstream) == 2 else (upstream[0], None)
        gradients = plan.backward(Leaves(*leaves), norms, entropies, by_logps, by_entropies, ctx.needs_input_grad[:5])
        return (*gradients.scaled(), None)
