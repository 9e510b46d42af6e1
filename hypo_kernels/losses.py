"""The preference losses, by the names of TRL's ``loss_type`` where TRL has them.

Each is a frozen dataclass: its fields are the loss's parameters, its call is the equation. Notation:
ρ(x, y) = log π(y|x) − log π_ref(y|x), Δ = ρ(x, y⁺) − ρ(x, y⁻), |y| counted tokens. To write your own, write a function
or a dataclass of the same form (``docs/losses.md``).

The losses of Δ take ``f_divergence_type`` as in TRL: f-DPO (Wang et al. 2023, arXiv 2309.16240) replaces ρ by f′(e^ρ).
``reverse_kl`` (ρ itself) is DPO.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from hypo_kernels.pairs import NOTHING, PairLoss, Pairs, pair_terms

F_DIVERGENCES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")
LARGEST_EXPONENT = 80.0  # exp is finite in fp32; TRL clamps there too
NOT_CLOSED = ("aot", "aot_unpaired")  # they sort the batch: gradients pass through other pairs


@dataclass(frozen=True)
class BuiltIn:
    """The checks and properties that the losses of this module share."""

    name: ClassVar[str]
    is_closed: ClassVar[bool] = True
    needs_reference: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Raise ValueError if a parameter is out of range."""
        if torch.compiler.is_compiling():  # traced numbers may be symbols; the operator checks them when it runs
            return
        for parameter, (is_allowed, words) in RANGES.items():
            value = getattr(self, parameter, None)
            if value is not None and not is_allowed(value):
                raise ValueError(f"{parameter}={value}: must be {words}")
        divergence = getattr(self, "f_divergence_type", None)
        if divergence is not None and divergence not in F_DIVERGENCES:
            names = ", ".join(map(repr, F_DIVERGENCES))
            raise ValueError(f"f_divergence_type={divergence!r}: must be one of {names}")


def _is_positive(value: float) -> bool:
    return 0 < value < math.inf


def _is_not_negative(value: float) -> bool:
    return 0 <= value < math.inf


# Which values a parameter may have, and the words for them.
RANGES: dict[str, tuple[Callable[[float], bool], str]] = {
    "beta": (_is_positive, "positive"),
    "label_smoothing": (lambda value: 0 <= value < 0.5, "in [0, 0.5)"),
    "discopop_tau": (_is_positive, "positive"),
    "simpo_gamma": (_is_not_negative, "0 or more"),
    "cpo_alpha": (_is_not_negative, "0 or more"),
    "dpop_lambda": (_is_not_negative, "0 or more"),
    "f_alpha_divergence_coef": (math.isfinite, "finite"),
}


@dataclass(frozen=True)
class OfScores(BuiltIn):
    """A loss of the scores f′(π/π_ref) of a pair, with f-DPO's divergences."""

    beta: float = 0.1
    f_divergence_type: str = "reverse_kl"
    f_alpha_divergence_coef: float = 0.5

    def scores(self, pairs: Pairs) -> tuple[Tensor, Tensor]:
        """Return f′(e^ρ) of the chosen and of the rejected responses, (P,) each."""
        return self._score(pairs.chosen_ratios), self._score(pairs.rejected_ratios)

    def difference(self, pairs: Pairs) -> Tensor:
        """Return the difference of the scores, (P,): Δ under the reverse KL."""
        chosen, rejected = self.scores(pairs)
        return chosen - rejected

    def _score(self, ratio: Tensor) -> Tensor:
        alpha = self.f_alpha_divergence_coef - 1
        if self.f_divergence_type == "forward_kl":  # f′(t) = 1 − 1/t
            return 1 - torch.exp(-ratio)
        if self.f_divergence_type == "js_divergence":  # f′(t) = log(2t/(t + 1))
            return math.log(2) + F.logsigmoid(ratio)
        if self.f_divergence_type == "alpha_divergence" and abs(alpha) >= 1e-6:  # f′(t) = (t^(α−1) − 1)/(α−1)
            return ((alpha * ratio).clamp(max=LARGEST_EXPONENT).exp() - 1) / alpha
        return ratio


