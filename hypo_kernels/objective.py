"""The HyPO objective on per-sequence log-probabilities: plain torch, used by every implementation.

Notation (arXiv 2406.01462): ``ratio`` is ρ(x, y) = log π(y|x) − log π_ref(y|x), summed over the tokens
that count. Each term returns its value and the derivative of the loss by each sequence's log π(y|x);
a kernel needs nothing else to finish the gradients. The exact estimator of the online term works on rows:
it returns the derivatives by each row's log-prob and by its divergence. Samples of another policy than the
current one have a weight a row, which multiplies their sequence's derivative.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hypo_kernels.statistics import sequence_sums

PREFERENCES = ("sigmoid", "ipo")
KL_ESTIMATORS = ("sampled", "exact")


class Importance(NamedTuple):
    """How far the N online samples are from samples of the current policy π: sums over each one's counted tokens.

    Of the policy μ that drew them, ``π(y_t)/μ(y_t)`` is a token's ratio and ``w_t = min(ratio, C)`` its weight; all
    are 1 where μ is π. Over the n counted tokens of a batch, the mean ratio is ``ratio.sum() / n``, the share of
    truncated tokens ``truncated.sum() / n``, and the effective sample size, as a share of the n tokens,
    ``weight.sum()² / (n · squared_weight.sum())``.
    """

    log_ratio: Tensor  # (N,) log π(y|x) − log μ(y|x), of the sample as a whole
    ratio: Tensor  # (N,) Σ_t π(y_t)/μ(y_t), before truncation
    weight: Tensor  # (N,) Σ_t w_t
    squared_weight: Tensor  # (N,) Σ_t w_t²
    truncated: Tensor  # (N,) tokens whose ratio is above C


class ExactOnline(NamedTuple):
    """The exact estimate of λ KL(π‖π_ref) on the n rows of G groups of k samples, and its derivatives."""

    kl: Tensor  # (G, k) Σ_t D_t
    loss: Tensor  # (G, k) λ (Σ_t D_t + γ|y|) / (G k)
    by_logp: Tensor  # (n,) derivative by each row's log π(a_t|s_t), the divergences held fixed
    by_divergence: float  # derivative by each row's D_t, the same for all


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
    importance_cap: float = 2.0  # C, of the weights of samples that another policy drew

    def pairs(self, chosen_ratio: Tensor, rejected_ratio: Tensor) -> tuple[Tensor, Tensor]:
        """Loss of each pair, already divided by ``num_pairs``, and its derivative by ``chosen_ratio``.

        The derivative by ``rejected_ratio`` is the negative. Both inputs and outputs are (P,).
        """
        delta = chosen_ratio - rejected_ratio
        if self.preference == "ipo":  # Azar et al. 2024; appendix B.1
            error = delta - 1 / (2 * self.beta)
            return error.square() / self.num_pairs, 2 * error / self.num_pairs
        margin = self.beta * delta  # Eq. 4, with label smoothing as in conservative DPO
        loss, slope = -F.logsigmoid(margin), -torch.sigmoid(-margin)
        if flip := self.label_smoothing:
            loss = (1 - flip) * loss - flip * F.logsigmoid(-margin)
            slope = (1 - flip) * slope + flip * torch.sigmoid(margin)
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

    def importance(self, logps: Tensor, behavior_logps: Tensor, lengths: Tensor) -> tuple[Tensor, Importance]:
        """The weight ``w_t = min(π(y_t)/μ(y_t), C)`` of each row of some samples (n,), and the samples' sums.

        ``logps`` and ``behavior_logps`` (n,) are log π and log μ of the rows' tokens, sample after sample;
        ``lengths`` (N,) are the samples' rows. A weight multiplies its sample's derivative by log π(y|x).
        """
        log_ratio = logps - behavior_logps
        ratio = log_ratio.exp()
        weight = ratio.clamp(max=self.importance_cap)  # keeps NaN, and takes an overflow
        truncated = (ratio > self.importance_cap).to(ratio.dtype)
        rows = torch.stack([log_ratio, ratio, weight, weight.square(), truncated], dim=1)
        return weight, Importance(*sequence_sums(rows, lengths).unbind(1))

    def exact_online(self, divergences: Tensor, lengths: Tensor, longest: int) -> ExactOnline:
        """λ · estimate of KL(π‖π_ref) of each sample from the full distributions along it, and its derivatives.

        ``divergences`` (n,) is ``D_t = Σ_v π(v|s_t) (log π(v|s_t) − log π_ref(v|s_t))`` of each counted row, sample
        after sample, in whole groups; ``lengths`` (G·k,) are the samples' rows, on the same device, none above
        ``longest``. Every token costs D_t + γ. The distributions at s_t depend on the parameters, and
        which later tokens there are depends on a_t, so that the gradient has two parts:

            λ/(G k) Σ_i Σ_t [ ∇D_{i,t} + (R_{i,t} − mean_{j≠i} R_{j,t}) ∇log π(a_{i,t}|s_{i,t}) ]

        with the costs to come ``R_t = sg(Σ_{t'>t} (D_{t'} + γ))``, 0 where a sample has ended. The baseline of
        position t knows nothing of sample i, hence unbiased: E[∇log π(a_t|s_t)] = 0 (``docs/exact_kl.md``).
        Nothing here waits for the device, and every sum has one order.
        """
        k, gamma = self.num_generations, self.length_penalty
        kl = sequence_sums(divergences, lengths).view(-1, k)
        scale = self.kl_coef / max(1, self.num_prompts * k)
        loss = scale * (kl + gamma * lengths.view(-1, k).to(kl.dtype))
        place = _Places(lengths, len(divergences))
        to_come = place.sums_after(divergences + gamma, longest)
        return ExactOnline(kl, loss, scale * (to_come - place.mean_of_the_others(to_come, k)), scale)

    def __call__(self, logps: Tensor, ref_logps: Tensor, lengths: Tensor, num_pairs: int) -> tuple[Tensor, Tensor]:
        """Summed loss () and coefficients ∂loss/∂logps (S,) of some whole pairs and groups.

        The S sequences are in group order: ``num_pairs`` times a chosen and its rejected one, then online
        samples, ``num_generations`` consecutive ones a prompt. Any subset of a batch's pairs and groups
        may be passed: the divisors are those of the whole batch.
        """
        ratio = logps - ref_logps
        loss, of_pairs = self._pairs_in_group_order(ratio[: 2 * num_pairs])
        samples = ratio[2 * num_pairs :].view(-1, self.num_generations)
        penalty, advantage = self.online(samples, lengths[2 * num_pairs :].view(samples.shape))
        return loss + penalty.sum(), torch.cat([of_pairs, advantage.flatten()])

    def exact(
        self,
        logps: Tensor,
        ref_logps: Tensor,
        lengths: Tensor,
        num_pairs: int,
        divergences: Tensor,
        longest: int,
    ) -> tuple[Tensor, Tensor, ExactOnline]:
        """The counterpart of a call for the exact estimator: the same sequences, and the samples' rows.

        ``divergences`` (n,) and ``longest`` are :meth:`exact_online`'s, for the samples alone; of ``logps`` and
        ``ref_logps`` (S,) only the pairs' are used. Returns the summed loss (), ∂loss/∂logps of the pairs'
        sequences (2 · num_pairs,), and the online terms, whose loss is part of the sum.
        """
        pairs = 2 * num_pairs
        loss, of_pairs = self._pairs_in_group_order((logps - ref_logps)[:pairs])
        online = self.exact_online(divergences, lengths[pairs:], longest)
        return loss + online.loss.sum(), of_pairs, online

    def _pairs_in_group_order(self, ratio: Tensor) -> tuple[Tensor, Tensor]:
        """Summed loss () and its derivative by ``ratio`` (2P,), each pair's two sequences next to each other."""
        pairs = ratio.view(-1, 2)
        loss, slope = self.pairs(pairs[:, 0], pairs[:, 1])
        return loss.sum(), torch.stack([slope, -slope], dim=1).flatten()


