"""The public door: ``fused_hypo_loss``, checked, dispatched and put back in the caller's order."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hypo_kernels import gemm, ops, reference, schedule
from hypo_kernels.call import Outcome, Reference, prepare
from hypo_kernels.gradients import Leaves
from hypo_kernels.head import LMHead, LoRA
from hypo_kernels.layout import TargetLayout
from hypo_kernels.objective import Importance
from hypo_kernels.projection import Projection
from hypo_kernels.vocab import VocabShard


class HypoLoss(NamedTuple):
    """A loss to call ``backward()`` on, and what it saw: detached, fp32 (fp64 for fp64 inputs), in nats.

    S sequences are P chosen, P rejected, then N online samples, in the order of the call.
    """

    loss: Tensor  # (), preference loss + kl_coef · (reverse KL + length_penalty · length)
    logps: Tensor  # (S,) log π(y|x)
    ref_logps: Tensor  # (S,) log π_ref(y|x)
    chosen_rewards: Tensor  # (P,) β (log π − log π_ref) of the chosen
    rejected_rewards: Tensor  # (P,) the same of the rejected
    margins: Tensor  # (P,) chosen_rewards − rejected_rewards
    kl: Tensor  # (N,) of each sample, its mean estimates the trajectory's KL(π‖π_ref): log π − log π_ref where the
    # estimator is "sampled", the sum of its positions' KL(π‖π_ref) where it is "exact"
    lengths: Tensor  # (S,) int64, counted tokens
    importance: Importance | None = None  # of each sample (N,), where ``behavior_logps`` are given


def fused_hypo_loss(
    hidden: Tensor,
    lm_head_weight: Tensor,
    targets: Tensor | TargetLayout,
    cu_seqlens: Tensor | None = None,
    *,
    num_pairs: int,
    num_generations: int = 2,
    ref_logps: Tensor | None = None,
    ref_hidden: Tensor | None = None,
    ref_lm_head_weight: Tensor | None = None,
    beta: float,
    kl_coef: float,
    length_penalty: float = 0.0,
    preference: str = "sigmoid",
    label_smoothing: float = 0.0,
    kl_estimator: str = "sampled",
    behavior_logps: Tensor | None = None,
    importance_cap: float = 2.0,
    bias: Tensor | None = None,
    ref_bias: Tensor | None = None,
    logit_softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float = 1.0,
    lora: LoRA | None = None,
    vocab_shard: VocabShard | None = None,
    max_chunk_bytes: int = 2**30,
    validate: bool = False,
    impl: str = "auto",
) -> HypoLoss:
    """The HyPO loss straight from hidden states (arXiv 2406.01462, Eq. 7 and Algorithm 1).

        ρ(x, y) = log π(y|x) − log π_ref(y|x)
        loss = −mean over pairs of log σ(β ρ(x, y⁺) − β ρ(x, y⁻)) + kl_coef · KL(π‖π_ref)

    The reverse KL is estimated at trajectory level on samples of the current policy; its gradient is RLOO's:
    with ``r_i = sg(ρ(x, y_i)) + length_penalty · |y_i|`` over the k samples of a prompt,
    ``kl_coef · mean_i (r_i − mean_{j≠i} r_j) ∇log π(y_i|x)``. The value of ``loss`` is the objective itself,
    with mean r_i in place of the KL.

    ``kl_estimator="exact"`` estimates the same KL with less noise, by the divergence of the full distributions at
    every position of a sample, ``D_t = KL(π(·|s_t)‖π_ref(·|s_t))``. The value is ``kl_coef`` times the mean over
    samples of ``Σ_t (D_t + length_penalty)``, and the gradient its unbiased estimate: ``∇D_t`` and the
    score-function term of the costs that follow a token (:meth:`.objective.Objective.exact_online`).

    ``behavior_logps`` say that another policy μ drew the samples, such as that of some optimizer steps ago. Each
    token's part of the online gradient then takes a truncated importance weight, a constant:

        w_t = min(π(y_t)/μ(y_t), C)        kl_coef · mean_i (r_i − mean_{j≠i} r_j) Σ_t w_{i,t} ∇log π(y_{i,t})

    with r_i under the *current* policy and C = ``importance_cap`` (Ionides 2008; for language models TIS, Yao et al.
    2025). Where μ is π, every weight is 1 and the gradient is the one without them. Elsewhere it is an
    approximation. On samples of one token, untruncated weights give an unbiased gradient of the reverse KL. On
    longer ones no: a weight corrects the choice of its own token, not how often μ comes to the state it is made in,
    nor what μ does after it, which is in r_i. The weight of the whole sample, Π_t π(y_t)/μ(y_t), would, but its
    variance grows exponentially with the length. Truncation bounds the variance, and gives too little weight to
    the tokens that the policy has come to prefer most. The values take no weights: ``loss`` and ``kl`` are those of
    the same samples without ``behavior_logps``, hence means under μ. ``importance`` says how far μ is from π.

    Args:
        hidden: (T, D) packed or (S, L, D) padded, float: final hidden states; row t predicts ``targets[t]``.
        lm_head_weight: (V, D), the dtype of ``hidden`` (any float dtype under autocast).
        targets: (T,) or (S, L) integers; -100 ignores a row (prompt, padding), which then costs nothing.
        cu_seqlens: (S+1,) integers, the bounds of the packed sequences. Sequences are ``num_pairs`` chosen,
            ``num_pairs`` rejected in the same order, then online samples, ``num_generations`` consecutive
            ones a prompt. Without samples the loss is DPO's or IPO's; without pairs, pure online RLOO.
            ``targets`` and ``cu_seqlens`` are read on the host: on the CPU, the call never waits for the GPU; a
            :class:`TargetLayout` in their place is laid out already, for a CUDA graph to capture the call.
        num_pairs: P ≥ 0.
        num_generations: k ≥ 2, samples a prompt.
        ref_logps: (S,) reference log-probs, or
        ref_hidden: of the shape of ``hidden``, from which they are computed with ``ref_lm_head_weight`` and
            ``ref_bias`` (by default the policy's own, which must then be frozen).
        beta: β > 0 of DPO and IPO.
        kl_coef: λ ≥ 0; multiplies a sum over tokens, hence as small as 1e-4.
        length_penalty: γ, added to r_i for each token of a sample.
        preference: "sigmoid" (DPO) or "ipo", ``(ρ(x, y⁺) − ρ(x, y⁻) − 1/(2β))²``.
        label_smoothing: in [0, 0.5), the assumed share of flipped preferences ("sigmoid" only).
        kl_estimator: "sampled", from the log-probs of the samples, or "exact", from the full distributions along
            them, which needs ``ref_hidden``.
        behavior_logps: fp32 or fp64 of the shape of ``targets``, log μ of each target token under the policy that
            drew it (its temperature included). Only the counted rows of online samples are read. It goes with
            ``kl_estimator="sampled"``.
        importance_cap: C > 0, the largest importance weight; inf truncates nothing, and below 1 samples of the
            current policy are truncated too.
        bias, logit_softcap, logit_scale, temperature: logits are
            ``softcap(logit_scale · (hidden·Wᵀ + bias)) / temperature``, for policy and reference.
        lora: a low-rank update of the policy's head, ``W + scale·B·A``, which is never multiplied out; the
            reference's is the head without it.
        vocab_shard: which part of the vocabulary this rank's weights, biases and B hold; all other arguments are
            the same on all ranks, and so are the results.
        max_chunk_bytes: bound on all temporaries of the call together, in bytes, beside the gradients (a
            16-bit weight's gradient is accumulated in fp32). Larger calls do not use more.
        validate: also check that hidden states and reference log-probs are finite; waits for the GPU.
        impl: "auto" (Triton on CUDA, blockwise torch elsewhere), "triton", "torch", or "reference"
            (eager, full logits: the specification); "triton-rows" and "triton-epilogue" force one of Triton's
            schedules (README). One that cannot serve the call raises.

    Returns:
        :class:`HypoLoss`. Gradients of hidden, weight and bias are finished in the forward call, so its
        ``loss`` can be differentiated once.

    Raises:
        ValueError: an argument is wrong; the message names it, its value and the fix.
    """
    head = LMHead(lm_head_weight, bias, logit_softcap, logit_scale, temperature, shard=vocab_shard)
    options: dict[str, Any] = {
        "num_pairs": num_pairs,
        "num_generations": num_generations,
        "beta": beta,
        "kl_coef": kl_coef,
        "length_penalty": length_penalty,
        "preference": preference,
        "label_smoothing": label_smoothing,
        "kl_estimator": kl_estimator,
        "importance_cap": importance_cap,
        "max_chunk_bytes": max_chunk_bytes,
        "validate": validate,
        "impl": impl,
    }
    reference_of_call = Reference(ref_logps, ref_hidden, ref_lm_head_weight, ref_bias)
    if torch.compiler.is_compiling():
        found, lengths = ops.hypo_loss(
            hidden, head, lora, targets, cu_seqlens, reference_of_call, behavior_logps, options
        )
    else:
        policy = Projection.of(hidden, head, lora)
        call = prepare(policy, targets, cu_seqlens, reference_of_call, behavior_logps, **options)
        if call.impl == "reference":
            found = reference.hypo_loss(call)
        else:
            found = Outcome(*_FusedHypo.apply(*Leaves.of(policy), call, torch.is_grad_enabled()))
        found, lengths = call.in_call_order(found), call.lengths
    chosen, rejected = (found.logps - found.ref_logps)[: 2 * num_pairs].view(2, num_pairs)
    return HypoLoss(
        loss=found.loss,
        logps=found.logps,
        ref_logps=found.ref_logps,
        chosen_rewards=beta * chosen,
        rejected_rewards=beta * rejected,
        margins=beta * (chosen - rejected),
        kl=found.kl,
        lengths=lengths,
        importance=found.importance,
    )


class _FusedHypo(torch.autograd.Function):
    """An :class:`Outcome` with the gradients finished in forward; backward hands them out, scaled."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor | Importance | None, ...]:
        *leaves, call, grad_enabled = args
        # needs_input_grad says which inputs require a gradient, under no_grad too.
        needed = [grad_enabled and x for x in ctx.needs_input_grad[: len(leaves)]]
        with gemm.undisturbed(call.policy.hidden.device):
            found, ctx.gradients = schedule.run(call, needed)
        ctx.mark_non_differentiable(found.logps, found.ref_logps, found.kl)
        return tuple(found)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError(
                "fused_hypo_loss: backward was called twice, but its gradients are handed out once "
                "(they were finished in the forward call); call fused_hypo_loss again"
            )
        gradients, ctx.gradients = ctx.gradients, None
        return (*gradients.scaled(grad_loss), None, None)
