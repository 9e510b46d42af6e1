"""Log-probabilities of tokens and sequences, differentiable: the blocks that other losses are built on.

logp = log_softmax((hidden @ weight.T).float(), -1).gather(-1, target)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hypo_kernels import checks, chunks, reference
from hypo_kernels.chunks import Layout, split
from hypo_kernels.gradients import Gradients, Leaves
from hypo_kernels.head import LMHead, LoRA
from hypo_kernels.projection import Projection
from hypo_kernels.room import HeadRoom, sequence_sums
from hypo_kernels.vocab import VocabShard


@overload
def token_logprobs(
    hidden: Tensor, lm_head_weight: Tensor, targets: Tensor, *, return_entropy: Literal[False] = ..., **options: Any
) -> Tensor: ...
@overload
def token_logprobs(
    hidden: Tensor, lm_head_weight: Tensor, targets: Tensor, *, return_entropy: Literal[True], **options: Any
) -> tuple[Tensor, Tensor]: ...


def token_logprobs(  # type: ignore[misc]  # the overloads name what decides the result's type alone
    hidden: Tensor,
    lm_head_weight: Tensor,
    targets: Tensor,
    *,
    return_entropy: bool = False,
    bias: Tensor | None = None,
    logit_softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float = 1.0,
    lora: LoRA | None = None,
    vocab_shard: VocabShard | None = None,
    max_chunk_bytes: int = 2**30,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Log-probability of each target token, differentiable by hidden, weight, bias and LoRA's matrices.

    Args:
        hidden: (T, D) or (S, L, D), float; row t predicts ``targets[t]`` (shift before the call).
        lm_head_weight: (V, D), the dtype of ``hidden`` (any float dtype under autocast).
        targets: (T,) or (S, L), integers; -100 ignores a row, which then costs nothing. On the CPU, the
            call never waits for the GPU.
        return_entropy: also return each row's entropy ``−Σ_v p_v log p_v``, from the same pass over the logits
            and as differentiable.
        bias, logit_softcap, logit_scale, temperature: logits are
            ``softcap(logit_scale · (hidden·Wᵀ + bias)) / temperature``.
        lora: a low-rank update of the head, ``W + scale·B·A``, which is never multiplied out.
        vocab_shard: which part of the vocabulary this rank's weight, bias and B hold; ``hidden`` and ``targets``
            are the same on all ranks, and so are the results.
        max_chunk_bytes: bound on the temporaries of the call, in bytes, beside the gradients.
        impl: "auto" (Triton on CUDA, blockwise torch elsewhere), "triton", "torch", or "reference".

    Returns:
        fp32 (fp64 for fp64 inputs) of the shape of ``targets``, in nats; 0 at ignored rows. With
        ``return_entropy``, two of them: log-probs and entropies.

    Raises:
        ValueError: an argument is wrong; the message names it, its value and the fix.

    Each row's softmax norms are saved and the logits are recomputed in backward: 2 NVD forward and 6 NVD backward
    (4 with a frozen head), with NVD = counted rows × V × D.
    """
    head = LMHead(lm_head_weight, bias, logit_softcap, logit_scale, temperature, shard=vocab_shard)
    layout, rows = _checked_rows(hidden, head, lora, targets, None, max_chunk_bytes, impl, return_entropy)

    def in_place(x: Tensor) -> Tensor:
        flat = x.new_zeros(targets.numel()).index_copy(0, layout.rows.to(x.device, non_blocking=True), x)
        return flat.view(targets.shape)

    return (in_place(rows[0]), in_place(rows[1])) if return_entropy else in_place(rows[0])


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
    lora: LoRA | None = None,
    vocab_shard: VocabShard | None = None,
    max_chunk_bytes: int = 2**30,
    impl: str = "auto",
) -> Tensor:
    """Log-probability of each sequence: :func:`token_logprobs` summed over its counted tokens.

    ``hidden`` (T, D), ``targets`` (T,) and ``cu_seqlens`` (S+1,) packed, or ``hidden`` (S, L, D) and
    ``targets`` (S, L) padded. Returns (S,) fp32; a sequence without counted tokens has log-prob 0.
    Under ``torch.no_grad()`` it does no gradient work: the reference's and the evaluation's path.
    """
    head = LMHead(lm_head_weight, bias, logit_softcap, logit_scale, temperature, shard=vocab_shard)
    if hidden.ndim == 2 and cu_seqlens is None:
        raise ValueError("cu_seqlens is missing: packed hidden (T, D) needs it to tell its sequences apart")
    layout, rows = _checked_rows(hidden, head, lora, targets, cu_seqlens, max_chunk_bytes, impl, False)
    return sequence_sums(rows[0], layout.lengths.to(hidden.device, non_blocking=True))


