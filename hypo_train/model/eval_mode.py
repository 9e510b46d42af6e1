"""eval() for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """eval(), each module's own mode put back afterwards.

    In train mode, gradient checkpointing drops the KV cache and LoRA applies its dropout: wrong tokens, and
    no error.
    """
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()
        yield
    finally:
        for module, training in modes.items():
            module.training = training
