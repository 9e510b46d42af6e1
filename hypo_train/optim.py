"""Build the optimizer and the learning rate schedule.

Names and settings are those of transformers and TRL. All parameters have the same learning rate.
"""

from __future__ import annotations

import importlib.util
import inspect
import math
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import nn
from torch.optim import SGD, AdamW, Muon, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from hypo_train.config import Config, ConfigError

# The role of a parameter, which decides how optimizers treat it.
Role = Literal["embedding", "head", "matrix", "vector"]

_MIN_8BIT_SIZE = 4096  # bitsandbytes keeps the moments of smaller parameters in fp32
_BLOCK = 256  # elements that share one fp32 scale in bitsandbytes


def require_optimizer(config: Config) -> None:
    """Raise ConfigError if the run's optimizer needs a package that is not installed."""
    if config.optim == "adamw_8bit" and importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError("optim=adamw_8bit needs bitsandbytes: pip install bitsandbytes (or use optim: adamw_torch)")


def parameter_roles(model: nn.Module, head: nn.Module | None) -> dict[str, Role]:
    """Return the role of each of the model's parameters, by name. A tied head is an embedding."""
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    head_parameters = set() if head is None else {id(p) for p in head.parameters()}

    def role(parameter: nn.Parameter) -> Role:
        if id(parameter) in tables:
            return "embedding"
        if id(parameter) in head_parameters:
            return "head"
        return "matrix" if parameter.ndim == 2 else "vector"

    return {name: role(parameter) for name, parameter in model.named_parameters()}


def build_optimizer(
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    *,
    learning_rate: float,
    optim: str = "adamw_torch",
    weight_decay: float = 0.0,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    roles: Mapping[str, Role] | None = None,
) -> Optimizer:
    """Build the optimizer called ``optim`` over the parameters that require gradients.

    Weight decay applies to parameters of two dimensions or more, not to biases and norm scales.

    Args:
        optim: as in ``Config``; :func:`require_optimizer` must have passed.
        betas, eps: of Adam and similar optimizers.
        roles: see :func:`parameter_roles`; None = every parameter of two dimensions is a matrix.

    Raises:
        ValueError: no parameter requires a gradient, or none is a matrix for Muon.
    """
    trained = [(name, parameter) for name, parameter in named_parameters if parameter.requires_grad]
    if not trained:
        raise ValueError("there is nothing to train: no parameter requires a gradient")
    adam: dict[str, Any] = {"lr": learning_rate, "betas": betas, "eps": eps}
    if optim == "adafactor":
        return _adafactor(_groups([p for _, p in trained], weight_decay), learning_rate)
    if optim == "adamw_8bit":
        return _adamw_8bit(trained, roles, weight_decay, adam)
    on_cuda = all(p.is_cuda for _, p in trained)
    adam["fused"] = True if on_cuda or optim == "adamw_torch_fused" else None
    if optim == "muon":
        return _muon(trained, roles, weight_decay, adam)
    return AdamW(_groups([p for _, p in trained], weight_decay), **adam)


def _groups(parameters: Sequence[nn.Parameter], weight_decay: float, **options: Any) -> list[dict[str, Any]]:
    """Return a group of the parameters that decay and one of the others, without empty groups."""
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay, **options},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0, **options},
    ]
    return [group for group in groups if group["params"]]


def _split(
    named: Sequence[tuple[str, nn.Parameter]], roles: Mapping[str, Role] | None, wanted: Role
) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Return the parameters with the role ``wanted``, and all others."""
    split: tuple[list[nn.Parameter], list[nn.Parameter]] = ([], [])
    for name, parameter in named:
        role = roles[name] if roles is not None else "matrix" if parameter.ndim == 2 else "vector"
        split[role != wanted].append(parameter)
    return split


def _adafactor(groups: list[dict[str, Any]], learning_rate: float) -> Optimizer:
    """Build transformers' Adafactor with a fixed learning rate, as its Trainer does."""
    from transformers.optimization import Adafactor

    return Adafactor(groups, lr=learning_rate, scale_parameter=False, relative_step=False)