def _checked_rows(
    hidden: Tensor,
    head: LMHead,
    lora: LoRA | None,
    targets: Tensor,
    cu_seqlens: Tensor | None,
    max_chunk_bytes: int,
    impl: str,
    with_entropy: bool,
) -> tuple[Layout, tuple[Tensor, ...]]:
    """The layout of a call, and of each of its counted rows the log-prob (N,) and, if wanted, the entropy (N,)."""
    projection = Projection.of(hidden, head, lora)
    checks.inputs(projection, targets, cu_seqlens)
    if cu_seqlens is not None:
        checks.sequences(cu_seqlens, len(targets))
    checks.chunk_budget(max_chunk_bytes)
    dtype = checks.compute_dtype(hidden, projection.head.weight)
    impl = checks.implementation(impl, projection.head, dtype)
    layout = chunks.layout(targets, cu_seqlens if hidden.ndim == 2 else None)
    checks.targets_in_vocabulary(layout, head)
    if impl == "reference":
        log_p = reference.row_distributions(projection, layout, dtype)
        return layout, reference.logprobs_and_entropies(log_p, layout)[: 1 + with_entropy]
    plan = _RowPlan(projection, layout, dtype, impl, max_chunk_bytes, with_entropy)
    return layout, _Rows.apply(*Leaves.of(projection), plan)


@dataclass(frozen=True)
class _RowPlan:
    projection: Projection
    layout: Layout
    compute_dtype: torch.dtype
    impl: str
    max_chunk_bytes: int
    with_entropy: bool

    def room(self, projection: Projection) -> HeadRoom:
        return HeadRoom(
            [projection.head],
            self.layout,
            self.compute_dtype,
            self.impl,
            self.max_chunk_bytes,
            with_divergence=self.with_entropy,
        )


class _Rows(torch.autograd.Function):
    """Log-prob and entropy of each counted row, (N,) each: statistics forward, recompute and finish backward."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, ...]:
        *leaves, plan = args
        ctx.plan = plan
        projection = plan.projection
        with torch.autocast(projection.hidden.device.type, enabled=False):
            room = plan.room(projection)
            if not plan.with_entropy:
                stats = room.statistics(projection, room.all_rows)
                ctx.save_for_backward(*leaves, stats.norms)
                return (stats.logps(),)
            stats = room.entropy_statistics(projection, room.all_rows)
            entropies = -stats.divergence(None)
        ctx.save_for_backward(*leaves, stats.norms, entropies)
        return stats.logps(), entropies

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        plan: _RowPlan = ctx.plan
        *tensors, norms = ctx.saved_tensors if not plan.with_entropy else ctx.saved_tensors[:-1]
        leaves = Leaves(*tensors)
        projection = leaves.put_into(plan.projection)
        with torch.autocast(projection.hidden.device.type, enabled=False):
            room = plan.room(projection)
            gradients = Gradients(leaves, ctx.needs_input_grad[:5], plan.compute_dtype, projection.head.shard)
            for rows in split(room.all_rows, room.max_rows):
                (raw,) = room.logits([projection], rows)
                if not plan.with_entropy:
                    unit, _ = room.unit_gradients(raw, projection, rows, norms[rows])
                    factor = -upstream[0][rows]
                else:
                    unit, factor = room.mixed_gradients(
                        projection,
                        raw,
                        None,
                        None,
                        rows,
                        norms=norms[rows],
                        ref_norms=None,
                        divergence=-ctx.saved_tensors[-1][rows],
                        by_logp=upstream[0][rows],
                        by_divergence=-upstream[1][rows],
                    )
                room.finish(gradients, unit, projection, rows, factor)
            if projection.head.shard is not None:
                gradients.over_ranks(projection.head.shard)
            return (*gradients.scaled(), None)
