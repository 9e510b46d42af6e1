"""Optimizer state sharded over the ranks by DeepSpeed (ZeRO-1), and gradients too (ZeRO-2).

Weights stay full on every rank, so sampling, the reference model and the head need no change. DeepSpeed concatenates
each of an optimizer's groups into one flat tensor, of which every rank updates its part. The optimizer is the one that
the run has configured.
"""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from hypo_train.config import Config, ConfigError
from hypo_train.distributed.processes import Processes

BUCKET = 50_000_000  # gradients that are reduced at a time: 200 MB


def require_deepspeed(config: Config) -> None:
    """Raise ConfigError if the run needs DeepSpeed, and it is not installed."""
    if config.zero_stage and importlib.util.find_spec("deepspeed") is None:
        raise ConfigError(
            f"zero_stage={config.zero_stage} needs DeepSpeed: pip install deepspeed (or use fsdp: true, which needs "
            "nothing more)"
        )


class ZeroOptimizer(Optimizer):
    """An optimizer whose state is sharded over the ranks; its parameters are full on every rank.

    ``state_dict`` gives the main process what an unsharded optimizer would have, and ``load_state_dict`` takes that on
    every rank, so that a checkpoint does not depend on the number of ranks.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        processes: Processes,
        *,
        stage: int,
        max_grad_norm: float,
        autocast: bool,
    ) -> None:
        """Create DeepSpeed's engine for ``model`` and ``optimizer``, whose groups then hold flat parts.

        Args:
            optimizer: one that treats every element alike, such as AdamW.
            stage: 1 or 2.
            max_grad_norm: the largest norm of all gradients together; 0 = no clipping.
            autocast: compute under bfloat16; gradients are reduced in their own dtype.
        """
        super().__init__([{**group, "params": list(group["params"])} for group in optimizer.param_groups], {})
        self._sharded, self._processes = optimizer, processes
        self.engine = _engine(model, optimizer, stage=stage, max_grad_norm=max_grad_norm, autocast=autocast)

    def exchanges_after(self, *, last: bool) -> None:
        """Announce the next micro-batch, and whether it is the step's last. Stage 2 reduces gradients after each."""
        self.engine.set_gradient_accumulation_boundary(last)

    def backward(self, loss: Tensor) -> None:
        """Compute the gradients of a loss () that is already weighted within the step."""
        self.engine.backward(loss, scale_wrt_gas=False)

    def step(self, closure: None = None) -> Tensor:  # type: ignore[override]
        """Clip the gradients, update the weights, and return the gradients' norm () before clipping.

        If a gradient is not finite, the norm is infinite and no weight changes.
        """
        self.engine.step()
        device = next(iter(self.param_groups[0]["params"])).device
        return torch.as_tensor(self.engine.get_global_grad_norm(), dtype=torch.float32, device=device)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Do nothing: ``step`` has freed the gradients."""

    @torch.no_grad()
    def weights_changed(self) -> None:
        """Copy the weights, which code outside has set, to the parts that updates start from."""
        for group, part in zip(self.param_groups, self._flat_parts(), strict=True):
            part.copy_(self._part_of(group["params"], part))

    def state_dict(self) -> dict[str, Any]:
        """Gather the full state on the main process; all ranks must call this. The others get an empty state."""
        state: dict[int, dict[str, Any]] = {}
        first = 0
        for group, part in zip(self.param_groups, self._flat_parts(), strict=True):
            parameters, values = group["params"], self._sharded.state[part]
            full = {name: self._gathered(value, part, parameters) for name, value in sorted(values.items())}
            if self._processes.is_main:
                entries = [{name: values[i] for name, values in full.items()} for i in range(len(parameters))]
                state |= dict(enumerate(entries, first))
            first += len(parameters)
        return {"state": state, "param_groups": self._numbered(self._sharded.param_groups)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take this rank's part of a full state."""
        state: dict[int, dict[str, Any]] = {}
        first = 0
        for number, (group, part) in enumerate(zip(self.param_groups, self._flat_parts(), strict=True)):
            entries = [state_dict["state"].get(first + i) for i in range(len(group["params"]))]
            if entries[0]:
                state[number] = {name: self._scattered(name, entries, group["params"], part) for name in entries[0]}
            first += len(group["params"])
        groups = [group | {"params": [number]} for number, group in enumerate(state_dict["param_groups"])]
        self._sharded.load_state_dict({"state": state, "param_groups": groups})

    def _flat_parts(self) -> list[Tensor]:
        return [group["params"][0] for group in self._sharded.param_groups]

    def _numbered(self, groups: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Return the groups with their parameters' numbers in place of flat parts."""
        numbered, first = [], 0
        for group, full in zip(groups, self.param_groups, strict=True):
            numbered.append({**group, "params": list(range(first, first + len(full["params"])))})
            first += len(full["params"])
        return numbered

    def _gathered(self, value: Any, part: Tensor, parameters: list[Tensor]) -> list[Any]:
        """Return a state's value for each parameter; only the main process gets what is sharded."""
        if not torch.is_tensor(value) or value.shape != part.shape:
            return [value] * len(parameters)
        flat = self._processes.gather_on_main(value.cpu())
        if flat is None:
            return []
        sizes = [p.numel() for p in parameters]
        pieces = flat[: sum(sizes)].split(sizes)
        return [piece.view(p.shape) for piece, p in zip(pieces, parameters, strict=True)]

    def _scattered(self, name: str, entries: list[dict[str, Any]], parameters: list[Tensor], part: Tensor) -> Any:
        """Return this rank's part of a state's values, one for each parameter."""
        values = [entry[name] for entry in entries]
        if not torch.is_tensor(values[0]) or values[0].shape != parameters[0].shape:
            return values[0]
        return self._part_of(values, part)

    def _part_of(self, tensors: Iterable[Tensor], like: Tensor) -> Tensor:
        """Return this rank's part of full tensors laid end to end, padded with zeros."""
        size, pieces, offset = like.numel(), [], 0
        start = self._processes.rank_share.rank * size
        for tensor in tensors:  # not all at once: on a device that would hold the weights a second time
            pieces.append(tensor.detach().flatten()[max(0, start - offset) : max(0, start + size - offset)])
            offset += tensor.numel()
        part = torch.cat(pieces)
        return torch.cat([part, part.new_zeros(size - part.numel())])


def _engine(model: nn.Module, optimizer: Optimizer, *, stage: int, max_grad_norm: float, autocast: bool) -> Any:
    on_cpu = next(model.parameters()).device.type == "cpu"
    if on_cpu:
        os.environ["DS_ACCELERATOR"] = "cpu"  # DeepSpeed would choose it too, with a warning
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    if on_cpu:
        # An all-reduce that is not used here, and that DeepSpeed would compile first.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    settings = {
        # The loop divides a step: it says which micro-batch is the last, and weights their losses.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": max_grad_norm,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {
            "stage": stage,
            "reduce_bucket_size": min(BUCKET, sum(p.numel() for p in model.parameters() if p.requires_grad)),
            "round_robin_gradients": False,  # parameters lie in a part in their group's order
        },
        "timers": {"throughput": {"enabled": False}},  # it would wait for the device
        # The gradients of a class named here would be reduced in bfloat16.
        "torch_autocast": {"enabled": autocast, "dtype": "bfloat16", "lower_precision_safe_modules": []},
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings, dist_init_required=False)
    return engine