@dataclass(frozen=True)
class Sigmoid(OfScores):
    """DPO: −log σ(β Δ) (Rafailov et al. 2023, arXiv 2305.18290).

    With ``label_smoothing`` ε it is conservative DPO, the mean under flipped labels.
    """

    name: ClassVar[str] = "sigmoid"
    label_smoothing: float = 0.0

    def __call__(self, pairs: Pairs) -> Tensor:
        """Return −(1−ε) log σ(βΔ) − ε log σ(−βΔ), (P,)."""
        return smoothed(self.beta * self.difference(pairs), self.label_smoothing)

    def closed_form(self, pairs: Pairs) -> tuple[Tensor, Tensor, Tensor]:
        """Return the losses and their derivatives, without autograd where the score is ρ."""
        if self.f_divergence_type != "reverse_kl":
            return pair_terms(self.__call__, pairs._replace(tensors=NOTHING))
        margin = self.beta * (pairs.chosen_ratios - pairs.rejected_ratios)
        loss, slope = -F.logsigmoid(margin), -torch.sigmoid(-margin)
        if flip := self.label_smoothing:
            loss = (1 - flip) * loss - flip * F.logsigmoid(-margin)
            slope = (1 - flip) * slope + flip * torch.sigmoid(margin)
        slope = self.beta * slope
        return loss, slope, -slope


@dataclass(frozen=True)
class Robust(OfScores):
    """Robust DPO, unbiased under labels flipped with probability ε (Chowdhury et al. 2024, arXiv 2403.00409)."""

    name: ClassVar[str] = "robust"
    label_smoothing: float = 0.0

    def __call__(self, pairs: Pairs) -> Tensor:
        """Return (−(1−ε) log σ(βΔ) + ε log σ(−βΔ)) / (1 − 2ε), (P,)."""
        margin, flip = self.beta * self.difference(pairs), self.label_smoothing
        return (-(1 - flip) * F.logsigmoid(margin) + flip * F.logsigmoid(-margin)) / (1 - 2 * flip)


@dataclass(frozen=True)
class Hinge(OfScores):
    """SLiC's hinge loss on DPO's margin: max(0, 1 − βΔ) (Zhao et al. 2023; Liu et al. 2023, arXiv 2309.06657)."""

    name: ClassVar[str] = "hinge"

    def __call__(self, pairs: Pairs) -> Tensor:
        """Return max(0, 1 − βΔ), (P,)."""
        return torch.relu(1 - self.beta * self.difference(pairs))


@dataclass(frozen=True)
class IPOSum(OfScores):
    """IPO on sums over tokens, as in the paper: (Δ − 1/(2β))² (Azar et al. 2023, arXiv 2310.12036, Eq. 17).

    TRL's ``ipo`` averages over tokens instead: :class:`IPOMean`.
    """

    name: ClassVar[str] = "ipo_sum"

    def __call__(self, pairs: Pairs) -> Tensor:
        """Return (Δ − 1/(2β))², (P,)."""
        return (self.difference(pairs) - 1 / (2 * self.beta)).square()

    def closed_form(self, pairs: Pairs) -> tuple[Tensor, Tensor, Tensor]:
        """Return the losses and their derivatives, without autograd where the score is ρ."""
        if self.f_divergence_type != "reverse_kl":
            return pair_terms(self.__call__, pairs._replace(tensors=NOTHING))
        error = pairs.chosen_ratios - pairs.rejected_ratios - 1 / (2 * self.beta)
        slope = 2 * error
        return error.square(), slope, -slope


@dataclass(frozen=True)
class IPOMean(OfScores):
    """IPO on means over tokens, TRL's ``ipo``: (ρ⁺/|y⁺| − ρ⁻/|y⁻| − 1/(2β))²."""

    name: ClassVar[str] = "ipo_mean"

    def __call__(self, pairs: Pairs) -> Tensor:
        """Return the squared distance of the difference of means from 1/(2β), (P,)."""
        chosen, rejected = self.scores(pairs)
        return (mean(chosen, pairs.chosen_lengths) - mean(rejected, pairs.rejected_lengths) - 0.5 / self.beta).square()


@dataclass(frozen=True)
class SigmoidNorm(OfScores):
    """Length-normalised DPO: −log σ(β (ρ⁺/|y⁺| − ρ⁻/|y⁻|)) (Tülu 3, arXiv 2411.15124)."""

    name: ClassVar[str] = "sigmoid_norm"

    def __call__(self, pairs: Pairs) -> Tensor:
        """Return −log σ of β times the difference of the means over tokens, (P,)."""
        chosen, rejected = self.scores(pairs)
        return -F.logsigmoid(self.beta * (mean(chosen, pairs.chosen_lengths) - mean(rejected, pairs.rejected_lengths)))


