"""The public function ``fused_hypo_loss``: the loss of HyPO, DPO, IPO and RLOO's KL."""

from __future__ import annotations

from torch import Tensor

from hypo_kernels.call import Extras, Reference
from hypo_kernels.head import LMHead, LoRA
from hypo_kernels.layout import TargetLayout
from hypo_kernels.losses import IPOSum, Sigmoid
from hypo_kernels.objective import Objective
from hypo_kernels.preference import PreferenceLoss, compute
from hypo_kernels.vocab import VocabShard

HypoLoss = PreferenceLoss
PREFERENCES = ("sigmoid", "ipo")


def fused_hypo_loss(
    hidden: Tensor,
    lm_head_weight: Tensor | LMHead,
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
    max_chunk_bytes: int | None = None,
    validate: bool = False,
    impl: str = "auto",
) -> HypoLoss:
    """Compute the HyPO loss and its gradients from hidden states (arXiv 2406.01462, Eq. 7 and Algorithm 1).

        ρ(x, y) = log π(y|x) − log π_ref(y|x)
        loss = −mean over pairs of log σ(β ρ(x, y⁺) − β ρ(x, y⁻)) + kl_coef · KL(π‖π_ref)

    The reverse KL is estimated at trajectory level on samples of the current policy; its gradient is RLOO's:
    with ``r_i = sg(ρ(x, y_i)) + length_penalty · |y_i|`` over the k samples of a prompt,
    ``kl_coef · mean_i (r_i − mean_{j≠i} r_j) ∇log π(y_i|x)``. The value of ``loss`` is the objective, with the mean
    of r_i as the KL term.

    ``kl_estimator="exact"`` estimates the same KL with less noise, by the divergence of the full distributions at
    every position of a sample, ``D_t = KL(π(·|s_t)‖π_ref(·|s_t))``. The value is ``kl_coef`` times the mean over
    samples of ``Σ_t (D_t + length_penalty)``. The gradient is its unbiased estimate: ``∇D_t``, and a score-function
    term with the costs of later tokens (:meth:`.objective.Objective.exact_online`).

    With ``behavior_logps``, another policy μ drew the samples, for example that of earlier optimizer steps. Each
    token's term of the online gradient is then multiplied by a truncated importance weight, a constant:

        w_t = min(π(y_t)/μ(y_t), C)        kl_coef · mean_i (r_i − mean_{j≠i} r_j) Σ_t w_{i,t} ∇log π(y_{i,t})

    with r_i under the *current* policy and C = ``importance_cap`` (Ionides 2008; for language models TIS, Yao et al.
    2025). Where μ is π, every weight is 1 and the gradient is the one without weights. Otherwise the gradient is an
    approximation. For samples of one token, untruncated weights give an unbiased gradient of the reverse KL. For
    longer samples they do not: a weight corrects the choice of its own token, but neither how often μ reaches the
    state before it, nor what μ does after it, which is part of r_i. The weight of the sample, Π_t π(y_t)/μ(y_t),
    would correct both, but its variance grows exponentially with the length. Truncation bounds the variance, and
    gives too little weight to the tokens whose probability has grown most. Values are not weighted: ``loss`` and
    ``kl`` are those of the same samples without ``behavior_logps``, hence means under μ. ``importance`` measures
    how far μ is from π.

    Args:
        hidden: (T, D) packed or (S, L, D) padded, float: final hidden states; row t predicts ``targets[t]``.
        lm_head_weight: (V, D), the dtype of ``hidden`` (any float dtype under autocast); or an :class:`LMHead`
            instead of this and of ``bias``, ``logit_softcap``, ``logit_scale``, ``temperature``, ``lora`` and
            ``vocab_shard``.
        targets: (T,) or (S, L) integers; rows with -100 (prompt, padding) are ignored and cost nothing.
        cu_seqlens: (S+1,) integers, the bounds of the packed sequences. Sequences are ``num_pairs`` chosen,
            ``num_pairs`` rejected in the same order, then online samples, ``num_generations`` consecutive
            ones a prompt. Without samples the loss is DPO's or IPO's; without pairs it is RLOO's.
            ``targets`` and ``cu_seqlens`` are read on the host: if they are on the CPU, the call never waits for the
            GPU. Pass a :class:`TargetLayout` instead of them to capture the call in a CUDA graph.
        num_pairs: P ≥ 0.
        num_generations: k ≥ 2, the number of samples for each prompt.
        ref_logps: (S,) log-probs of the reference model. Give either these or ``ref_hidden``.
        ref_hidden: hidden states of the reference model, of the shape of ``hidden``. Its log-probs are computed with
            ``ref_lm_head_weight`` and ``ref_bias`` (by default the policy's, which must then be frozen).
        beta: β > 0 of DPO and IPO.
        kl_coef: λ ≥ 0; multiplies a sum over tokens, hence as small as 1e-4.
        length_penalty: γ, added to r_i for each token of a sample.
        preference: "sigmoid" (DPO) or "ipo", ``(ρ(x, y⁺) − ρ(x, y⁻) − 1/(2β))²``.
        label_smoothing: in [0, 0.5), the assumed fraction of flipped preferences ("sigmoid" only).
        kl_estimator: "sampled", from the log-probs of the samples, or "exact", from the full distributions at their
            positions, which needs ``ref_hidden``.
        behavior_logps: fp32 or fp64 of the shape of ``targets``: log μ of each target token under the policy that
            drew it, at its temperature. Only the counted rows of online samples are read. Needs
            ``kl_estimator="sampled"``.
        importance_cap: C > 0, the largest importance weight; inf truncates nothing. Below 1, samples of the current
            policy are truncated too.
        bias, logit_softcap, logit_scale, temperature: logits are
            ``softcap(logit_scale · (hidden·Wᵀ + bias)) / temperature``, for policy and reference.
        lora: a low-rank update of the policy's head, ``W + scale·B·A``; ``B·A`` is never computed. The reference's
            head has no update.
        vocab_shard: the part of the vocabulary that weights, biases and B hold on this rank. All other arguments and
            the results are equal on all ranks.
        max_chunk_bytes: bound on all temporaries of the call together, in bytes, without the gradients (a 16-bit
            weight's gradient is accumulated in fp32). Larger calls do not use more. By default 1 GiB, and on CUDA
            1/28 of the device's memory if that is more.
        validate: also check that hidden states and reference log-probs are finite; waits for the GPU.
        impl: "auto" (Triton on CUDA, blockwise torch elsewhere), "triton", "torch", or "reference"
            (eager, full logits: the specification); "triton-rows" and "triton-epilogue" force one of Triton's
            schedules (README). An implementation that does not support the call raises ValueError.

    Returns:
        :class:`HypoLoss`. The forward call finishes the gradients, so ``loss`` can be differentiated once.

    Raises:
        ValueError: an argument is wrong; the message names it, its value and the fix.
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
    if preference not in PREFERENCES:
        raise ValueError(f"preference={preference!r}: must be one of {', '.join(map(repr, PREFERENCES))}")
    if preference == "ipo" and label_smoothing:
        raise ValueError(f"label_smoothing={label_smoothing} goes with preference='sigmoid', got 'ipo'")
    objective = Objective(
        loss=IPOSum(beta) if preference == "ipo" else Sigmoid(beta, label_smoothing=label_smoothing),
        kl_coef=kl_coef,
        num_pairs=num_pairs,
        num_generations=num_generations,
        length_penalty=length_penalty,
        importance_cap=importance_cap,
        kl_estimator=kl_estimator,
    )
    return compute(
        hidden,
        head,
        targets,
        cu_seqlens,
        Reference(ref_logps, ref_hidden, ref_lm_head_weight, ref_bias),
        Extras(behavior_logps=behavior_logps),
        objective,
        {"max_chunk_bytes": max_chunk_bytes, "validate": validate, "impl": impl},
    )