class _Places:
    """Where each of n rows stands: its sequence, its position there, and how many rows follow it there."""

    def __init__(self, lengths: Tensor, num_rows: int) -> None:
        self.lengths = lengths  # (S,)
        self.starts = lengths.cumsum(0) - lengths  # (S,)
        sequences = torch.arange(len(lengths), device=lengths.device)
        self.sequence = sequences.repeat_interleave(lengths, output_size=num_rows)  # (n,)
        self.position = torch.arange(num_rows, device=lengths.device) - self.starts[self.sequence]  # (n,)
        self.following = lengths[self.sequence] - 1 - self.position  # (n,)

    def sums_after(self, rows: Tensor, longest: int) -> Tensor:
        """The sum of the rows that follow each one in its sequence, (n,) -> (n,), by log2(longest) doublings."""
        sums, reach = self._ahead(rows, 1), 1  # sums over the next `reach` rows
        while reach < longest - 1:
            sums, reach = sums + self._ahead(sums, reach), 2 * reach
        return sums

    def mean_of_the_others(self, rows: Tensor, k: int) -> Tensor:
        """The mean of the same position's rows in the k − 1 other sequences of the group, 0 where one has ended."""
        member = self.sequence % k
        shifts = torch.arange(1, k, device=rows.device)
        others = (self.sequence - member)[:, None] + (member[:, None] + shifts) % k  # (n, k − 1)
        there = self.position[:, None] < self.lengths[others]
        index = (self.starts[others] + self.position[:, None]).clamp(max=len(rows) - 1)
        return torch.where(there, rows[index], 0.0).mean(dim=1)

    def _ahead(self, rows: Tensor, distance: int) -> Tensor:
        """The row ``distance`` further on in the same sequence, 0 where it has ended."""
        return torch.where(self.following >= distance, rows.roll(-distance), 0.0)
