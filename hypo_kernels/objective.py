"""The HyPO objective on per-sequence log-probabilities: plain torch, used by every implementation.

Notation (arXiv 2406.01462): ``ratio`` is ρ(x, y) = log π(y|x) − log π_ref(y|x), summed over the tokens
that count. Each term returns its value and the derivative of the loss by each sequence's log π(y|x);
a kernel needs nothing else to finish the gradients.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

PREFERENCES = ("sigmoid", "ipo")


@dataclass(frozen=True)
class Objective:
    """``mean over pairs of the preference loss + kl_coef · reverse KL``, with its batch sizes."""

    beta: float
    kl_coef: float
    length_penalty: float
    preference: str
    label_smoothing: float
    num_pairs: int
    num_generations: int
    num_prompts: int  # groups of `num_generations` online samples

    def pairs(self, chosen_ratio: Tensor, rejected_ratio: Tensor) -> tuple[Tensor, Tensor]:
        """Loss of each pair, already divided by ``num_pairs``, and its derivative by ``chosen_ratio``.

        The derivative by ``rejected_ratio`` is the negative. Both inputs and outputs are (P,).
        """
        delta = chosen_ratio - rejected_ratio
        if self.preference == "ipo":  # Azar et al. 2024; appendix B.1
            error = delta - 1 / (2 * self.beta)
            return error.square() / self.num_pairs, 2 * error / self.num_pairs
        margin = self.beta * delta  # Eq. 4, with label smoothing as in conservative DPO
        flip = self.label_smoothing
        loss = -(1 - flip) * F.logsigmoid(margin) - flip * F.logsigmoid(-margin)
        slope = flip * torch.sigmoid(margin) - (1 - flip) * torch.sigmoid(-margin)
        return loss / self.num_pairs, self.beta * slope / self.num_pairs

    def online(self, ratio: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """λ · estimate of KL(π‖π_ref) of each sample, and its RLOO derivative by log π(y|x).

        ``ratio`` and ``lengths`` are (G, k), one row a prompt. With the penalty
        ``r_i = sg(ρ_i) + γ|y_i|`` the derivative is ``λ (r_i − mean_{j≠i} r_j) / (G k)``
        (Algorithm 1; Kool et al. 2019): unbiased because E[∇ log π] = 0.
        """
        k = self.num_generations
        penalty = ratio + self.length_penalty * lengths.to(ratio.dtype)
        baseline = (penalty.sum(dim=1, keepdim=True) - penalty) / (k - 1)
        scale = self.kl_coef / max(1, self.num_prompts * k)  # a batch without samples has nothing to divide
        return scale * penalty, scale * (penalty - baseline)

    def __call__(self, logps: Tensor, ref_logps: Tensor, lengths: Tensor, num_pairs: int) -> tuple[Tensor, Tensor]:
        """Summed loss () and coefficients ∂loss/∂logps (S,) of some whole pairs and groups.

        The S sequences are in group order: ``num_pairs`` times a chosen and its rejected one, then online
        samples, ``num_generations`` consecutive ones a prompt. Any subset of a batch's pairs and groups
        may be passed: the divisors are those of the whole batch.
        """
        ratio = logps - ref_logps
        pairs, samples = (
            ratio[: 2 * num_pairs].view(-1, 2),
            ratio[2 * num_pairs :].view(-1, self.num_generations),
        )
        loss, slope = self.pairs(pairs[:, 0], pairs[:, 1])
        penalty, advantage = self.online(samples, lengths[2 * num_pairs :].view(samples.shape))
        coefficients = torch.cat([torch.stack([slope, -slope], dim=1).flatten(), advantage.flatten()])
        return loss.sum() + penalty.sum(), coefficients
