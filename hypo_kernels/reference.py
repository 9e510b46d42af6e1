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
    """log p(target) of each counted row, (N,), differentiable: ``log_softmax(h·Wᵀ)[target]``.

    The operands are rounded to ``compute_dtype``, as a GEMM of that dtype would take them; the product
    and everything after it is computed in fp32, or in fp64 for fp64 inputs.
    """
    wide = torch.promote_types(compute_dtype, torch.float32)
    rows = layout.rows.to(hidden.device)
    with torch.autocast(hidden.device.type, enabled=False):
        x = hidden.reshape(-1, hidden.shape[-1])[rows].to(compute_dtype).to(wide)
        logits = head.logits(x @ head.weight.to(compute_dtype).to(wide).t())
        targets = layout.targets.to(hidden.device)
        return logits.log_softmax(dim=-1).gather(1, targets[:, None]).squeeze(1)


def hypo_loss(hidden: Tensor, call: Call) -> tuple[Tensor, Tensor, Tensor]:
    """The loss (), differentiable, and the policy's and reference's log-probs, (S,) each, in group order.

    The value is the objective's; the gradient is Σ coefficient · ∇log π, the coefficients held fixed.
    """
    logps = _sequence_logprobs(hidden, call.head, call)
    ref_logps = call.ref_logps
    if call.ref_hidden is not None and call.ref_head is not None:
        ref_logps = _sequence_logprobs(call.ref_hidden, call.ref_head, call).detach()
    assert ref_logps is not None
    lengths = call.layout.lengths.to(hidden.device)
    loss, coefficients = call.objective(logps.detach(), ref_logps, lengths, call.objective.num_pairs)
    surrogate = (coefficients * logps).sum()
    return loss + surrogate - surrogate.detach(), logps.detach(), ref_logps


def _sequence_logprobs(hidden: Tensor, head: LMHead, call: Call) -> Tensor:
    rows = row_logprobs(hidden, head, call.layout, call.compute_dtype)
    return torch.stack([part.sum() for part in rows.split(call.layout.lengths.tolist())])
