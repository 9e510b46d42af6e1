"""Record the bytes of the collectives in real steps: ``torchrun recorded.py FOLDER``.

It trains the configurations in ``FOLDER/configs.json`` one after the other. In the output_dir of each run it writes
``collectives.json``: the mean bytes that a step gathers or sums, by phase and kind of collective, without the first
step. It imports no other module of this folder, so that it can be started as a file.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections import Counter
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState
from torch.utils._python_dispatch import TorchDispatchMode

import hypo_train.train as loop
from hypo_train.build import Run
from hypo_train.config import Config
from hypo_train.metrics.meter import Meter
from hypo_train.metrics.timing import PhaseTimer
from hypo_train.step import train_step

# Operation -> the index of the argument with the full tensor, and the kind of step_time.Exchange.
_OPERATIONS = {"_allgather_base_": (0, "gather"), "_reduce_scatter_base_": (1, "scatter"), "allreduce_": (0, "reduce")}


class Collectives(TorchDispatchMode):
    """Count the bytes of all collectives, including those that DDP and FSDP2 call from C++ or in backward passes."""

    def __init__(self, timer: PhaseTimer) -> None:
        super().__init__()
        self.timer = timer
        self.bytes: Counter[str] = Counter()  # by "phase kind"

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace == "c10d":
            name = function.name().split("::")[1]
            index, kind = _OPERATIONS.get(name, (0, name))
            tensors = [args[index]] if isinstance(args[index], torch.Tensor) else args[index]
            if all(tensor.dtype != torch.int64 for tensor in tensors):  # int64 tensors are messages between hosts
                self.bytes[f"{self.timer.running} {kind}"] += sum(tensor.nbytes for tensor in tensors)
        return function(*args, **(kwargs or {}))


def record(config: Config) -> dict[str, Any]:
    """Train ``config`` and return the mean bytes of a step, without the first, by phase and kind."""
    num_bytes = Counter[str]()

    def recorded(run: Run, step: int, meter: Meter) -> None:
        with Collectives(run.timer) as collectives:
            train_step(run, step, meter)
        if step:
            num_bytes.update(collectives.bytes)

    with patch.object(loop, "train_step", recorded):
        loop.train(config, progress=False)
    AcceleratorState._reset_state()  # it allows only one precision in a process
    return {name: number / (config.max_steps - 1) for name, number in num_bytes.items()}


def main(folder: Path) -> None:
    warnings.simplefilter("ignore")
    for values in json.loads((folder / "configs.json").read_text(encoding="utf-8")):
        collectives = record(Config(**values))
        if dist.get_rank() == 0:
            path = Path(values["output_dir"]) / "collectives.json"
            path.write_text(json.dumps(collectives), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
