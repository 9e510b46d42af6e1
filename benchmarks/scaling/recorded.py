"""What the collectives of real steps move: ``python recorded.py FOLDER``, in as many processes as a launcher starts.

Trains the configurations in ``FOLDER/configs.json``, one after the other, and puts what each run's mean step, but for
the first, has moved into ``collectives.json`` in its output_dir: bytes put together or summed, by phase and kind of
collective. It imports nothing from beside it, so that it can be started as a file.
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

# Which argument has what is put together or summed, and what costs.communication calls it.
_OPERATIONS = {"_allgather_base_": (0, "gather"), "_reduce_scatter_base_": (1, "scatter"), "allreduce_": (0, "reduce")}


class Collectives(TorchDispatchMode):
    """Counts the bytes of the collectives that are called, those of DDP and FSDP2 in C++ and in backward passes too."""

    def __init__(self, timer: PhaseTimer) -> None:
        super().__init__()
        self.timer = timer
        self.bytes: Counter[str] = Counter()  # of "phase kind"

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace == "c10d":
            name = function.name().split("::")[1]
            place, kind = _OPERATIONS.get(name, (0, name))
            tensors = [args[place]] if isinstance(args[place], torch.Tensor) else args[place]
            if all(tensor.dtype != torch.int64 for tensor in tensors):  # in which hosts talk
                self.bytes[f"{self.timer.running} {kind}"] += sum(tensor.nbytes for tensor in tensors)
        return function(*args, **(kwargs or {}))


def record(config: Config) -> dict[str, Any]:
    """Train ``config``: what its mean step, the first left out, moved and took."""
    moved = Counter[str]()

    def recorded(run: Run, step: int, meter: Meter) -> None:
        with Collectives(run.timer) as collectives:
            train_step(run, step, meter)
        if step:
            moved.update(collectives.bytes)

    with patch.object(loop, "train_step", recorded):
        loop.train(config, progress=False)
    AcceleratorState._reset_state()  # which has one precision a process
    return {what: number / (config.max_steps - 1) for what, number in moved.items()}


def main(folder: Path) -> None:
    warnings.simplefilter("ignore")
    for values in json.loads((folder / "configs.json").read_text(encoding="utf-8")):
        found = record(Config(**values))
        if dist.get_rank() == 0:
            path = Path(values["output_dir"]) / "collectives.json"
            path.write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