def _adamw_8bit(
    named: Sequence[tuple[str, nn.Parameter]],
    roles: Mapping[str, Role] | None,
    weight_decay: float,
    adam: Mapping[str, Any],
) -> Optimizer:
    """Build bitsandbytes' AdamW as transformers' Trainer does: 8-bit moments, 32-bit for embeddings."""
    from bitsandbytes.optim import AdamW8bit

    class AdamW8bitByGroup(
        AdamW8bit
    ):  # bitsandbytes' way to set bits by parameter is a global table that is never cleared
        def get_config(self, gindex: int, pindex: int, group: dict[str, Any]) -> dict[str, Any]:
            return super().get_config(gindex, pindex, group) | {"optim_bits": group["optim_bits"]}

    embeddings, others = _split(named, roles, "embedding")
    groups = [*_groups(others, weight_decay, optim_bits=8), *_groups(embeddings, weight_decay, optim_bits=32)]
    return AdamW8bitByGroup(groups, min_8bit_size=_MIN_8BIT_SIZE, **adam)


def _muon(
    named: Sequence[tuple[str, nn.Parameter]],
    roles: Mapping[str, Role] | None,
    weight_decay: float,
    adam: Mapping[str, Any],
) -> Optimizer:
    matrices, others = _split(named, roles, "matrix")
    if not matrices:
        raise ValueError("optim=muon: none of the trained parameters is a matrix, use optim: adamw_torch")
    # This scales updates to the size of AdamW's, so that both use the same learning rate.
    muon = Muon(matrices, lr=adam["lr"], weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
    return MuonAndAdamW(muon, AdamW(_groups(others, weight_decay), **adam) if others else None)


class MuonAndAdamW(Optimizer):
    """One optimizer of two: Muon for the matrices between embeddings and head, AdamW for all other parameters."""

    def __init__(self, muon: Muon, adamw: AdamW | None) -> None:
        self._parts: list[Optimizer] = [muon] if adamw is None else [muon, adamw]
        super().__init__([group for part in self._parts for group in part.param_groups], {"lr": muon.defaults["lr"]})

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update all parameters."""
        start = 0
        for part in self._parts:  # loading a state replaces this optimizer's groups and state
            stop = start + len(part.param_groups)
            part.param_groups, part.state = self.param_groups[start:stop], self.state
            start = stop
            part.step()


class Footprint(NamedTuple):
    """The bytes that an optimizer needs in addition to weights and gradients."""

    what: str
    state: int
    temporary: int  # during a step


def footprint(
    optim: str, named: Iterable[tuple[str, nn.Parameter]], *, roles: Mapping[str, Role], device_type: str
) -> Footprint:
    """Return the footprint of the optimizer called ``optim`` on ``device_type`` for the trained fp32 parameters."""
    shapes = [(roles[name], p.shape, p.numel()) for name, p in named if p.requires_grad]
    largest = 4 * max(count for _, _, count in shapes)
    eight = [(2 * count + 8 * math.ceil(count / _BLOCK), count) for _, _, count in shapes]
    moments = 8 * sum(count for _, _, count in shapes)
    # On a CPU, AdamW makes two temporaries of a tensor's size. On CUDA, and if fused, it is one kernel.
    plain = 2 * largest if device_type == "cpu" else 0
    if optim == "adafactor":
        factored = sum(4 * (s.numel() // s[-1] + s.numel() // s[-2]) if len(s) >= 2 else 4 * n for _, s, n in shapes)
        return Footprint("Adafactor's rows and columns (float32)", factored, 2 * largest)
    if optim == "adamw_8bit":
        small = [r == "embedding" or n < _MIN_8BIT_SIZE for r, _, n in shapes]
        state = sum(8 * n if fp32 else packed for fp32, (packed, n) in zip(small, eight, strict=True))
        return Footprint("AdamW's two moments (8 bits, embeddings 32)", state, 5 * plain // 2)
    if optim == "muon":
        state = sum((4 if role == "matrix" else 8) * count for role, _, count in shapes)
        matrices = [s for role, s, _ in shapes if role == "matrix"]
        return Footprint(
            "Muon's momentum, AdamW's moments (float32)", state, max(plain, *map(_newton_schulz, matrices))
        )
    return Footprint("AdamW's two moments (float32)", moments, 0 if optim == "adamw_torch_fused" else plain)


def _newton_schulz(shape: torch.Size) -> int:
    """Return the bytes of Muon's orthogonalisation, without temporaries of the BLAS library.

    They are the fp32 update, two bf16 matrices of its size, and two square ones of its shorter side.
    """
    return 4 * shape.numel() + 2 * 2 * shape.numel() + 2 * 2 * min(shape) ** 2


def require_schedule(config: Config) -> None:
    """Raise ConfigError if the run's schedule does not take the arguments ``lr_scheduler_kwargs``."""
    optimizer = SGD([nn.Parameter(torch.zeros(1))], lr=config.learning_rate)
    try:
        scheduler = build_scheduler(optimizer, config.lr_scheduler_type, 1, 4, config.lr_scheduler_kwargs)
        for _ in range(4):
            optimizer.step()
            scheduler.step()
    except (TypeError, ValueError, ArithmeticError) as error:
        raise ConfigError(
            f"lr_scheduler_kwargs={config.lr_scheduler_kwargs} with lr_scheduler_type={config.lr_scheduler_type}: "
            f"{error} (it takes: {', '.join(_schedule_arguments(config.lr_scheduler_type)) or 'none'})"
        ) from None


def _schedule_arguments(kind: str) -> list[str]:
    """Return the names of the arguments of transformers' schedule ``kind``."""
    from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION
    from transformers.trainer_utils import SchedulerType

    function: Any = TYPE_TO_SCHEDULER_FUNCTION[SchedulerType(kind)]
    names = inspect.signature(function).parameters
    return [name for name in names if name not in ("optimizer", "num_warmup_steps", "num_training_steps", "last_epoch")]


def build_scheduler(
    optimizer: Optimizer, kind: str, warmup_steps: int, total_steps: int, kwargs: Mapping[str, Any] | None = None
) -> LambdaLR:
    """Return the schedule ``kind``. Call its ``step()`` after each optimizer step.

    It is that of :func:`lr_at`, or transformers' if that has none of this kind or ``kwargs`` are given.

    Raises:
        TypeError, ValueError: the schedule does not take these ``kwargs``.
    """
    if kind in _OWN_SCHEDULES and not kwargs:
        return LambdaLR(optimizer, partial(lr_at, kind=kind, warmup_steps=warmup_steps, total_steps=total_steps))
    from transformers import get_scheduler

    if unknown := [name for name in kwargs or {} if name not in _schedule_arguments(kind)]:
        raise ValueError(f"there is no argument {unknown[0]}")
    scheduler: LambdaLR = get_scheduler(kind, optimizer, warmup_steps, total_steps, dict(kwargs or {}))
    return scheduler


_OWN_SCHEDULES = ("linear", "cosine", "constant", "constant_with_warmup")


def lr_at(step: int, *, kind: str, warmup_steps: int, total_steps: int) -> float:
    """Return the learning rate after ``step`` optimizer steps, as a fraction of its peak.

    It rises from 0 to 1 over the warm-up. Then "linear" and "cosine" fall to 0 at ``total_steps``; "constant" and
    "constant_with_warmup" stay. These are transformers' schedules; its linear one rounds differently in the last bit.
    """
    if step < warmup_steps:
        return step / warmup_steps
    if kind.startswith("constant"):
        return 1.0
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    return 1 - progress if kind == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
