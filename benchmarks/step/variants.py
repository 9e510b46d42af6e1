"""The measured variants: TRL's trainers, this project's, and this project's with each saving switched off."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from benchmarks.step.cases import Case

TRL_DPO, TRL_HYPO = "TRL DPO", "HyPO on TRL"
DPO, HYPO, HYPO_PLAIN = "DPO", "HyPO", "HyPO, all off"


@dataclass(frozen=True)
class Variant:
    """A measured trainer; ``settings`` go to TRL's DPOConfig and RLOOConfig, or to this project's Config."""

    name: str
    side: str  # "TRL" or "ours"
    algorithm: str  # "dpo" or "hypo"
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __hash__(self) -> int:
        return hash(self.name)

    def __str__(self) -> str:
        return self.name


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

_TRL = (
    Variant(TRL_DPO, "TRL", "dpo"),  # its defaults, gradient checkpointing among them
    Variant("TRL DPO, no checkpointing", "TRL", "dpo", {"gradient_checkpointing": False}),
    Variant("TRL DPO, reference precomputed", "TRL", "dpo", {"precompute_ref_log_probs": True}),
    Variant(TRL_HYPO, "TRL", "hypo"),
    Variant("HyPO on TRL, no checkpointing", "TRL", "hypo", {"gradient_checkpointing": False}),
)
# No saving of time: what the memory that selective checkpointing saves costs.
_KEPT = Variant("HyPO, activations kept", "ours", "hypo", {"gradient_checkpointing": False})


def variants(case: Case) -> list[Variant]:
    """Return the variants of a case."""
    off = {saving.name: saving.off for saving in savings(case) if saving.off is not None}
    found = [*_TRL, Variant(DPO, "ours", "dpo"), Variant(HYPO, "ours", "hypo"), _KEPT]
    found += [Variant(without(name), "ours", "hypo", settings) for name, settings in off.items()]
    if off:
        everything = {key: value for settings in off.values() for key, value in settings.items()}
        found.append(Variant(HYPO_PLAIN, "ours", "hypo", everything))
    return found


def savings(case: Case) -> list[Saving]:
    return [saving for saving in SAVINGS if case.tuning in saving.tunings]


def without(saving: str) -> str:
    """Return the name of the variant with one saving switched off."""
    return f"HyPO without {saving}"
