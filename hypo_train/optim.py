"""AdamW and the learning rate over the run."""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import partial

from torch import nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

SCHEDULES = ("linear", "cosine", "constant")


def build_optimizer(
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    *,
    learning_rate: float,
    weight_decay: float = 0.0,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
) -> AdamW:
    """AdamW over the parameters that require gradients, fused where all of them lie on CUDA.

    Weights that multiply (two dimensions or more) decay; biases and norm scales do not.

    Raises:
        ValueError: none of the parameters requires a gradient.
    """
    trained = [parameter for _, parameter in named_parameters if parameter.requires_grad]
    if not trained:
        raise ValueError("there is nothing to train: no parameter requires a gradient")
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return AdamW(
        [group for group in groups if group["params"]],
        lr=learning_rate,
        betas=betas,
        eps=eps,
        fused=True if all(p.is_cuda for p in trained) else None,
    )


def build_scheduler(optimizer: Optimizer, kind: str, warmup_steps: int, total_steps: int) -> LambdaLR:
    """The schedule `lr_at` on the optimizer's learning rates; call its `step()` after each optimizer step.

    Raises:
        ValueError: an unknown kind, or a warm-up that is negative or longer than the run.
    """
    if kind not in SCHEDULES:
        raise ValueError(f"the learning rate schedule is {kind!r}: it must be one of {', '.join(SCHEDULES)}")
    if total_steps < 1:
        raise ValueError(f"total_steps is {total_steps}: it must be at least 1")
    if not 0 <= warmup_steps <= total_steps:
        raise ValueError(f"warmup_steps is {warmup_steps}: it must lie between 0 and total_steps = {total_steps}")
    schedule = partial(lr_at, kind=kind, warmup_steps=warmup_steps, total_steps=total_steps)
    return LambdaLR(optimizer, schedule)


def lr_at(step: int, *, kind: str, warmup_steps: int, total_steps: int) -> float:
    """The learning rate after `step` optimizer steps, as a fraction of its peak.

    It rises from 0 to 1 over the warm-up; then linear and cosine fall to 0 at `total_steps`. These are
    transformers' schedules, so that a run can be set against TRL's step by step.
    """
    if step < warmup_steps:
        return step / warmup_steps
    if kind == "constant":
        return 1.0
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    return 1 - progress if kind == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
