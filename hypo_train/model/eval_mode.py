"""A context manager that puts a model in eval mode."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Put ``model`` in eval mode for a block, then give each module its previous mode.

    In train mode, gradient checkpointing drops the KV cache and LoRA applies its dropout: samples would be wrong,
    without an error. Mixtures of experts return no router logits in the block: with them, transformers' ``generate``
    fails on a padded batch.
    """
    modes = {module: module.training for module in model.modules()}
    configs = [vars(module)["config"] for module in modes if "config" in vars(module)]
    with_routers = [config for config in configs if getattr(config, "output_router_logits", False)]
    try:
        model.eval()
        for config in with_routers:
            config.output_router_logits = False
        yield
    finally:
        for config in with_routers:
            config.output_router_logits = True
        for module, training in modes.items():
            module.training = training
