"""Losses as arguments of an operator, which takes numbers and strings, but no Python objects.

A built-in loss is its name with its words, and a list of its numbers: these may change from call to call without a new
compilation. Any other object is kept in a table, and the operator takes its key.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import torch

from hypo_kernels.losses import LOSSES, BuiltIn
from hypo_kernels.pairs import PairLoss

# The parameters of each built-in loss, by their default's type: words, and numbers.
PARAMETERS: dict[str, tuple[list[str], list[str]]] = {
    name: (
        [field.name for field in fields(loss) if isinstance(field.default, str)],
        [field.name for field in fields(loss) if not isinstance(field.default, str)],
    )
    for name, loss in LOSSES.items()
}
_OBJECTS: dict[str, Any] = {}  # grows by one for each object that is compiled into a graph


def of_pair_loss(loss: PairLoss) -> tuple[str, list[float]]:
    """Return a handle and the numbers of ``loss``: :func:`to_pair_loss` returns an equal loss."""
    if not isinstance(loss, BuiltIn) or LOSSES.get(loss.name) is not type(loss):
        return of_object(loss), []
    words, numbers = PARAMETERS[loss.name]
    return " ".join([loss.name, *(getattr(loss, name) for name in words)]), [getattr(loss, name) for name in numbers]


def to_pair_loss(handle: str, numbers: Sequence[float]) -> PairLoss:
    """Return the loss of a handle and its numbers."""
    if handle in _OBJECTS:
        loss: PairLoss = _OBJECTS[handle]
        return loss
    name, *words = handle.split(" ")
    parameters = zip([*PARAMETERS[name][0], *PARAMETERS[name][1]], [*words, *numbers], strict=True)
    built_in: PairLoss = LOSSES[name](**dict(parameters))
    return built_in


@torch._dynamo.assume_constant_result
def of_object(loss: Any) -> str:
    """Return a key of ``loss``, for :func:`to_object`."""
    for key, known in _OBJECTS.items():
        if known is loss:
            return key
    key = f"object {len(_OBJECTS)}"
    _OBJECTS[key] = loss
    return key


def to_object(key: str) -> Any:
    """Return the object of a key."""
    return _OBJECTS[key]
