"""The loss types of Liger's DPO loss, computed by Liger's own equations on log-probs of sequences.

So the truth of these workloads is Liger's definition in float64, whoever is compared with it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# Liger 0.8.5 has these; "ipo" is among its names, but raises.
LOSS_TYPES = (
    "sigmoid", "hinge", "robust", "exo_pair", "nca_pair", "bco_pair", "sppo_hard", "apo_zero", "apo_down", "discopop",
)  # fmt: skip
SMOOTHING = {"robust": 0.1, "exo_pair": 1e-3}  # EXO needs one; its paper recommends this


def options(loss_type: str) -> dict[str, Any]:
    """Return the arguments of ``LigerFusedLinearDPOLoss`` for a loss type."""
    return {"loss_type": loss_type, "label_smoothing": SMOOTHING.get(loss_type, 0.0)}


def loss_and_coefficients(loss_type: str, logps: Tensor, ref_logps: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """Return the loss () of P pairs and its derivative by each log-prob, (2 P,): chosen, then rejected."""
    from liger_kernel.chunked_loss.dpo_loss import LigerFusedLinearDPOFunction

    with torch.enable_grad():
        leaf = logps.detach().requires_grad_()
        pairs = leaf.chunk(2)
        loss, *_ = LigerFusedLinearDPOFunction.preference_loss_fn(
            *pairs, leaf, *ref_logps.chunk(2), beta=beta, **options(loss_type)
        )
        (slope,) = torch.autograd.grad(loss, leaf)
    return loss.detach(), slope
