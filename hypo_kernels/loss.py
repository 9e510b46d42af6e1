"""The public door: ``fused_hypo_loss``, checked, dispatched and put back in the caller's order."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hypo_kernels import checks, chunks, reference, schedule
from hypo_kernels.call import Call
from hypo_kernels.head import LMHead
from hypo_kernels.objective import Objective


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


def fused_hypo_loss(
    hidden: Tensor,
    lm_head_weight: Tensor,
    targets: Tensor,
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
    bias: Tensor | None = None,
    ref_bias: Tensor | None = None,
    logit_softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float = 1.0,
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

    Args:
        hidden: (T, D) packed or (S, L, D) padded, float: final hidden states; row t predicts ``targets[t]``.
        lm_head_weight: (V, D), the dtype of ``hidden`` (any float dtype under autocast).
        targets: (T,) or (S, L) integers; -100 ignores a row (prompt, padding), which then costs nothing.
        cu_seqlens: (S+1,) integers, the bounds of the packed sequences. Sequences are ``num_pairs`` chosen,
            ``num_pairs`` rejected in the same order, then online samples, ``num_generations`` consecutive
            ones a prompt. Without samples the loss is DPO's or IPO's; without pairs, pure online RLOO.
            ``targets`` and ``cu_seqlens`` are read on the host: on the CPU, the call never waits for the GPU.
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
        bias, logit_softcap, logit_scale, temperature: logits are
            ``softcap(logit_scale · (hidden·Wᵀ + bias)) / temperature``, for policy and reference.
        max_chunk_bytes: bound on all temporaries of the call together, in bytes, beside the gradients (a
            16-bit weight's gradient is accumulated in fp32). Larger calls do not use more.
        validate: also check that hidden states and reference log-probs are finite; waits for the GPU.
        impl: "auto" (Triton on CUDA, blockwise torch elsewhere), "triton", "torch", or "reference"
            (eager, full logits: the specification). One that cannot serve the call raises.

    Returns:
        :class:`HypoLoss`. Gradients of hidden, weight and bias are finished in the forward call, so its
        ``loss`` can be differentiated once.

    Raises:
        ValueError: an argument is wrong; the message names it, its value and the fix.
    """
    head = LMHead(lm_head_weight, bias, logit_softcap, logit_scale, temperature)
    checks.inputs(hidden, head, targets, cu_seqlens)
    if hidden.ndim == 2:
        if cu_seqlens is None:
            raise ValueError("cu_seqlens is missing: packed hidden (T, D) needs it to tell its sequences apart")
        checks.sequences(cu_seqlens, len(targets))
    num_sequences = len(targets) if cu_seqlens is None else len(cu_seqlens) - 1
    num_prompts = checks.batch(num_sequences, num_pairs, num_generations)
    checks.objective(
        beta=beta,
        kl_coef=kl_coef,
        length_penalty=length_penalty,
        preference=preference,
        label_smoothing=label_smoothing,
    )
    checks.chunk_budget(max_chunk_bytes)
    checks.one_reference(ref_logps, ref_hidden, hidden, head, ref_lm_head_weight, ref_bias)
    checks.kl_estimator(kl_estimator, ref_hidden)
    ref_head = None
    if ref_logps is not None:
        checks.reference_logps(ref_logps, num_sequences, hidden.device)
    elif ref_hidden is not None:
        own = ref_lm_head_weight is None
        ref_head = replace(
            head,
            weight=lm_head_weight if ref_lm_head_weight is None else ref_lm_head_weight,
            bias=bias if own and ref_bias is None else ref_bias,
        )
        checks.inputs(ref_hidden, ref_head, targets, cu_seqlens, name="ref_")
        checks.same_vocabulary(head, ref_head)
        checks.compute_dtype(ref_hidden, ref_head.weight, name="ref_")
    dtype = checks.compute_dtype(hidden, lm_head_weight)
    impl = checks.implementation(impl, hidden.device, dtype)
    if kl_estimator == "exact" and impl != "reference":
        raise NotImplementedError(f"kl_estimator='exact' with impl={impl!r}: use impl='reference'")
    if validate:
        checks.values_are_finite(hidden=hidden, ref_hidden=ref_hidden, ref_logps=ref_logps)

    order = chunks.group_order(num_sequences, num_pairs)
    in_call_order = chunks.layout(targets, cu_seqlens)
    checks.targets_in_vocabulary(in_call_order, head.vocab_size)
    objective = Objective(
        beta=beta,
        kl_coef=kl_coef,
        length_penalty=length_penalty,
        preference=preference,
        label_smoothing=label_smoothing,
        num_pairs=num_pairs,
        num_generations=num_generations,
        num_prompts=num_prompts,
    )
    device_order = order.to(hidden.device, non_blocking=True)
    call = Call(
        head=head,
        layout=in_call_order.reordered(order),
        objective=objective,
        compute_dtype=dtype,
        impl=impl,
        kl_estimator=kl_estimator,
        max_chunk_bytes=max_chunk_bytes,
        ref_logps=None if ref_logps is None else ref_logps.detach().to(_wide(dtype))[device_order],
        ref_hidden=None if ref_hidden is None else ref_hidden.detach(),
        ref_head=ref_head,
    )
    exact_kl = None
    if kl_estimator == "exact":
        loss, logps, ref, exact_kl = reference.exact_hypo_loss(hidden, call)
    elif impl == "reference":
        loss, logps, ref = reference.hypo_loss(hidden, call)
    else:
        loss, logps, ref = _FusedHypo.apply(hidden, head.weight, head.bias, call, torch.is_grad_enabled())
    logps, ref = (torch.empty_like(x).index_copy_(0, device_order, x) for x in (logps, ref))
    ratio = logps - ref
    chosen, rejected, kl = ratio.split([num_pairs, num_pairs, num_sequences - 2 * num_pairs])
    return HypoLoss(
        loss=loss,
        logps=logps,
        ref_logps=ref,
        chosen_rewards=beta * chosen,
        rejected_rewards=beta * rejected,
        margins=beta * (chosen - rejected),
        kl=kl if exact_kl is None else exact_kl,
        lengths=in_call_order.lengths.to(hidden.device, non_blocking=True),
    )


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


class _FusedHypo(torch.autograd.Function):
    """Loss and log-probs with the gradients finished in forward; backward hands them out, scaled."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, call: Call, grad_enabled: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        # needs_input_grad says which inputs require a gradient, under no_grad too.
        hidden_needed, weight_needed, bias_needed = (grad_enabled and x for x in ctx.needs_input_grad[:3])
        with torch.autocast(hidden.device.type, enabled=False):
            loss, logps, ref_logps, ctx.gradients = schedule.run(
                call, hidden, (hidden_needed, weight_needed, bias_needed)
            )
        ctx.inputs = (hidden.detach(), call.head)
        ctx.mark_non_differentiable(logps, ref_logps)
        return loss, logps, ref_logps

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError(
                "fused_hypo_loss: backward was called twice, but its gradients are handed out once "
                "(they were finished in the forward call); call fused_hypo_loss again"
            )
        gradients, (hidden, head) = ctx.gradients, ctx.inputs
        ctx.gradients = ctx.inputs = None
        return (*gradients.scaled(grad_loss, hidden, head), None, None)
