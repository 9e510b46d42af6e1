"""What an optimizer keeps spread over the processes by DeepSpeed: its state (ZeRO-1), gradients too (ZeRO-2).

Weights stay whole on every process: sampling, the reference and the head are as without it. DeepSpeed lays an
optimizer's groups end to end in one flat tensor each, of which every process updates its part; the optimizer itself
is the run's own.
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

BUCKET = 50_000_000  # gradients that are exchanged at a time: 200 MB


def require_deepspeed(config: Config) -> None:
    """Raise ConfigError where the run asks for ZeRO, and DeepSpeed is not installed."""
    if config.zero_stage and importlib.util.find_spec("deepspeed") is None:
        raise ConfigError(
            f"zero_stage={config.zero_stage} needs DeepSpeed: pip install deepspeed (or use fsdp: true, which needs "
            "nothing more)"
        )


class ZeroOptimizer(Optimizer):
    """An optimizer of parameters that lie whole on every process, whose state lies there in parts.

    ``state_dict`` gives on the main process what the optimizer would have alone, and ``load_state_dict`` takes that on
    every one: a checkpoint knows nothing of the parts.
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
        """DeepSpeed's engine around ``model`` and ``optimizer``, whose groups hold flat parts from here on.

        Args:
            optimizer: one that treats every element alike, as AdamW.
            stage: 1 or 2.
            max_grad_norm: of all gradients together; 0 = they are not clipped.
            autocast: compute under bfloat16; gradients are exchanged in their own dtype.
        """
        super().__init__([{**group, "params": list(group["params"])} for group in optimizer.param_groups], {})
        self._parts, self._processes = optimizer, processes
        self.engine = _engine(model, optimizer, stage=stage, max_grad_norm=max_grad_norm, autocast=autocast)

    def exchanges_after(self, *, last: bool) -> None:
        """Before each micro-batch: whether it is the step's last one. Stage 2 exchanges gradients after every one."""
        self.engine.set_gradient_accumulation_boundary(last)

    def backward(self, loss: Tensor) -> None:
        """Gradients of a loss () that is weighted as it counts in the step."""
        self.engine.backward(loss, scale_wrt_gas=False)

    def step(self, closure: None = None) -> Tensor:  # type: ignore[override]
        """Clip and change the weights; the gradients' global norm before, (): infinite if one of them is not finite,
        and nothing has changed then."""
        self.engine.step()
        device = next(iter(self.param_groups[0]["params"])).device
        return torch.as_tensor(self.engine.get_global_grad_norm(), dtype=torch.float32, device=device)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Nothing to do: a step has."""

    @torch.no_grad()
    def weights_changed(self) -> None:
        """After the weights were set from outside: updates start from them."""
        for group, part in zip(self.param_groups, self._own_parts(), strict=True):
            part.copy_(self._part_of(group["params"], part))

    def state_dict(self) -> dict[str, Any]:
        """Asked for by all processes; without a state on any but the main one."""
        state: dict[int, dict[str, Any]] = {}
        first = 0
        for group, part in zip(self.param_groups, self._own_parts(), strict=True):
            parameters, held = group["params"], self._parts.state[part]
            whole = {name: self._whole(value, part, parameters) for name, value in sorted(held.items())}
            if self._processes.is_main:
                entries = [{name: values[i] for name, values in whole.items()} for i in range(len(parameters))]
                state |= dict(enumerate(entries, first))
            first += len(parameters)
        return {"state": state, "param_groups": self._numbered(self._parts.param_groups)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take this process's part of a whole state."""
        state: dict[int, dict[str, Any]] = {}
        first = 0
        for number, (group, part) in enumerate(zip(self.param_groups, self._own_parts(), strict=True)):
            entries = [state_dict["state"].get(first + i) for i in range(len(group["params"]))]
            if entries[0]:
                state[number] = {name: self._own(name, entries, group["params"], part) for name in entries[0]}
            first += len(group["params"])
        groups = [group | {"params": [number]} for number, group in enumerate(state_dict["param_groups"])]
        self._parts.load_state_dict({"state": state, "param_groups": groups})

    def _own_parts(self) -> list[Tensor]:
        return [group["params"][0] for group in self._parts.param_groups]

    def _numbered(self, groups: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Groups with their parameters' numbers in the place of flat parts."""
        numbered, first = [], 0
        for group, of in zip(groups, self.param_groups, strict=True):
            numbered.append({**group, "params": list(range(first, first + len(of["params"])))})
            first += len(of["params"])
        return numbered

    def _whole(self, value: Any, part: Tensor, parameters: list[Tensor]) -> list[Any]:
        """A state's value for each of the parameters; nothing of what lies in parts on any but the main process."""
        if not torch.is_tensor(value) or value.shape != part.shape:
            return [value] * len(parameters)
        flat = self._processes.joined(value.cpu())
        if flat is None:
            return []
        sizes = [p.numel() for p in parameters]
        pieces = flat[: sum(sizes)].split(sizes)
        return [piece.view(p.shape) for piece, p in zip(pieces, parameters, strict=True)]

    def _own(self, name: str, entries: list[dict[str, Any]], parameters: list[Tensor], part: Tensor) -> Any:
        values = [entry[name] for entry in entries]
        if not torch.is_tensor(values[0]) or values[0].shape != parameters[0].shape:
            return values[0]
        return self._part_of(values, part)

    def _part_of(self, tensors: Iterable[Tensor], like: Tensor) -> Tensor:
        """This process's part of whole tensors end to end; what lies behind them is zero."""
        size, own, place = like.numel(), [], 0
        start = self._processes.rank_share.rank * size
        for tensor in tensors:  # never all of them at once: on a device that would be the weights once more
            own.append(tensor.detach().flatten()[max(0, start - place) : max(0, start + size - place)])
            place += tensor.numel()
        found = torch.cat(own)
        return torch.cat([found, found.new_zeros(size - found.numel())])


def _engine(model: nn.Module, optimizer: Optimizer, *, stage: int, max_grad_norm: float, autocast: bool) -> Any:
    on_cpu = next(model.parameters()).device.type == "cpu"
    if on_cpu:
        os.environ["DS_ACCELERATOR"] = "cpu"  # which it would find too, with a warning
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    if on_cpu:
        # An all-reduce that nothing here asks for, and that a compiler would have to make first.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    settings = {
        # How a step is cut up is the loop's: it says which micro-batch is the last, and weights their losses.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": max_grad_norm,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {
            "stage": stage,
            "reduce_bucket_size": min(BUCKET, sum(p.numel() for p in model.parameters() if p.requires_grad)),
            "round_robin_gradients": False,  # parameters lie in a part in their group's order
        },
        "timers": {"throughput": {"enabled": False}},  # which would wait for the device
        # A class named there would exchange its gradients in bfloat16.
        "torch_autocast": {"enabled": autocast, "dtype": "bfloat16", "lower_precision_safe_modules": []},
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings, dist_init_required=False)
    return engine
