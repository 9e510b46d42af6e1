"""The public function ``fused_preference_loss``: any loss of pairs and groups of samples, and its result."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hypo_kernels import gemm, losses, ops, reference, schedule
from hypo_kernels.call import Extras, LossOutput, Reference, prepare
from hypo_kernels.gradients import Leaves
from hypo_kernels.head import LMHead
from hypo_kernels.layout import TargetLayout
from hypo_kernels.objective import Importance, Objective
from hypo_kernels.pairs import NOTHING, GroupLoss, PairLoss
from hypo_kernels.projection import Projection


class PreferenceLoss(NamedTuple):
    """The loss, to call ``backward()`` on, and its statistics: detached, fp32 (fp64 for fp64 inputs), in nats.

    The S sequences are P chosen, P rejected, then N online samples, in the order of the call.
    """

    loss: Tensor  # (), the whole objective
    logps: Tensor  # (S,) log π(y|x)
    ref_logps: Tensor  # (S,) log π_ref(y|x); 0 if the call has no reference
    chosen_rewards: Tensor  # (P,) β (log π − log π_ref) of the chosen sequences
    rejected_rewards: Tensor  # (P,) β (log π − log π_ref) of the rejected sequences
    margins: Tensor  # (P,) chosen_rewards − rejected_rewards
    kl: Tensor  # (N,) of each sample; the mean estimates the trajectory's KL(π‖π_ref). With the estimator "sampled" it
    # is log π − log π_ref, with "exact" the sum of KL(π‖π_ref) over the sample's positions
    lengths: Tensor  # (S,) int64, counted tokens
    importance: Importance | None = None  # (N,) each, if ``behavior_logps`` are given


def fused_preference_loss(
    hidden: Tensor,
    lm_head: Tensor | LMHead,
    targets: Tensor | TargetLayout,
    cu_seqlens: Tensor | None = None,
    *,
    loss: PairLoss | str,
    num_pairs: int,
    pair_tensors: Mapping[str, Tensor] = NOTHING,
    token_weights: Tensor | None = None,
    ref_logps: Tensor | None = None,
    ref_hidden: Tensor | None = None,
    ref_lm_head_weight: Tensor | None = None,
    ref_bias: Tensor | None = None,
    num_generations: int = 2,
    group_loss: GroupLoss | None = None,
    sample_tensors: Mapping[str, Tensor] = NOTHING,
    kl_coef: float = 0.0,
    length_penalty: float = 0.0,
    kl_estimator: str = "sampled",
    behavior_logps: Tensor | None = None,
    importance_cap: float = 2.0,
    max_chunk_bytes: int | None = None,
    validate: bool = False,
    impl: str = "auto",
) -> PreferenceLoss:
    """Compute any loss of preference pairs, and of groups of samples, with its gradients from hidden states.

        mean over pairs of loss(pair) + mean over groups of group_loss(group) + kl_coef · KL(π‖π_ref)

    The loss of a pair is a function of its log-probs, so its gradient needs the logits once: 6 NVD with a trained head,
    4 with a frozen one, NVD = counted rows × V × D. Logits are held for one chunk at a time. The KL term is HyPO's
    online half, for which online samples come after the pairs (:func:`~hypo_kernels.fused_hypo_loss` describes it and
    the arguments that are not listed here).

    Args:
        hidden: (T, D) packed or (S, L, D) padded, float: final hidden states; row t predicts ``targets[t]``.
        lm_head: (V, D), the dtype of ``hidden`` (any float dtype under autocast); or an :class:`LMHead` with a bias, a
            softcap, LoRA matrices or a vocabulary shard.
        targets: (T,) or (S, L) integers; rows with -100 (prompt, padding) are ignored and cost nothing.
        cu_seqlens: (S+1,) integers, the bounds of the packed sequences: ``num_pairs`` chosen, ``num_pairs`` rejected in
            the same order, then online samples, ``num_generations`` consecutive ones a prompt.
        loss: the name of a loss of :mod:`hypo_kernels.losses` with its default parameters, one of its objects, or your
            own: a function of :class:`~hypo_kernels.pairs.Pairs` that returns a loss for each pair, in plain torch.
            Derivatives come from autograd on these (P,) tensors. At the first call with a loss of your own, four pairs
            check that no pair's loss depends on another pair. To reuse compiled code, pass the same object each time.
        num_pairs: P ≥ 0.
        pair_tensors: constants (P,) by name, which the loss reads as ``pairs.tensors``: margins, scores. The name
            ``weights`` multiplies the loss of each pair, whatever the loss.
        token_weights: float of the shape of ``targets``; a pair's log-probs are sums weighted by it, those of π and,
            from ``ref_hidden``, of π_ref (LD-DPO, arXiv 2409.06411). Rows of online samples are not weighted.
        ref_logps: (S,) log-probs of the reference model. Give these or ``ref_hidden``; or neither, if the loss has
            ``needs_reference = False`` and there are no samples.
        ref_hidden: hidden states of the reference model, of the shape of ``hidden``.
        group_loss: a function of :class:`~hypo_kernels.pairs.Groups` that returns a loss for each prompt's samples.
        sample_tensors: constants (N,) by name, one value for each sample, which ``group_loss`` reads as
            ``groups.tensors``: rewards, advantages.
        kl_coef: λ ≥ 0.

    Returns:
        :class:`PreferenceLoss`. The forward call finishes the gradients, so ``loss`` can be differentiated once.

    Raises:
        ValueError: an argument is wrong, or the loss is no loss of single pairs; the message names it and the fix.
    """
    objective = Objective(
        loss=losses.by_name(loss) if isinstance(loss, str) else loss,
        kl_coef=kl_coef,
        num_pairs=num_pairs,
        num_generations=num_generations,
        length_penalty=length_penalty,
        group_loss=group_loss,
        importance_cap=importance_cap,
        kl_estimator=kl_estimator,
    )
    return compute(
        hidden,
        lm_head if isinstance(lm_head, LMHead) else LMHead(lm_head),
        targets,
        cu_seqlens,
        Reference(ref_logps, ref_hidden, ref_lm_head_weight, ref_bias),
        Extras(pair_tensors, sample_tensors, token_weights, behavior_logps),
        objective,
        {"max_chunk_bytes": max_chunk_bytes, "validate": validate, "impl": impl},
    )


def compute(
    hidden: Tensor,
    head: LMHead,
    targets: Tensor | TargetLayout,
    cu_seqlens: Tensor | None,
    reference_arguments: Reference,
    extras: Extras,
    objective: Objective,
    settings: dict[str, Any],
) -> PreferenceLoss:
    """Compute an objective; ``settings`` are those of :func:`.call.prepare`. Raises ValueError on wrong arguments."""
    if torch.compiler.is_compiling():
        output, lengths = ops.hypo_loss(
            hidden, head, targets, cu_seqlens, reference_arguments, extras, objective, settings
        )
    else:
        policy = Projection.of(hidden, head)
        call = prepare(policy, targets, cu_seqlens, reference_arguments, extras, objective, **settings)
        if call.impl == "reference":
            output = reference.hypo_loss(call)
        else:
            output = LossOutput(*_Fused.apply(*Leaves.of(policy), call, torch.is_grad_enabled()))
        output, lengths = call.in_call_order(output), call.lengths
    beta, num_pairs = getattr(objective.loss, "beta", 1.0), objective.num_pairs
    chosen, rejected = (output.logps - output.ref_logps)[: 2 * num_pairs].view(2, num_pairs)
    return PreferenceLoss(
        loss=output.loss,
        logps=output.logps,
        ref_logps=output.ref_logps,
        chosen_rewards=beta * chosen,
        rejected_rewards=beta * rejected,
        margins=beta * (chosen - rejected),
        kl=output.kl,
        lengths=lengths,
        importance=output.importance,
    )


class _Fused(torch.autograd.Function):
    """Compute a :class:`LossOutput` and its gradients in forward. Backward multiplies them by the upstream gradient."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor | Importance | None, ...]:
        *leaves, call, grad_enabled = args
        # needs_input_grad is true for inputs that require a gradient, even under no_grad.
        needed = [grad_enabled and x for x in ctx.needs_input_grad[: len(leaves)]]
        with gemm.undisturbed(call.policy.hidden.device):
            output, ctx.gradients = schedule.run(call, needed)
        ctx.mark_non_differentiable(output.logps, output.ref_logps, output.kl)
        return tuple(output)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError(
                "backward was called twice, but the gradients that the forward call finished can be used once; call "
                "the fused loss again"
            )
        gradients, ctx.gradients = ctx.gradients, None
        return (*gradients.scaled(grad_loss), None, None)
