"""The specification: eager torch over full logits, at least fp32, gradients by autograd.

Readable before all else; the other implementations are tested against it. Memory is O(N · V).
"""

from __future__ import annotations

import torch
from torch import Tensor

from hypo_kernels.call import Call
from hypo_kernels.chunks import Layout
from hypo_kernels.head import LMHead


def row_logprobs(hidden: Tensor, head: LMHead, layout: Layout, compute_dtype: torch.dtype) -> Tensor:
    """log p(target) of each counted row, (N,), differentiable: ``log_softmax(h·Wᵀ)[target]``."""
    return _of_targets(row_distributions(hidden, head, layout, compute_dtype), layout)


def row_distributions(hidden: Tensor, head: LMHead, layout: Layout, compute_dtype: torch.dtype) -> Tensor:
    """log p of the whole vocabulary at each counted row, (N, V), differentiable: ``log_softmax(h·Wᵀ)``.

    The operands are rounded to ``compute_dtype``, as a GEMM of that dtype would take them; the product
    and everything after it is computed in fp32, or in fp64 for fp64 inputs.
    """
    wide = torch.promote_types(compute_dtype, torch.float32)
    rows = layout.rows.to(hidden.device)
    with torch.autocast(hidden.device.type, enabled=False):
        x = hidden.reshape(-1, hidden.shape[-1])[rows].to(compute_dtype).to(wide)
        logits = head.logits(x @ head.weight.to(compute_dtype).to(wide).t())
        return logits.log_softmax(dim=-1)


def hypo_loss(hidden: Tensor, call: Call) -> tuple[Tensor, Tensor, Tensor]:
    """The loss (), differentiable, and the policy's and reference's log-probs, (S,) each, in group order.

    The value is the objective's; the gradient is Σ coefficient · ∇log π, the coefficients held fixed.
    """
    logps = _of_sequences(row_logprobs(hidden, call.head, call.layout, call.compute_dtype), call)
    ref_logps = call.ref_logps
    if call.ref_hidden is not None and call.ref_head is not None:
        rows = row_logprobs(call.ref_hidden, call.ref_head, call.layout, call.compute_dtype)
        ref_logps = _of_sequences(rows, call).detach()
    assert ref_logps is not None
    lengths = call.layout.lengths.to(hidden.device)
    loss, coefficients = call.objective(logps.detach(), ref_logps, lengths, call.objective.num_pairs)
    surrogate = (coefficients * logps).sum()
    return loss + surrogate - surrogate.detach(), logps.detach(), ref_logps


def exact_hypo_loss(hidden: Tensor, call: Call) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """:func:`hypo_loss` with the exact estimator, and its KL of each sample, (G·k,).

    The gradient is Σ coefficient · ∇log π of the pairs' sequences and of the samples' rows, plus that of the
    rows' divergences D = KL(π(·|s)‖π_ref(·|s)), by autograd.
    """
    assert call.ref_hidden is not None
    assert call.ref_head is not None
    log_p = row_distributions(hidden, call.head, call.layout, call.compute_dtype)
    log_q = row_distributions(call.ref_hidden, call.ref_head, call.layout, call.compute_dtype).detach()
    rows, ref_rows = _of_targets(log_p, call.layout), _of_targets(log_q, call.layout)
    logps, ref_logps = _of_sequences(rows, call), _of_sequences(ref_rows, call)
    num_pairs, lengths = call.objective.num_pairs, call.layout.lengths
    online = slice(int(lengths[: 2 * num_pairs].sum()), None)
    divergences = (log_p[online].exp() * (log_p[online] - log_q[online])).sum(dim=-1)
    loss, of_pairs, terms = call.objective.exact(
        logps.detach(),
        ref_logps,
        lengths.to(hidden.device),
        num_pairs,
        divergences.detach(),
        longest=int(lengths.max()),
    )
    surrogate = (of_pairs * logps[: 2 * num_pairs]).sum()
    surrogate = surrogate + (terms.by_logp * rows[online]).sum() + terms.by_divergence * divergences.sum()
    return loss + surrogate - surrogate.detach(), logps.detach(), ref_logps, terms.kl.flatten()


def _of_targets(log_p: Tensor, layout: Layout) -> Tensor:
    return log_p.gather(1, layout.targets.to(log_p.device)[:, None]).squeeze(1)


def _of_sequences(rows: Tensor, call: Call) -> Tensor:
    return torch.stack([part.sum() for part in rows.split(call.layout.lengths.tolist())])
