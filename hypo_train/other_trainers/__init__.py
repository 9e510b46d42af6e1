"""Settings of other trainers, and what to write here instead. Imported when a name or a value is unknown."""

from __future__ import annotations

from typing import Any

from hypo_train.other_trainers import axolotl, common, llama_factory, trl
from hypo_train.other_trainers.advice import Advice
from hypo_train.other_trainers.values import advice_on_value as advice_on_value

TABLES = {
    "TRL": trl.TABLE,
    "axolotl": axolotl.TABLE,
    "LLaMA-Factory": llama_factory.TABLE,
    "other scripts": common.TABLE,
}
_ADVICE: dict[str, Advice] = {name: advice for table in TABLES.values() for advice in table for name in advice}


def advice_on(name: str, value: Any = ...) -> str | None:
    """Return what to write instead of ``name: value`` of another trainer, or None if no trainer known here has it."""
    advice = _ADVICE.get(name)
    return None if advice is None else advice.on(value)
