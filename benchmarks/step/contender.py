"""The interface of every measured trainer, TRL's or this project's."""

from __future__ import annotations

import itertools
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from benchmarks.step.material import Ids, Material

# So small that no fp32 weight changes while AdamW does all of its work: every step starts from the same weights.
LEARNING_RATE = 1e-12


class Tap:
    """Stands between a trainer and its sampler: counts the drawn tokens, or returns given completions."""

    def __init__(self, material: Material) -> None:
        self.given: dict[Ids, list[list[int]]] | None = None
        self.tokens = 0
        self.prompts: set[Ids] = set()
        self.material = material

    def answer(self, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
        """Return one given completion for each prompt, in turns if a prompt is repeated."""
        assert self.given is not None
        left = {prompt: itertools.cycle(completions) for prompt, completions in self.given.items()}
        return [next(left[tuple(prompt)]) for prompt in prompts]

    def note(self, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]]) -> None:
        self.prompts |= {tuple(prompt) for prompt in prompts}
        self.tokens += sum(map(len, completions))


class Contender(ABC):
    """A trainer with its model, optimizer and batch, ready for an optimizer step."""

    optimizer: Any

    def __init__(self, material: Material) -> None:
        self.tap = Tap(material)

    @abstractmethod
    def step(self) -> float | None:
        """Run one optimizer step with its sampling, without loading and tokenizing. Return DPO's loss."""

    @abstractmethod
    def timed_step(self) -> dict[str, float]:
        """Run one step and wait for the device. Return the seconds of each phase; they add up to the step's."""

    @abstractmethod
    def parameters(self) -> dict[str, torch.nn.Parameter]:
        """Return the policy's parameters, trained and frozen, by their names in the transformers model."""

    @abstractmethod
    def references(self) -> dict[str, Tensor]:
        """Return the weights that only the reference has, by the same names."""

    @abstractmethod
    def seen_pairs(self) -> set[tuple[Ids, Ids, Ids]]:
        """Return the (prompt, chosen, rejected) ids that enter the model."""

    def flop(self) -> float | None:
        """Return the FLOP of all matrix products since the last call; None if they are not counted."""
        return None

    def trained(self) -> dict[str, torch.nn.Parameter]:
        return {name: p for name, p in self.parameters().items() if p.requires_grad}

    def moments(self) -> dict[str, Tensor]:
        """Return AdamW's state after the first step."""
        state = getattr(self.optimizer, "optimizer", self.optimizer).state  # accelerate wraps it
        return {
            f"{name}/{key}": value
            for name, parameter in self.trained().items()
            for key, value in state[parameter].items()
            if isinstance(value, Tensor) and value.ndim > 0
        }

    def held(self) -> list[tuple[str, str, Tensor]]:
        """Return kind, name and tensor of policy, reference and AdamW's state, which stay in memory between steps."""
        kinds: dict[str, Mapping[str, Tensor]] = {
            "policy": self.parameters(),
            "reference": self.references(),
            "moment": self.moments(),
        }
        return [(kind, name, tensor) for kind, named in kinds.items() for name, tensor in named.items()]

    def held_bytes(self) -> int:
        return sum({tensor.data_ptr(): tensor.nbytes for _, _, tensor in self.held()}.values())


def move_from_reference(contender: Contender) -> None:
    """Add the same noise, seeded by the parameter's name, to the trained weights of every contender.

    If policy and reference are equal, every log-ratio is 0, and a wrong loss or gradient would not show.
    """
    with torch.no_grad():
        for name, parameter in contender.trained().items():
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            noise = torch.randn(parameter.shape, generator=generator).to(parameter)
            if "lora_" in name:  # each library initializes A randomly, and B to zero
                parameter.copy_(0.02 * noise)
            else:
                parameter.add_(0.02 * parameter.square().mean().sqrt() * noise)


class Pool:
    """Keeps one copy of the tensors that are equal in all contenders of a process, so that a GPU holds all of them.

    Weights do not move (see LEARNING_RATE), so all contenders can share them. AdamW's moments move, but their values do
    not change a step's work.
    """

    def __init__(self) -> None:
        self._tensors: dict[tuple[str, str], Tensor] = {}

    def share(self, contender: Contender) -> None:
        for kind, name, tensor in contender.held():
            tensor.data = self._tensors.setdefault((kind, name), tensor.data)


@contextmanager
def caught_gradients(contender: Contender) -> Iterator[dict[str, Tensor]]:
    """Yield a dict that gets the clipped gradients of the step inside the block, on the host in fp32."""
    found: dict[str, Tensor] = {}
    optimizer = contender.optimizer
    step = optimizer.step

    @wraps(step)  # a scheduler looks for a marker on the method
    def catch(*args: Any, **kwargs: Any) -> Any:
        for name, parameter in contender.trained().items():
            if parameter.grad is not None:
                found[name] = parameter.grad.detach().to("cpu", torch.float32, copy=True)
        return step(*args, **kwargs)

    optimizer.step = catch
    try:
        yield found
    finally:
        del optimizer.step


def distance(gradients: Mapping[str, Tensor], truth: Mapping[str, Tensor]) -> float:
    """Return |g - truth| / |truth| over all parameters; infinity if a gradient is missing or NaN."""
    if gradients.keys() != truth.keys():
        return float("inf")
    error = sum(float((gradients[name] - truth[name]).double().square().sum()) for name in truth)
    size = sum(float(value.double().square().sum()) for value in truth.values())
    found = (error / size) ** 0.5
    return found if found == found else float("inf")