@dataclass(frozen=True)
class EXOPair(OfScores):
    """EXO for pairs: KL from the smoothed labels to the policy's preference (Ji et al. 2024, arXiv 2402.00856, Eq. 16).

    ``label_smoothing`` ε must be positive; the paper takes 1e-3.
    """

    name: ClassVar[str] = "exo_pair"
    label_smoothing: float = 1e-3

    def __post_init__(self) -> None:
        """Raise ValueError if a parameter is out of range."""
        super().__post_init__()
        if not torch.compiler.is_compiling() and self.label_smoothing == 0:
            raise ValueError("label_smoothing=0.0: 'exo_pair' divides by it, use 1e-3 (the paper's)")

    def __call__(self, pairs: Pairs) -> Tensor:
        """Return σ(βΔ) (log σ(βΔ) − log(1−ε)) + σ(−βΔ) (log σ(−βΔ) − log ε), (P,)."""
        margin, flip = self.beta * self.difference(pairs), self.label_smoothing
        return margin.sigmoid() * (F.logsigmoid(margin) - math.log1p(-flip)) + (-margin).sigmoid() * (
            F.logsigmoid(-margin) - math.log(flip)
        )


@dataclass(frozen=True)
class DiscoPOP(OfScores):
    """DiscoPOP: logistic and exponential loss, blended by the margin (Lu et al. 2024, arXiv 2406.08414, Eq. 5)."""

    name: ClassVar[str] = "discopop"
    discopop_tau: float = 0.05

    def __call__(self, pairs: Pairs) -> Tensor:
        """Return (1−m) · (−log σ(βΔ)) + m · e^(−βΔ) with m = σ(βΔ/τ), (P,)."""
        margin = self.beta * self.difference(pairs)
        blend = torch.sigmoid(margin / self.discopop_tau)
        return -F.logsigmoid(margin) * (1 - blend) + torch.exp(-margin) * blend


@dataclass(frozen=True)
class NCAPair(BuiltIn):
    """NCA for pairs: absolute likelihoods instead of their difference (Chen et al. 2024, arXiv 2402.05369)."""

    name: ClassVar[str] = "nca_pair"
    beta: float = 0.1

    def __call__(self, pairs: Pairs) -> Tensor:
        """Return −log σ(βρ⁺) − ½ log σ(−βρ⁺) − ½ log σ(−βρ⁻), (P,)."""
        chosen, rejected = self.beta * pairs.chosen_ratios, self.beta * pairs.rejected_ratios
        return -F.logsigmoid(chosen) - 0.5 * F.logsigmoid(-chosen) - 0.5 * F.logsigmoid(-rejected)


@dataclass(frozen=True)
class BCOPair(BuiltIn):
    """BCO for pairs, a classifier of chosen against rejected (Jung et al. 2024, arXiv 2404.04656), as in TRL.

    The paper shifts the rewards by δ, their running mean: pass it as ``pair_tensors={"delta": (P,)}``. TRL's has none.
    """

    name: ClassVar[str] = "bco_pair"
    beta: float = 0.1

    def __call__(self, pairs: Pairs) -> Tensor:
        """Return −log σ(βρ⁺ − δ) − log σ(−(βρ⁻ − δ)), (P,)."""
        shift: Tensor | float = pairs.tensors.get("delta", 0.0)
        return -F.logsigmoid(self.beta * pairs.chosen_ratios - shift) - F.logsigmoid(
            shift - self.beta * pairs.rejected_ratios
        )


@dataclass(frozen=True)
class SPPOHard(BuiltIn):
    """SPPO with hard preference probabilities (Wu et al. 2024, arXiv 2405.00675, Eq. 4.7)."""

    name: ClassVar[str] = "sppo_hard"
    beta: float = 0.1

    def __call__(self, pairs: Pairs) -> Tensor:
        """Return (ρ⁺ − 1/(2β))² + (ρ⁻ + 1/(2β))², (P,)."""
        half = 0.5 / self.beta
        return (pairs.chosen_ratios - half).square() + (pairs.rejected_ratios + half).square()


@dataclass(frozen=True)
class APOZero(BuiltIn):
    """APO-zero: chosen likelihoods up, rejected ones down (D'Oosterlinck et al. 2024, arXiv 2408.06266, Eq. 7)."""

    name: ClassVar[str] = "apo_zero"
    beta: float = 0.1

    def __call__(self, pairs: Pairs) -> Tensor:
        """Return 1 − σ(βρ⁺) + σ(βρ⁻), (P,)."""
        return 1 - torch.sigmoid(self.beta * pairs.chosen_ratios) + torch.sigmoid(self.beta * pairs.rejected_ratios)


