"""Weights are read from safetensors alone: a pickle runs whatever its author wrote into it.

transformers reads pickles with torch's restricted reader. This goes further and reads none.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hypo_train.model.tree_model import ModelError

SAFETENSORS_ONLY: dict[str, Any] = {"use_safetensors": True}  # for every ``from_pretrained`` that reads weights

_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_SAFE = (".safetensors", ".safetensors.index.json")


def refuse_pickles(folder: Path, field: str) -> None:
    """Raise ModelError for a saved model, the value of ``field``, whose weights or adapter are pickles alone."""
    names = [path.name for path in folder.iterdir()]
    kind = "adapter_model" if "adapter_config.json" in names else "model"
    is_safe = any(name.startswith(kind) and name.endswith(_SAFE) for name in names)
    found = sorted(name for name in names if kind in name and name.endswith(_PICKLES))
    if found and not is_safe:
        raise ModelError(f"{field}: {str(folder)!r} has its weights as a pickle ({found[0]}): {_fix(str(folder))}")


def why_not_read(path: str, error: Exception) -> str:
    """The fix, where a model of the Hub could not be read because it has no safetensors; else nothing."""
    return f" ({_fix(path)})" if isinstance(error, OSError) and ".safetensors" in str(error) else ""


def _fix(path: str) -> str:
    return (
        "only safetensors are read, as a pickle can run code. Convert it where that does no harm: "
        f"AutoModelForCausalLM.from_pretrained({path!r}).save_pretrained(...) writes safetensors"
    )
