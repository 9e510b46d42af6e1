"""The specification: eager torch over full logits, at least fp32, gradients by autograd.

Readable before all else; the other implementations are tested against it. Memory is O(N · V).
"""

from __future__ import annotations

import torch
from torch import Tensor

from hypo_kernels.call import Call, Outcome
from hypo_kernels.layout import TargetLayout
from hypo_kernels.projection import Projection
from hypo_kernels.statistics import sequence_sums


def row_distributions(projection: Projection, layout: TargetLayout, compute_dtype: torch.dtype) -> Tensor:
    """log p of the whole vocabulary at each counted row, (N, V), differentiable: ``log_softmax(h·Wᵀ)``.

    The operands are rounded to ``compute_dtype``, as a GEMM of that dtype would take them; the product
    and everything after it is computed in fp32, or in fp64 for fp64 inputs.
    """
    wide = torch.promote_types(compute_dtype, torch.float32)
    rows = layout.on(projection.hidden.device).rows
    with torch.autocast(projection.hidden.device.type, enabled=False):
        raw = sum(
            features.flatten(0, -2)[rows].to(compute_dtype).to(wide) @ matrix.to(compute_dtype).to(wide).t()
            for features, matrix in projection.terms()
        )
        assert isinstance(raw, Tensor)
        return projection.head.logits(raw).log_softmax(dim=-1)


def logprobs_and_entropies(log_p: Tensor, layout: TargetLayout) -> tuple[Tensor, Tensor]:
    """(N,) each of log-distributions (N, V)."""
    return _of_targets(log_p, layout), -(log_p.exp() * log_p).sum(dim=-1)


def hypo_loss(call: Call) -> Outcome:
    """The loss (), differentiable, and what it saw, in group order.

    The value is the objective's; the gradient is Σ coefficient · ∇log π, the coefficients held fixed, each token's
    part times its importance weight where another policy drew the samples.
    """
    if call.kl_estimator == "exact":
        return _exact_hypo_loss(call)
    log_p = row_distributions(call.policy, call.layout, call.compute_dtype)
    rows = _of_targets(log_p, call.layout)
    logps = _of_sequences(rows, call)
    ref_logps = call.ref_logps
    if call.ref is not None:
        log_q = row_distributions(call.ref, call.layout, call.compute_dtype).detach()
        ref_logps = _of_sequences(_of_targets(log_q, call.layout), call)
    assert ref_logps is not None
    num_pairs, lengths = call.objective.num_pairs, call.layout.lengths.to(log_p.device)
    loss, coefficients = call.objective(logps.detach(), ref_logps, lengths, num_pairs)
    importance, weighted = None, logps
    if call.behavior_logps is not None:
        online = slice(call.layout.num_rows(2 * num_pairs), None)
        weights, importance = call.objective.importance(
            rows[online].detach(), call.behavior_logps[online], lengths[2 * num_pairs :]
        )
        weighted = _of_sequences(torch.cat([rows[: online.start], weights * rows[online]]), call)
    surrogate = (coefficients * weighted).sum()
    logps = logps.detach()
    kl = (logps - ref_logps)[2 * num_pairs :]
    return Outcome(loss + surrogate - surrogate.detach(), logps, ref_logps, kl, importance)


def _exact_hypo_loss(call: Call) -> Outcome:
    """:func:`hypo_loss` with the exact estimator.

    The gradient is Σ coefficient · ∇log π of the pairs' sequences and of the samples' rows, plus that of the
    rows' divergences D = KL(π(·|s)‖π_ref(·|s)), by autograd.
    """
    assert call.ref is not None
    log_p = row_distributions(call.policy, call.layout, call.compute_dtype)
    log_q = row_distributions(call.ref, call.layout, call.compute_dtype).detach()
    rows, ref_rows = _of_targets(log_p, call.layout), _of_targets(log_q, call.layout)
    logps, ref_logps = _of_sequences(rows, call), _of_sequences(ref_rows, call)
    num_pairs, lengths = call.objective.num_pairs, call.layout.lengths
    online = slice(call.layout.num_rows(2 * num_pairs), None)
    divergences = (log_p[online].exp() * (log_p[online] - log_q[online])).sum(dim=-1)
    loss, of_pairs, terms = call.objective.exact(
        logps.detach(),
        ref_logps,
        lengths.to(log_p.device),
        num_pairs,
        divergences.detach(),
        longest=int(lengths.max()),
    )
    surrogate = (of_pairs * logps[: 2 * num_pairs]).sum()
    surrogate = surrogate + (terms.by_logp * rows[online]).sum() + terms.by_divergence * divergences.sum()
    return Outcome(loss + surrogate - surrogate.detach(), logps.detach(), ref_logps, terms.kl.flatten())


def _of_targets(log_p: Tensor, layout: TargetLayout) -> Tensor:
    return log_p.gather(1, layout.on(log_p.device).targets[:, None]).squeeze(1)


def _of_sequences(rows: Tensor, call: Call) -> Tensor:
    return sequence_sums(rows, call.layout.on(rows.device).lengths)