@dataclass(frozen=True)
class APODown(BuiltIn):
    """APO-down: both likelihoods down, the rejected one more (D'Oosterlinck et al. 2024, arXiv 2408.06266, Eq. 8)."""

    name: ClassVar[str] = "apo_down"
    beta: float = 0.1

    def __call__(self, pairs: Pairs) -> Tensor:
        """Return σ(βρ⁺) + 1 − σ(βΔ), (P,)."""
        chosen = pairs.chosen_ratios
        return torch.sigmoid(self.beta * chosen) + 1 - torch.sigmoid(self.beta * (chosen - pairs.rejected_ratios))


@dataclass(frozen=True)
class DPOPositive(BuiltIn):
    """DPO-positive (Smaug): DPO that keeps the chosen likelihood up (Pal et al. 2024, arXiv 2402.13228, Eq. 3)."""

    name: ClassVar[str] = "dpo_positive"
    beta: float = 0.1
    dpop_lambda: float = 50.0

    def __call__(self, pairs: Pairs) -> Tensor:
        """Return −log σ(β (Δ − λ max(0, −ρ⁺))), (P,)."""
        chosen = pairs.chosen_ratios
        penalty = self.dpop_lambda * torch.relu(-chosen)
        return -F.logsigmoid(self.beta * (chosen - pairs.rejected_ratios - penalty))


@dataclass(frozen=True)
class ChiPO(BuiltIn):
    """χPO: DPO under a mix of χ² and KL divergence (Huang et al. 2024, arXiv 2407.13399, Algorithm 1).

    The exponential is taken of at most 80, where fp32 still holds it; the paper's clipping of the difference at
    2 R_max is left out (it has no gradient there).
    """

    name: ClassVar[str] = "chi_po"
    beta: float = 0.1

    def __call__(self, pairs: Pairs) -> Tensor:
        """Return −log σ(β φ(ρ⁺) − β φ(ρ⁻)) with φ(ρ) = ρ + e^ρ, (P,)."""
        chosen, rejected = (
            ratio + ratio.clamp(max=LARGEST_EXPONENT).exp() for ratio in (pairs.chosen_ratios, pairs.rejected_ratios)
        )
        return -F.logsigmoid(self.beta * (chosen - rejected))


@dataclass(frozen=True)
class REBEL(BuiltIn):
    """REBEL: regression of reward differences on log-ratios (Gao et al. 2024, arXiv 2404.16767, Algorithm 1).

    β is 1/η of the paper. Needs ``pair_tensors={"chosen_scores": (P,), "rejected_scores": (P,)}``, the rewards.
    """

    name: ClassVar[str] = "rebel"
    beta: float = 0.1

    def __call__(self, pairs: Pairs) -> Tensor:
        """Return (βΔ − (r⁺ − r⁻))², (P,)."""
        difference = tensor(pairs, "chosen_scores", self) - tensor(pairs, "rejected_scores", self)
        return (self.beta * (pairs.chosen_ratios - pairs.rejected_ratios) - difference).square()


@dataclass(frozen=True)
class KTOPair(BuiltIn):
    """KTO on pairs: chosen responses are desirable, rejected ones are not (Ethayarajh et al. 2024, arXiv 2402.01306).

    The reference points are batch means without gradients: of ρ of the rejected responses for the chosen ones, and
    the reverse, as in TRL's former ``kto_pair``. Give another estimate as ``pair_tensors={"kl": (P,)}``, such as that
    of online samples.
    """

    name: ClassVar[str] = "kto_pair"
    beta: float = 0.1

    def batch_statistics(self, pairs: Pairs) -> dict[str, Tensor]:
        """Return the reference points of the batch, max(0, mean ρ), expanded to (P,)."""
        if "kl" in pairs.tensors:
            return {}
        points = {"chosen_kl": pairs.rejected_ratios, "rejected_kl": pairs.chosen_ratios}
        return {name: ratios.mean().clamp(min=0).expand_as(ratios) for name, ratios in points.items()}

    def __call__(self, pairs: Pairs) -> Tensor:
        """Return 1 − σ(β (ρ⁺ − z⁺)) + 1 − σ(β (z⁻ − ρ⁻)), (P,)."""
        chosen_kl, rejected_kl = (
            pairs.tensors["kl"] if "kl" in pairs.tensors else tensor(pairs, name, self)
            for name in ("chosen_kl", "rejected_kl")
        )
        return (
            2
            - torch.sigmoid(self.beta * (pairs.chosen_ratios - chosen_kl))
            - torch.sigmoid(self.beta * (rejected_kl - pairs.rejected_ratios))
        )


