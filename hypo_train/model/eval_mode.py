"""A context manager that puts a model in eval mode."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Put ``model`` in eval mode for a block, then give each module its previous mode.

    In train mode, gradient checkpointing drops the KV cache and LoRA applies its dropout: samples would be wrong,
    without an error.
    """
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()
        yield
    finally:
        for module, training in modes.items():
            module.training = training
