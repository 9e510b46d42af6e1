"""The measured variants: TRL's trainers, this project's, and this project's with each saving switched off."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks.grid import Grid
from benchmarks.step.cases import Case

TRL_DPO, TRL_HYPO = "TRL DPO", "HyPO on TRL"
DPO, HYPO, HYPO_PLAIN = "DPO", "HyPO", "HyPO, all off"
HYPO_RECOMMENDED = "HyPO, recommended"

# What the documentation recommends where the online half shall cost little (docs/cost.md).
RECOMMENDED: dict[str, Any] = {"online_fraction": 0.125}


@dataclass(frozen=True)
class Variant:
    """A measured trainer; ``settings`` go to TRL's DPOConfig and RLOOConfig, or to this project's Config."""

    name: str
    side: str  # "TRL", "unsloth" (TRL's trainer on unsloth's model) or "ours"
    algorithm: str  # "dpo" or "hypo"
    settings: Mapping[str, Any] = field(default_factory=dict)
    as_best_dpo: bool = False
    """Take the settings of the fastest TRL DPO of the case."""

    def __hash__(self) -> int:
        return hash(self.name)

    def __str__(self) -> str:
        return self.name

    @property
    def steps_per_sample(self) -> int:
        """Return the steps whose mean is one sample: with one draw for n steps, the cost repeats every n steps."""
        return int(self.settings.get("rollout_steps", 1))

    @property
    def online_fraction(self) -> float:
        """Return the part of a step's prompts that gets samples."""
        return float(self.settings.get("online_fraction", 1.0))

    @property
    def why_missing(self) -> str:
        """Return why the variant cannot run here, or an empty text."""
        if self.side != "unsloth":
            return ""
        if torch.cuda.is_available():
            return "unsloth is measured on CPUs only, where each contender has a process of its own"
        missing = importlib.util.find_spec("unsloth") is None
        return "needs unsloth: pip install --no-deps unsloth unsloth_zoo" if missing else ""

    @property
    def is_trl_dpo(self) -> bool:
        return self.side == "TRL" and self.algorithm == "dpo"


@dataclass(frozen=True)
class Saving:
    """A saving of the training loop, and the Config fields that switch it off."""

    name: str
    off: Mapping[str, Any] | None  # None: the loop has no such switch, so it is not measured
    tunings: tuple[str, ...] = ("full", "LoRA", "last-k")  # where it applies


# The table to edit: a field of Config here makes a variant, a row of the table and a bar of the waterfall.
SAVINGS = (
    Saving("tree rows", off={"attn_implementation": "sdpa"}),
    Saving("cached pair reference", off={"precompute_ref_log_probs": False}),
    Saving("shared trunk", off={"share_trunk": False}, tunings=("last-k",)),
    Saving("fast sampler", off={"sampler": "generate"}),
    Saving("prompt KV reuse", off={"reuse_prompt_kv": False}),
)

_DEFAULT = Variant(TRL_DPO, "TRL", "dpo")  # its defaults, gradient checkpointing among them
# Which of the two is TRL's fastest depends on the machine: without checkpointing, page faults cost what recomputation
# did.
_BEST = (
    Variant("TRL DPO, reference precomputed", "TRL", "dpo", {"precompute_ref_log_probs": True}),
    Variant(
        "TRL DPO, precomputed, no checkpointing",
        "TRL",
        "dpo",
        {"precompute_ref_log_probs": True, "gradient_checkpointing": False},
    ),
)
_TRL_HYPO = Variant(TRL_HYPO, "TRL", "hypo", as_best_dpo=True)
_UNSLOTH = Variant("unsloth DPO", "unsloth", "dpo", as_best_dpo=True)
_OURS = (
    Variant(DPO, "ours", "dpo"),
    Variant(HYPO, "ours", "hypo"),
    Variant(HYPO_RECOMMENDED, "ours", "hypo", RECOMMENDED),
)
# No saving of time: what the memory that selective checkpointing saves costs.
_KEPT = Variant("HyPO, activations kept", "ours", "hypo", {"gradient_checkpointing": False})

TABLE = (_DEFAULT, *_BEST, _UNSLOTH, _TRL_HYPO, *_OURS)  # the contenders of the table
SHORT = (*_BEST, *_OURS)


def variants(case: Case, grid: Grid = Grid.FULL) -> list[Variant]:
    """Return the variants of a case, those of the table first."""
    if grid is Grid.SHORT:
        return list(SHORT)
    off = {saving.name: saving.off for saving in savings(case) if saving.off is not None}
    found = [variant for variant in (*TABLE, _KEPT) if variant != _UNSLOTH or case.tuning == "full"]
    if case.pairs * RECOMMENDED["online_fraction"] < 1:  # not every step would have samples
        found = [variant for variant in found if variant.name != HYPO_RECOMMENDED]
    found += [Variant(without(name), "ours", "hypo", settings) for name, settings in off.items()]
    if off:
        everything = {key: value for settings in off.values() for key, value in settings.items()}
        found.append(Variant(HYPO_PLAIN, "ours", "hypo", everything))
    if grid is Grid.QUICK and case.tuning != "full":  # what differs from full fine-tuning
        kept = (_DEFAULT, _TRL_HYPO, *_OURS)
        found = [variant for variant in found if variant in kept or variant.name == without("shared trunk")]
    return found


def savings(case: Case) -> list[Saving]:
    return [saving for saving in SAVINGS if case.tuning in saving.tunings]


def without(saving: str) -> str:
    """Return the name of the variant with one saving switched off."""
    return f"HyPO without {saving}"