@dataclass(frozen=True)
class SFT(BuiltIn):
    """The negative log-likelihood of the chosen responses, a mean over the batch's tokens, as TRL's ``sft``.

    Beside DPO it makes RPO (Pang et al. 2024, arXiv 2404.19733), beside DPO and BCO MPO: see :class:`Weighted`.
    ``beta`` scales the rewards that are reported, and nothing else.
    """

    name: ClassVar[str] = "sft"
    needs_reference: ClassVar[bool] = False
    beta: float = 0.1

    def __call__(self, pairs: Pairs) -> Tensor:
        """Return −log π(y⁺|x) · P / (tokens of all chosen responses), (P,): its mean is the mean over tokens."""
        return negative_log_likelihood(pairs)


@dataclass(frozen=True)
class SimPO(BuiltIn):
    """SimPO: mean log-probs as rewards, and a margin; no reference (Meng et al. 2024, arXiv 2405.14734, Eq. 6)."""

    name: ClassVar[str] = "simpo"
    needs_reference: ClassVar[bool] = False
    beta: float = 2.0
    simpo_gamma: float = 0.5
    label_smoothing: float = 0.0

    def __call__(self, pairs: Pairs) -> Tensor:
        """Return −log σ(β log π(y⁺|x)/|y⁺| − β log π(y⁻|x)/|y⁻| − γ), smoothed, (P,)."""
        chosen, rejected = mean_logps(pairs)
        return smoothed(self.beta * (chosen - rejected) - self.simpo_gamma, self.label_smoothing)


@dataclass(frozen=True)
class CPO(BuiltIn):
    """CPO: DPO without a reference, and the likelihood of the chosen (Xu et al. 2024, arXiv 2401.08417, Eq. 5)."""

    name: ClassVar[str] = "cpo"
    needs_reference: ClassVar[bool] = False
    beta: float = 0.1
    cpo_alpha: float = 1.0
    label_smoothing: float = 0.0

    def __call__(self, pairs: Pairs) -> Tensor:
        """Return −log σ(β (log π(y⁺|x) − log π(y⁻|x))), smoothed, plus α times the loss of :class:`SFT`, (P,)."""
        margin = self.beta * (pairs.chosen_logps - pairs.rejected_logps)
        return smoothed(margin, self.label_smoothing) + self.cpo_alpha * negative_log_likelihood(pairs)


@dataclass(frozen=True)
class ORPO(BuiltIn):
    """ORPO: the likelihood of the chosen, and a log odds ratio (Hong et al. 2024, arXiv 2403.07691, Eq. 6 and 7).

    β is the paper's λ. The likelihood is that of the response; TRL's ORPOTrainer adds the prompt's tokens to it.
    """

    name: ClassVar[str] = "orpo"
    needs_reference: ClassVar[bool] = False
    beta: float = 0.1

    def __call__(self, pairs: Pairs) -> Tensor:
        """Return the loss of :class:`SFT` − β log σ(log odds⁺ − log odds⁻), odds p/(1−p) with p = π(y|x)^(1/|y|)."""
        chosen, rejected = mean_logps(pairs)
        log_odds = chosen - rejected - (log1mexp(chosen) - log1mexp(rejected))
        return negative_log_likelihood(pairs) - self.beta * F.logsigmoid(log_odds)


@dataclass(frozen=True)
class Weighted:
    """A weighted sum of losses, as TRL's lists of ``loss_type`` with ``loss_weights``."""

    losses: Sequence[PairLoss]
    weights: Sequence[float]

    def __post_init__(self) -> None:
        """Raise ValueError unless there is one weight for each loss."""
        object.__setattr__(self, "losses", tuple(self.losses))
        object.__setattr__(self, "weights", tuple(self.weights))
        if not self.losses or len(self.losses) != len(self.weights):
            raise ValueError(f"{len(self.losses)} losses and {len(self.weights)} weights: need one weight for each")

    @property
    def beta(self) -> float:
        """The β of the first loss that has one, for the rewards that are reported."""
        return next((loss.beta for loss in self.losses if hasattr(loss, "beta")), 1.0)

    @property
    def needs_reference(self) -> bool:
        """True if one of the losses reads the reference's log-probs."""
        return any(needs_reference(loss) for loss in self.losses)

    @property
    def is_closed(self) -> bool:
        """True if all losses are known to read no other pair."""
        return all(getattr(loss, "is_closed", False) for loss in self.losses)

    @property
    def wants_batch(self) -> bool:
        """True if one of the losses has a statistic of the whole batch."""
        return any(wants_batch(loss) for loss in self.losses)

    def batch_statistics(self, pairs: Pairs) -> dict[str, Tensor]:
        """Return the statistics of all its losses."""
        found: dict[str, Tensor] = {}
        for loss in self.losses:
            if wants_batch(loss):
                found |= loss.batch_statistics(pairs)  # type: ignore[attr-defined]
        return found

    def __call__(self, pairs: Pairs) -> Tensor:
        """Return Σ weight · loss, (P,)."""
        terms = [weight * loss(pairs) for loss, weight in zip(self.losses, self.weights, strict=True)]
        return torch.stack(terms).sum(0)


