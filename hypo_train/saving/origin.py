"""What a run's checkpoints belong to, beside its settings: the rows that its steps are cut from, and the weights that
it started from and a checkpoint does not hold.

A file of data or a model may change under its name. A run that went on with it would be neither the one nor the other.
"""

from __future__ import annotations

import dataclasses
import hashlib
from array import array
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from hypo_train.fingerprint import fingerprint
from hypo_train.model.policy import Policy
from hypo_train.model.reward_model import RewardModel
from hypo_train.model.sharding import whole


def rows_hash(rows: Sequence[Any]) -> str:
    """SHA-256 of every token of every row, in order, each list of them told from the next by its length."""
    digest = hashlib.sha256()
    names = [field.name for field in dataclasses.fields(rows[0]) if field.name != "row"] if rows else []
    for row in rows:
        for name in names:
            ids = getattr(row, name)
            digest.update(array("q", (len(ids), *ids)).tobytes())
    return digest.hexdigest()


def weights_hash(trained: Policy | RewardModel) -> str:
    """Of the parameters that are not trained, and of the reference's copies of those that are, before any step.

    It is the same however they are spread over processes, all of which call this.
    """
    kept: dict[str, Tensor] = {name: p for name, p in trained.named_parameters() if not p.requires_grad}
    copies = trained.reference_parameters if isinstance(trained, Policy) else {}
    digest = hashlib.sha256()
    for name, tensor in sorted({**kept, **copies}.items()):
        digest.update(f"{name} {fingerprint(whole(tensor))}\n".encode())
    return digest.hexdigest()
