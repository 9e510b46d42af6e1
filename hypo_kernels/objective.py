"""A preference loss with HyPO's online KL, on per-sequence log-probabilities: plain torch, for every implementation.

Notation (arXiv 2406.01462): ``ratio`` is ρ(x, y) = log π(y|x) − log π_ref(y|x), summed over the counted tokens.
Each term returns its value and the derivative of the loss by each sequence's log π(y|x); from these a kernel computes
the gradients. The exact KL estimator works on rows: it returns the derivatives by each row's log-prob and by its
divergence. If another policy drew the samples, each row has an importance weight, which multiplies the derivative of
its sequence.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from hypo_kernels.errors import require
from hypo_kernels.losses import needs_reference, wants_batch
from hypo_kernels.pairs import NOTHING, GroupLoss, Groups, PairLoss, Pairs, check_closed, group_terms, pair_terms
from hypo_kernels.statistics import sequence_sums

KL_ESTIMATORS = ("sampled", "exact")


class Importance(NamedTuple):
    """The distance of π from the policy μ that drew the N online samples, as sums over each sample's counted tokens.

    A token's ratio is ``π(y_t)/μ(y_t)`` and its weight ``w_t = min(ratio, C)``; both are 1 where μ is π. Over the n
    counted tokens of a batch, the mean ratio is ``ratio.sum() / n``, the fraction of truncated tokens
    ``truncated.sum() / n``, and the effective sample size, as a fraction of n,
    ``weight.sum()² / (n · squared_weight.sum())``.
    """

    log_ratio: Tensor  # (N,) log π(y|x) − log μ(y|x) of the sample
    ratio: Tensor  # (N,) Σ_t π(y_t)/μ(y_t), before truncation
    weight: Tensor  # (N,) Σ_t w_t
    squared_weight: Tensor  # (N,) Σ_t w_t²
    truncated: Tensor  # (N,) number of tokens whose ratio exceeds C


class ExactOnline(NamedTuple):
    """The exact estimate of λ KL(π‖π_ref) on the n rows of G groups of k samples, with its derivatives."""

    kl: Tensor  # (G, k) Σ_t D_t
    loss: Tensor  # (G, k) λ (Σ_t D_t + γ|y|) / (G k)
    by_logp: Tensor  # (n,) derivative by each row's log π(a_t|s_t), with fixed divergences
    by_divergence: float  # derivative by a row's D_t, equal for all rows


@dataclass(frozen=True)
class Objective:
    """``mean loss of the pairs + mean loss of the groups + kl_coef · reverse KL``: its options and the batch's sizes.

    Raises ValueError if a value is out of range.
    """

    loss: PairLoss
    """The loss of the pairs."""
    kl_coef: float
    """λ ≥ 0."""
    num_pairs: int
    """P ≥ 0."""
    num_generations: int = 2
    """k ≥ 2, the number of online samples for each prompt."""
    length_penalty: float = 0.0
    """Added to a sample's penalty for each token."""
    group_loss: GroupLoss | None = None
    """The loss of the groups of samples, beside the KL."""
    num_prompts: int = 0
    """G, groups of online samples in the batch; :meth:`for_sequences` sets it."""
    num_chosen_tokens: int = 0
    """Counted tokens of all chosen responses; :meth:`for_sequences` sets it."""
    importance_cap: float = 2.0
    """C > 0, the largest importance weight."""
    kl_estimator: str = "sampled"
    """One of ``KL_ESTIMATORS``."""

    def __post_init__(self) -> None:
        if torch.compiler.is_compiling():  # the traced numbers may be symbols; the operator checks them when it runs
            return
        # Each check is an ``if``, so that a call formats no messages.
        if not callable(self.loss):
            raise ValueError(f"loss is a {type(self.loss).__name__}: must be a name, or a function of Pairs")
        if not (math.isfinite(self.kl_coef) and self.kl_coef >= 0):
            raise ValueError(f"kl_coef={self.kl_coef}: must be 0 or more")
        if not math.isfinite(self.length_penalty):
            raise ValueError(f"length_penalty={self.length_penalty}: must be finite")
        if not self.importance_cap > 0:
            raise ValueError(f"importance_cap={self.importance_cap}: must be positive (inf truncates nothing)")
        if self.kl_estimator not in KL_ESTIMATORS:
            raise ValueError(
                f"kl_estimator={self.kl_estimator!r}: must be one of {', '.join(map(repr, KL_ESTIMATORS))}"
            )
        if self.num_pairs < 0:
            raise ValueError(f"num_pairs={self.num_pairs}: must be 0 or more")
        if self.num_generations < 2:
            raise ValueError(f"num_generations={self.num_generations}: RLOO needs at least 2 samples a prompt")

    def for_sequences(self, lengths: Sequence[int]) -> Objective:
        """Return the objective of a batch whose sequences, in the caller's order, have ``lengths`` counted tokens.

        Raises ValueError if the number of sequences does not fit.
        """
        num_sequences = len(lengths)
        require(num_sequences > 0, "there are no sequences: the batch is empty")
        pairs = 2 * self.num_pairs
        samples = num_sequences - pairs
        require(samples >= 0, f"num_pairs={self.num_pairs} needs {pairs} sequences, the batch has {num_sequences}")
        require(
            samples % self.num_generations == 0,
            f"{num_sequences} sequences are {pairs} of pairs and {samples} online samples, "
            f"which num_generations={self.num_generations} does not divide",
        )
        num_chosen_tokens = sum(lengths[: self.num_pairs])
        return replace(self, num_prompts=samples // self.num_generations, num_chosen_tokens=num_chosen_tokens)

    @property
    def needs_reference(self) -> bool:
        """True if a term of the objective reads the reference's log-probs."""
        return bool(self.num_prompts) or (bool(self.num_pairs) and needs_reference(self.loss))

    @property
    def is_exact(self) -> bool:
        """True if the KL is estimated from full distributions."""
        return self.kl_estimator == "exact"

    def pairs(self, logps: Tensor, ref_logps: Tensor, lengths: Tensor, tensors: Mapping[str, Tensor]) -> Pairs:
        """Return pairs for the loss from sequences (2P,) in group order: each chosen one before its rejected one."""
        chosen, rejected = logps.view(-1, 2).unbind(1)
        ref_chosen, ref_rejected = ref_logps.view(-1, 2).unbind(1)
        chosen_lengths, rejected_lengths = lengths.to(logps.dtype).view(-1, 2).unbind(1)
        return Pairs(
            chosen,
            rejected,
            ref_chosen,
            ref_rejected,
            chosen_lengths,
            rejected_lengths,
            self.num_pairs,
            self.num_chosen_tokens,
            tensors,
        )

    def pair_slopes(self, pairs: Pairs) -> tuple[Tensor, Tensor]:
        """Return the summed loss () of ``pairs``, divided by ``num_pairs``, and its derivatives (2P,), in group order.

        Raises:
            ValueError: the loss returns no tensor (P,), or depends on other pairs.
        """
        if len(pairs.chosen_logps) == 0:
            return pairs.chosen_logps.sum(), pairs.chosen_logps.new_empty(0)
        if wants_batch(self.loss) and len(pairs.chosen_logps) == self.num_pairs:
            pairs = with_batch_statistics(self.loss, pairs)
        check_closed(self.loss, pairs)
        terms = pair_terms(self.loss, pairs)
        slopes = torch.stack([terms.by_chosen, terms.by_rejected], dim=1).flatten()
        return (terms.losses / self.num_pairs).sum(), slopes / self.num_pairs

    def online(self, ratio: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Return λ · (estimate of KL(π‖π_ref)) of each sample, and its RLOO derivative by log π(y|x).

        All are (G, k), one row a prompt. With the penalty
        ``r_i = sg(ρ_i) + γ|y_i|`` the derivative is ``λ (r_i − mean_{j≠i} r_j) / (G k)``
        (Algorithm 1; Kool et al. 2019): unbiased because E[∇ log π] = 0.
        """
        k = self.num_generations
        penalty = ratio + self.length_penalty * lengths.to(ratio.dtype)
        baseline = (penalty.sum(dim=1, keepdim=True) - penalty) / (k - 1)
        scale = self.kl_coef / max(1, self.num_prompts * k)  # without samples, both are empty
        return scale * penalty, scale * (penalty - baseline)

    def importance(self, logps: Tensor, behavior_logps: Tensor, lengths: Tensor) -> tuple[Tensor, Importance]:
        """Return the weight ``w_t = min(π(y_t)/μ(y_t), C)`` of each row (n,), and sums over the N samples.

        ``logps`` and ``behavior_logps`` (n,) are log π and log μ of the rows' tokens, sample after sample;
        ``lengths`` (N,) counts each sample's rows. A weight multiplies its sample's derivative by log π(y|x).
        """
        log_ratio = logps - behavior_logps
        ratio = log_ratio.exp()
        weight = ratio.clamp(max=self.importance_cap)  # keeps NaN; an overflow becomes C
        truncated = (ratio > self.importance_cap).to(ratio.dtype)
        rows = torch.stack([log_ratio, ratio, weight, weight.square(), truncated], dim=1)
        return weight, Importance(*sequence_sums(rows, lengths).unbind(1))

    def exact_online(self, divergences: Tensor, lengths: Tensor, longest: int) -> ExactOnline:
        """Estimate λ KL(π‖π_ref) of each sample from the full distributions at its positions, with derivatives.

        ``divergences`` (n,) holds ``D_t = Σ_v π(v|s_t) (log π(v|s_t) − log π_ref(v|s_t))`` of each counted row, sample
        after sample, in complete groups. ``lengths`` (G·k,) counts each sample's rows, at most ``longest``, on the same
        device. Every token costs D_t + γ. The distributions at s_t depend on the parameters, and so does the choice
        of a_t, which decides about the tokens after it. Hence the gradient has two parts:

            λ/(G k) Σ_i Σ_t [ ∇D_{i,t} + (R_{i,t} − mean_{j≠i} R_{j,t}) ∇log π(a_{i,t}|s_{i,t}) ]

        with the cost of later tokens ``R_t = sg(Σ_{t'>t} (D_{t'} + γ))``, 0 where a sample has ended. The baseline of
        position t does not depend on sample i, so the estimate is unbiased: E[∇log π(a_t|s_t)] = 0
        (``docs/exact_kl.md``). This never waits for the device, and every sum has a fixed order.
        """
        k, gamma = self.num_generations, self.length_penalty
        kl = sequence_sums(divergences, lengths).view(-1, k)
        scale = self.kl_coef / max(1, self.num_prompts * k)
        loss = scale * (kl + gamma * lengths.view(-1, k).to(kl.dtype))
        positions = Positions(lengths, len(divergences))
        later_costs = positions.sums_after(divergences + gamma, longest)
        return ExactOnline(kl, loss, scale * (later_costs - positions.mean_of_the_others(later_costs, k)), scale)

    def group_slopes(self, groups: Groups) -> tuple[Tensor, Tensor]:
        """Return the summed ``group_loss`` () of ``groups``, divided by ``num_prompts``, and its derivatives (G, k)."""
        if self.group_loss is None or len(groups.logps) == 0:
            return groups.logps.new_zeros(()), torch.zeros_like(groups.logps)
        losses, slopes = group_terms(self.group_loss, groups)
        return (losses / self.num_prompts).sum(), slopes / self.num_prompts

    def __call__(
        self,
        logps: Tensor,
        ref_logps: Tensor,
        lengths: Tensor,
        num_pairs: int,
        pair_tensors: Mapping[str, Tensor] = NOTHING,
        sample_tensors: Mapping[str, Tensor] = NOTHING,
    ) -> tuple[Tensor, Tensor]:
        """Return the summed loss () and the coefficients ∂loss/∂logps (S,) of complete pairs and groups.

        The S sequences are in group order: ``num_pairs`` times a chosen and its rejected one, then online samples,
        ``num_generations`` consecutive ones a prompt. They may be any subset of the batch's pairs and groups; means
        still divide by the numbers of the full batch. ``pair_tensors`` (P,) and ``sample_tensors`` (N,) are those of
        the subset.
        """
        split, k = 2 * num_pairs, self.num_generations
        pairs = self.pairs(logps[:split], ref_logps[:split], lengths[:split], pair_tensors)
        loss, pair_slopes = self.pair_slopes(pairs)
        groups = _groups(logps[split:], ref_logps[split:], lengths[split:], sample_tensors, k)
        penalty, advantage = self.online(groups.logps - groups.ref_logps, groups.lengths)
        loss = loss + penalty.sum()
        if self.group_loss is not None:
            group_loss, group_slopes = self.group_slopes(groups)
            loss, advantage = loss + group_loss, advantage + group_slopes
        return loss, torch.cat([pair_slopes, advantage.flatten()])

    def exact(
        self,
        logps: Tensor,
        ref_logps: Tensor,
        lengths: Tensor,
        num_pairs: int,
        divergences: Tensor,
        longest: int,
        pair_tensors: Mapping[str, Tensor] = NOTHING,
        sample_tensors: Mapping[str, Tensor] = NOTHING,
    ) -> tuple[Tensor, Tensor, ExactOnline]:
        """Return the loss of complete pairs and groups with the exact KL estimator.

        ``logps``, ``ref_logps`` and ``lengths`` (S,) are in group order, as in ``__call__``. ``divergences`` (n,) and
        ``longest`` are those of :meth:`exact_online`, of the samples alone. Returns the summed loss (), ∂loss/∂logps of
        the pairs' sequences (2 · num_pairs,), and the online terms, whose loss is part of the sum.
        """
        split = 2 * num_pairs
        pairs = self.pairs(logps[:split], ref_logps[:split], lengths[:split], pair_tensors)
        loss, pair_slopes = self.pair_slopes(pairs)
        online = self.exact_online(divergences, lengths[split:], longest)
        loss = loss + online.loss.sum()
        if self.group_loss is not None:
            samples = _groups(logps[split:], ref_logps[split:], lengths[split:], sample_tensors, self.num_generations)
            group_loss, slopes = self.group_slopes(samples)
            by_row = slopes.flatten().repeat_interleave(lengths[split:], output_size=len(divergences))
            loss, online = loss + group_loss, online._replace(by_logp=online.by_logp + by_row)
        return loss, pair_slopes, online


def with_batch_statistics(loss: PairLoss, pairs: Pairs) -> Pairs:
    """Return all ``pairs`` of the batch with the statistics that ``loss`` computes from them."""
    statistics: Mapping[str, Tensor] = loss.batch_statistics(pairs)  # type: ignore[attr-defined]
    return pairs._replace(tensors={**pairs.tensors, **statistics})


def _groups(logps: Tensor, ref_logps: Tensor, lengths: Tensor, tensors: Mapping[str, Tensor], k: int) -> Groups:
    return Groups(
        logps.view(-1, k),
        ref_logps.view(-1, k),
        lengths.to(logps.dtype).view(-1, k),
        {name: x.view(-1, k) for name, x in tensors.items()},
    )


class Positions:
    """The sequence of each of n rows, its position in the sequence, and the number of rows after it in the sequence."""

    def __init__(self, lengths: Tensor, num_rows: int) -> None:
        self.lengths = lengths  # (S,)
        self.starts = lengths.cumsum(0) - lengths  # (S,)
        sequences = torch.arange(len(lengths), device=lengths.device)
        self.sequence = sequences.repeat_interleave(lengths, output_size=num_rows)  # (n,)
        self.position = torch.arange(num_rows, device=lengths.device) - self.starts[self.sequence]  # (n,)
        self.following = lengths[self.sequence] - 1 - self.position  # (n,)

    def sums_after(self, rows: Tensor, longest: int) -> Tensor:
        """Return, for each row, the sum of the later rows of its sequence, (n,) -> (n,), in log2(longest) steps."""
        sums, reach = self._later(rows, 1), 1  # sums over the next `reach` rows
        while reach < longest - 1:
            sums, reach = sums + self._later(sums, reach), 2 * reach
        return sums

    def mean_of_the_others(self, rows: Tensor, k: int) -> Tensor:
        """Return the mean over the k − 1 other sequences of the group at the same position. An ended one adds 0."""
        member = self.sequence % k
        shifts = torch.arange(1, k, device=rows.device)
        others = (self.sequence - member)[:, None] + (member[:, None] + shifts) % k  # (n, k − 1)
        exists = self.position[:, None] < self.lengths[others]
        index = (self.starts[others] + self.position[:, None]).clamp(max=len(rows) - 1)
        return torch.where(exists, rows[index], 0.0).mean(dim=1)

    def _later(self, rows: Tensor, distance: int) -> Tensor:
        """Return the row ``distance`` rows later in the same sequence, or 0 after the end of the sequence."""
        return torch.where(self.following >= distance, rows.roll(-distance), 0.0)