_CLASSES: tuple[type[BuiltIn], ...] = (
    Sigmoid, Robust, Hinge, IPOSum, IPOMean, SigmoidNorm, EXOPair, DiscoPOP, NCAPair, BCOPair, SPPOHard, APOZero,
    APODown, DPOPositive, ChiPO, REBEL, KTOPair, SFT, SimPO, CPO, ORPO,
)  # fmt: skip
LOSSES: dict[str, Any] = {loss.name: loss for loss in _CLASSES}


def by_name(name: str) -> PairLoss:
    """Return the loss called ``name`` with its default parameters. Raises ValueError if there is none."""
    if name == "ipo":
        raise ValueError("loss='ipo': use 'ipo_sum' (the paper's sums over tokens) or 'ipo_mean' (TRL's means)")
    if name in NOT_CLOSED:
        raise ValueError(
            f"loss={name!r} sorts the whole batch, so that gradients pass through other pairs: it has no fused form, "
            "use TRL's trainer"
        )
    if name not in LOSSES:
        raise ValueError(f"loss={name!r}: must be one of {', '.join(map(repr, LOSSES))}, or a function of Pairs")
    loss: PairLoss = LOSSES[name]()
    return loss


def needs_reference(loss: PairLoss) -> bool:
    """Return whether ``loss`` reads the reference's log-probs."""
    return bool(getattr(loss, "needs_reference", True))


def wants_batch(loss: PairLoss) -> bool:
    """Return whether ``loss`` has a statistic of the whole batch."""
    return bool(getattr(loss, "wants_batch", hasattr(loss, "batch_statistics")))


def mean(sums: Tensor, lengths: Tensor) -> Tensor:
    """Return sums over tokens as means, (P,); a response without counted tokens has 0."""
    return sums / lengths.clamp(min=1)


def mean_logps(pairs: Pairs) -> tuple[Tensor, Tensor]:
    """Return the mean log-prob of a token of the chosen and of the rejected responses, (P,) each."""
    return mean(pairs.chosen_logps, pairs.chosen_lengths), mean(pairs.rejected_logps, pairs.rejected_lengths)


def negative_log_likelihood(pairs: Pairs) -> Tensor:
    """Return −log π(y⁺|x) times pairs / (counted tokens of all chosen responses), (P,)."""
    return -pairs.chosen_logps * (pairs.num_pairs / max(1, pairs.num_chosen_tokens))


def smoothed(margin: Tensor, flip: float) -> Tensor:
    """Return −(1−ε) log σ(margin) − ε log σ(−margin), (P,)."""
    return -F.logsigmoid(margin) * (1 - flip) - F.logsigmoid(-margin) * flip


def log1mexp(x: Tensor) -> Tensor:
    """Return log(1 − eˣ) of x < 0 without cancellation (Mächler 2012). At x = 0 it is that of the smallest −x."""
    x = x.clamp(max=-torch.finfo(x.dtype).tiny)
    near = x > -math.log(2)
    close, far = (torch.where(keep, x, -1.0) for keep in (near, ~near))  # finite gradients on both branches
    return torch.where(near, torch.log(-torch.expm1(close)), torch.log1p(-torch.exp(far)))


def tensor(pairs: Pairs, name: str, loss: BuiltIn) -> Tensor:
    """Return one of ``pair_tensors``. Raises ValueError if it is missing."""
    if name not in pairs.tensors:
        raise ValueError(f"loss={loss.name!r} needs pair_tensors={{{name!r}: a tensor of shape (P,)}}")
    return pairs.tensors[name]
