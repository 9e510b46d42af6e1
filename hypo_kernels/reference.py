"""The specification: eager torch over full logits, in at least fp32, with gradients by autograd.

It is written for readers; the other implementations are tested against it. Memory is O(N · V).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hypo_kernels.call import Call, LossOutput
from hypo_kernels.layout import TargetLayout
from hypo_kernels.projection import Projection
from hypo_kernels.statistics import sequence_sums


def row_distributions(projection: Projection, layout: TargetLayout, compute_dtype: torch.dtype) -> Tensor:
    """Return log p of the full vocabulary at each counted row, (N, V), differentiable: ``log_softmax(h·Wᵀ)``.

    The operands are rounded to ``compute_dtype``, as for a GEMM of that dtype. All later computation is in fp32, or in
    fp64 for fp64 inputs.
    """
    accumulator_dtype = torch.promote_types(compute_dtype, torch.float32)
    rows = layout.on(projection.hidden.device).rows
    with torch.autocast(projection.hidden.device.type, enabled=False):
        raw = sum(
            features.flatten(0, -2)[rows].to(compute_dtype).to(accumulator_dtype)
            @ matrix.to(compute_dtype).to(accumulator_dtype).t()
            for features, matrix in projection.terms()
        )
        assert isinstance(raw, Tensor)
        return projection.head.logits(raw).log_softmax(dim=-1)


def logprobs_and_entropies(log_p: Tensor, layout: TargetLayout) -> tuple[Tensor, Tensor]:
    """Return the targets' log-probs (N,) and the entropies (N,) of log-distributions (N, V)."""
    return _target_logps(log_p, layout), -(log_p.exp() * log_p).sum(dim=-1)


def hypo_loss(call: Call) -> LossOutput:
    """Return the loss (), differentiable, and its statistics, in group order.

    The value is the objective's. The gradient is Σ coefficient · ∇log π with constant coefficients; where another
    policy drew the samples, each token's term is multiplied by its importance weight.
    """
    if call.objective.is_exact:
        return _exact_hypo_loss(call)
    log_p = row_distributions(call.policy, call.layout, call.compute_dtype)
    rows = _target_logps(log_p, call.layout)
    logps = _sequence_logps(rows, call)
    ref_logps = call.ref_logps
    if call.ref is not None:
        log_q = row_distributions(call.ref, call.layout, call.compute_dtype).detach()
        ref_logps = _sequence_logps(_target_logps(log_q, call.layout), call)
    assert ref_logps is not None
    num_pairs, lengths = call.objective.num_pairs, call.layout.lengths.to(log_p.device)
    everything = slice(0, len(lengths))
    loss, coefficients = call.objective(logps.detach(), ref_logps, lengths, num_pairs, *call.tensors_of(everything))
    importance, weighted = None, logps
    if call.behavior_logps is not None:
        online = slice(call.layout.num_rows(2 * num_pairs), None)
        weights, importance = call.objective.importance(
            rows[online].detach(), call.behavior_logps[online], lengths[2 * num_pairs :]
        )
        weighted = _sequence_logps(torch.cat([rows[: online.start], weights * rows[online]]), call)
    surrogate = (coefficients * weighted).sum()
    logps = logps.detach()
    kl = (logps - ref_logps)[2 * num_pairs :]
    return LossOutput(loss + surrogate - surrogate.detach(), logps, ref_logps, kl, importance)


def _exact_hypo_loss(call: Call) -> LossOutput:
    """Return :func:`hypo_loss` with the exact KL estimator.

    The gradient is Σ coefficient · ∇log π of the pairs' sequences and of the samples' rows, plus that of the rows'
    divergences D = KL(π(·|s)‖π_ref(·|s)), by autograd.
    """
    assert call.ref is not None
    log_p = row_distributions(call.policy, call.layout, call.compute_dtype)
    log_q = row_distributions(call.ref, call.layout, call.compute_dtype).detach()
    rows, ref_rows = _target_logps(log_p, call.layout), _target_logps(log_q, call.layout)
    logps, ref_logps = _sequence_logps(rows, call), _sequence_logps(ref_rows, call)
    num_pairs, lengths = call.objective.num_pairs, call.layout.lengths
    online = slice(call.layout.num_rows(2 * num_pairs), None)
    divergences = (log_p[online].exp() * (log_p[online] - log_q[online])).sum(dim=-1)
    loss, pair_slopes, terms = call.objective.exact(
        logps.detach(),
        ref_logps,
        lengths.to(log_p.device),
        num_pairs,
        divergences.detach(),
        int(lengths.max()),
        *call.tensors_of(slice(0, len(lengths))),
    )
    surrogate = (pair_slopes * logps[: 2 * num_pairs]).sum()
    surrogate = surrogate + (terms.by_logp * rows[online]).sum() + terms.by_divergence * divergences.sum()
    return LossOutput(loss + surrogate - surrogate.detach(), logps.detach(), ref_logps, terms.kl.flatten())


def _target_logps(log_p: Tensor, layout: TargetLayout) -> Tensor:
    """Return the targets' log-probs (N,) of log-distributions (N, V), as ``−softplus(lse_others − log p_y)``.

    It equals log p_y. But of a target with p_y near 1, log-softmax keeps only what the sum of all exponentials, rounded
    at 1, has kept: the sum of the others is exact, and so is the gradient p_y − 1.
    """
    targets = layout.on(log_p.device).targets[:, None]
    others = log_p.scatter(1, targets, -1e30)  # finite: for a vocabulary of one, logsumexp of −inf has no gradient
    return F.logsigmoid(log_p.gather(1, targets).squeeze(1) - others.logsumexp(dim=1))


def _sequence_logps(rows: Tensor, call: Call) -> Tensor:
    weighted = call.weighted(rows, slice(0, len(rows)))
    return sequence_sums(weighted, call.layout.on(rows.device).lengths)
