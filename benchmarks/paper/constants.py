"""Compute what the paper's theorems speak about: the objective J, errors of rewards, and coverage constants.

There are no prompts and K responses, so every expectation is a sum. The text that this follows has lost the paper's
formulas: "reading" marks what was restored from the sentences around them. Tensors are (..., K), in float64.
"""

from __future__ import annotations

import torch
from torch import Tensor


def objective(log_pi: Tensor, rewards: Tensor, log_ref: Tensor, *, beta: float) -> Tensor:
    """Return J(π) = E_π[r] − β KL(π‖π_ref), (...), Eq. 1. A response with π = 0 adds nothing."""
    pi = log_pi.exp()
    return torch.where(pi > 0, pi * (rewards - beta * (log_pi - log_ref)), 0.0).sum(-1)


def optimal(rewards: Tensor, log_ref: Tensor, *, beta: float) -> Tensor:
    """Return log π (..., K) of the policy with the largest J: π ∝ π_ref exp(r / β)."""
    return (log_ref + rewards / beta).log_softmax(-1)


def gap(log_pi: Tensor, rewards: Tensor, log_ref: Tensor, *, beta: float) -> Tensor:
    """Return J(π*) − J(π), (...), which is β KL(π‖π*)."""
    pi, log_best = log_pi.exp(), optimal(rewards, log_ref, beta=beta)
    return beta * torch.where(pi > 0, pi * (log_pi - log_best), 0.0).sum(-1)


def implicit_rewards(log_pi: Tensor, log_ref: Tensor, *, beta: float) -> Tensor:
    """Return the reward (..., K) that π is optimal for, up to a constant: β log(π / π_ref)."""
    return beta * (log_pi - log_ref)


def pair_error(errors: Tensor, log_probs: Tensor) -> Tensor:
    """Return E[(e(y) − e(y′))²], (...), over two independent responses y and y′ of a distribution.

    The error is e = r* − r̂. This is the in-distribution error ε of Lemma A.2 (reading). A constant added to r̂ does not
    change it. With the best constant it is twice the error of Assumption 4.3.
    """
    p = log_probs.exp()
    return 2 * (p * (errors - (p * errors).sum(-1, keepdim=True)).square()).sum(-1)


def global_coverage(log_ref: Tensor) -> Tensor:
    """Return C_glo (...), the largest π / π_ref of any policy (Assumption 4.1)."""
    return (-log_ref).amax(-1).exp()


def realised_coverage(log_pi: Tensor, log_ref: Tensor) -> Tensor:
    """Return the largest π / π_ref, (...), of one policy."""
    return (log_pi - log_ref).amax(-1).exp()


def local_coverage(log_ref: Tensor, kl: Tensor | float) -> Tensor:
    """Return C_KL (...), the largest π / π_ref of any policy with KL(π‖π_ref) ≤ ``kl`` nats (Assumption 4.2)."""
    return (heaviest(log_ref, kl).log() - log_ref).amax(-1).exp()


def heaviest(log_ref: Tensor, kl: Tensor | float) -> Tensor:
    """Return (..., K): for each response alone, the most mass of a policy with KL(π‖π_ref) ≤ ``kl`` nats.

    Such a policy keeps the reference's proportions among the other responses. So the mass q of a response with the
    reference's mass p solves q log(q/p) + (1 − q) log((1 − q)/(1 − p)) = ``kl``, or is 1.
    """
    kl = torch.as_tensor(kl, dtype=log_ref.dtype)
    limit = kl[..., None] if kl.dim() else kl
    low, high = log_ref.exp(), torch.ones_like(log_ref)
    log_others = torch.log1p(-low)
    for _ in range(80):  # halvings of an interval within [0, 1]
        q = (low + high) / 2
        inside = torch.special.xlogy(q, q) - q * log_ref + torch.special.xlogy(1 - q, 1 - q) - (1 - q) * log_others
        low, high = torch.where(inside <= limit, q, low), torch.where(inside <= limit, high, q)
    return torch.where(-log_ref <= limit, 1.0, low)


def linear_coverage(features: Tensor, shares: Tensor) -> Tensor:
    """Return the coverage (...) of linear rewards by pairs: max over y, y′ of ‖φ(y) − φ(y′)‖ in the metric of Σ⁻¹.

    Σ is the mean of (φ(i) − φ(j))(φ(i) − φ(j))ᵀ over the pairs. ``features`` is (..., K, F), ``shares`` (..., n, n) are
    the shares of the pairs of the first n responses. No error of a linear reward on a pair of all responses is above
    this times the root of its mean squared error on the data's pairs. It is infinite where the data leaves a difference
    of two responses open. (Section 6 speaks of φᵀΣ⁻¹φ; a preference sees differences only.)
    """
    n = shares.shape[-1]
    of_pairs = (features[..., :n, None, :] - features[..., None, :n, :]).flatten(-3, -2)
    sigma = of_pairs.mT @ (shares.flatten(-2)[..., None] * of_pairs)
    of_all = (features[..., :, None, :] - features[..., None, :, :]).flatten(-3, -2)
    pseudo = torch.linalg.pinv(sigma, hermitian=True, rtol=1e-10)
    squares = ((of_all @ pseudo) * of_all).sum(-1)
    outside = (of_all - of_all @ (pseudo @ sigma)).abs().amax((-2, -1)) > 1e-6
    return torch.where(outside, torch.inf, squares.amax(-1).sqrt())
