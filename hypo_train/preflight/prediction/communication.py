"""What the processes of a run exchange in a step, from shapes alone.

Where each holds all weights (DDP), gradients are summed once a step, in its last micro-batch. Where they share the
weights (``fsdp: true``), each layer, and what lies in none, is put together for every pass that runs it: once for all
samples of a draw, and in *each* micro-batch for the reference, for the forward pass and again for the backward pass,
whose gradients are summed and divided at once. In the backward pass layers below the trained ones are left out, but
for one that is fetched ahead in vain.

Left out, as next to nothing: buffers, norms of gradients, what hosts tell each other; and what happens in no step:
evaluations, checkpoints, the reference's pass beforehand.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch

from hypo_train.model.policy import Policy
from hypo_train.model.reward_model import RewardModel
from hypo_train.preflight.sharded_sizes import Groups, groups

Kind = Literal["gather", "scatter", "reduce"]  # all-gather, reduce-scatter, all-reduce


@dataclass(frozen=True)
class Exchange:
    """What one phase of a step exchanges, in bytes of the tensors that are put together or summed."""

    phase: str  # of costs.phases
    kind: Kind
    outside: float  # of what lies in no layer, which a pass begins or ends with
    layers: float  # which are exchanged while other layers compute

    @property
    def whole(self) -> float:
        return self.outside + self.layers

    def sent(self, count: int) -> float:
        """Bytes that each of ``count`` processes sends, in a ring: an all-reduce is a reduce-scatter and a gather."""
        return self.whole * (count - 1) / count * (2 if self.kind == "reduce" else 1)


@dataclass(frozen=True)
class Passes:
    """How often a step does what is exchanged for; means over the steps of a run."""

    draws: float  # of samples
    micro_batches: float
    of_reference: float


def exchanges(
    trained: Policy | RewardModel, passes: Passes, *, count: int, sharded: bool, autocast: bool
) -> list[Exchange]:
    """Of a step in ``count`` processes.

    Args:
        trained: before it is sharded, as on the meta device.
        sharded: as ``fsdp: true`` shards it.
        autocast: under bfloat16, in which weights then are exchanged; gradients are summed in fp32.
    """
    if count == 1:
        return []
    own = groups(trained)
    if not sharded:
        gradients = 4 * sum(p.numel() for p in trained.parameters() if p.requires_grad)
        return [Exchange("backward", "reduce", 0, gradients)]
    outside = _gathered(own.outside, count, autocast)
    of_layers = [_gathered(layer, count, autocast) for layer in own.layers]
    backward = sum(of_layers[_first_of_backward(own) :])
    n = passes.micro_batches
    found = [
        Exchange("sample", "gather", passes.draws * outside, passes.draws * sum(of_layers)),
        Exchange("reference", "gather", passes.of_reference * outside, passes.of_reference * sum(of_layers)),
        Exchange("forward", "gather", n * outside, n * sum(of_layers)),
        Exchange("backward", "gather", n * outside, n * backward),
        Exchange(
            "backward",
            "scatter",
            n * _summed(own.outside, count),
            n * sum(_summed(layer, count) for layer in own.layers),
        ),
    ]
    return [exchange for exchange in found if exchange.whole]


def _first_of_backward(own: Groups) -> int:
    """The lowest layer that is put together for the backward pass: one below the lowest that is trained."""
    trained = [any(p.requires_grad for p in layer) for layer in own.layers]
    return max(0, trained.index(True) - 1) if True in trained else len(trained)


def _gathered(parameters: Iterable[torch.nn.Parameter], count: int, autocast: bool) -> int:
    return sum(_padded(p, count) * (2 if autocast else p.element_size()) for p in parameters)


def _summed(parameters: Iterable[torch.nn.Parameter], count: int) -> int:
    return sum(_padded(p, count) * 4 for p in parameters if p.requires_grad)


def _padded(parameter: torch.nn.Parameter, count: int) -> int:
    """Elements, with the rows that make the first dimension one that ``count`` divides."""
    rows, *rest = parameter.shape
    return -(-rows // count) * count * math.prod(rest)
