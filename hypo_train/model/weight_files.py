"""Checks of a saved model's weight files, before any weights are read.

Only safetensors are read, because a pickle can run code. (transformers reads pickles with torch's restricted reader.)
The header of each file shows whether it is complete.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hypo_train.model.tree_model import ModelError

SAFETENSORS_ONLY: dict[str, Any] = {"use_safetensors": True}  # for every ``from_pretrained`` that reads weights

_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_SAFE = (".safetensors", ".safetensors.index.json")


def refuse_pickles(folder: Path, field: str) -> None:
    """Raise ModelError if the weights or the adapter in ``folder``, the value of ``field``, are only pickles."""
    names = [path.name for path in folder.iterdir()]
    kind = "adapter_model" if "adapter_config.json" in names else "model"
    is_safe = any(name.startswith(kind) and name.endswith(_SAFE) for name in names)
    pickles = sorted(name for name in names if kind in name and name.endswith(_PICKLES))
    if pickles and not is_safe:
        raise ModelError(f"{field}: {str(folder)!r} has its weights as a pickle ({pickles[0]}): {_fix(str(folder))}")


def has_weights(folder: Path) -> bool:
    """Return whether ``folder`` has a safetensors file or an index of several."""
    return any((folder / f"model{end}").is_file() for end in _SAFE)


def check_weight_files(folder: Path, field: str) -> None:
    """Raise ModelError if ``folder``, the value of ``field``, lacks weight files or has damaged ones."""
    if not has_weights(folder):
        raise ModelError(
            f"{field}: the folder {str(folder)!r} has no weights (model.safetensors): "
            "name a folder that save_pretrained has written, or download all of its files"
        )
    names = ["model.safetensors"]
    index = folder / "model.safetensors.index.json"
    if not (folder / names[0]).is_file():
        try:
            names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
        except (ValueError, LookupError, AttributeError, TypeError):
            raise ModelError(f"{field}: {str(index)!r} lists no weights: download or copy it again") from None
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise ModelError(
            f"{field}: {len(missing)} of the {len(names)} files of weights in {str(folder)!r} are not there "
            f"({missing[0]}{', ...' if missing[1:] else ''}): download or copy them again"
        )
    for name in names:
        if not _is_complete(folder / name):
            raise ModelError(f"{field}: {str(folder / name)!r} is damaged or cut off: download or copy it again")


def _is_complete(path: Path) -> bool:
    """Return whether a safetensors file is as long as its header says."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > path.stat().st_size:
            return False
        try:
            entries = json.loads(file.read(length))
            ends = [entry["data_offsets"][1] for name, entry in entries.items() if name != "__metadata__"]
        except (ValueError, LookupError, AttributeError, TypeError, RecursionError):
            return False
    return path.stat().st_size == 8 + length + max(ends, default=0)


def why_not_read(path: str, error: Exception) -> str:
    """Return the fix if a model of the Hub could not be read because it has no safetensors, else nothing."""
    return f" ({_fix(path)})" if isinstance(error, OSError) and ".safetensors" in str(error) else ""


def _fix(path: str) -> str:
    return (
        "only safetensors are read, as a pickle can run code. Convert it where that does no harm: "
        f"AutoModelForCausalLM.from_pretrained({path!r}).save_pretrained(...) writes safetensors"
    )
