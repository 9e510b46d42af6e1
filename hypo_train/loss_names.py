"""The names of the preference losses that ``loss_type:`` takes, and the settings that each reads.

A configuration is checked against this table before torch is loaded; the losses are in ``hypo_kernels.losses``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

SCORES = ("beta", "f_divergence_type", "f_alpha_divergence_coef")


@dataclass(frozen=True)
class LossName:
    """A loss of ``hypo_kernels.losses`` as a configuration names it."""

    loss: str
    """Its name in ``hypo_kernels.losses``."""
    settings: tuple[str, ...] = ("beta",)
    """The settings that are its parameters, by the same names."""
    needs_reference: bool = True
    """The loss reads the reference model's log-probs."""


LOSS_NAMES = {
    "sigmoid": LossName("sigmoid", (*SCORES, "label_smoothing")),
    "hinge": LossName("hinge", SCORES),
    "ipo": LossName("ipo_mean", SCORES),  # TRL's name and form
    "ipo_sum": LossName("ipo_sum", SCORES),
    "ipo_mean": LossName("ipo_mean", SCORES),
    "exo_pair": LossName("exo_pair", (*SCORES, "label_smoothing")),
    "robust": LossName("robust", (*SCORES, "label_smoothing")),
    "discopop": LossName("discopop", (*SCORES, "discopop_tau")),
    "sigmoid_norm": LossName("sigmoid_norm", SCORES),
    "nca_pair": LossName("nca_pair"),
    "bco_pair": LossName("bco_pair"),
    "sppo_hard": LossName("sppo_hard"),
    "apo_zero": LossName("apo_zero"),
    "apo_down": LossName("apo_down"),
    "kto_pair": LossName("kto_pair"),
    "dpo_positive": LossName("dpo_positive", ("beta", "dpop_lambda")),
    "chi_po": LossName("chi_po"),
    "sft": LossName("sft", needs_reference=False),
    "simpo": LossName("simpo", ("beta", "simpo_gamma", "label_smoothing"), needs_reference=False),
    "cpo": LossName("cpo", ("beta", "cpo_alpha", "label_smoothing"), needs_reference=False),
    "orpo": LossName("orpo", needs_reference=False),
}
NOT_FUSED = frozenset({"aot", "aot_unpaired"})  # TRL's losses that sort the batch
# Settings that only some losses read, with the defaults of TRL.
OWN_SETTINGS = {
    "label_smoothing": 0.0,
    "f_divergence_type": "reverse_kl",
    "f_alpha_divergence_coef": 0.5,
    "discopop_tau": 0.05,
    "simpo_gamma": 0.5,
    "cpo_alpha": 1.0,
    "dpop_lambda": 50.0,
}


def settings_of(loss_types: Sequence[str]) -> set[str]:
    """Return the settings that at least one of the losses reads."""
    return {name for loss_type in loss_types for name in LOSS_NAMES[loss_type].settings}
