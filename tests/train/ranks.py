"""Several processes of one run, started as torchrun starts them.

``python ranks.py FOLDER`` trains the configurations in ``FOLDER/configs.json``, one after the other in one start.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from hypo_train.config import Config
from hypo_train.metrics.log import read_metrics, without_costs
from hypo_train.train import train

WORLD = 2


def started(arguments: Sequence[str], world: int = WORLD) -> list[subprocess.Popen[str]]:
    """The processes of ``python ARGUMENTS``, by rank; modules of this folder can be imported there."""
    port = free_port()
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    shared = {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    shared |= {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    return [
        subprocess.Popen(
            [sys.executable, *arguments],
            env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world)
    ]


def free_port() -> str:
    """One of this machine that nobody listens at."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return str(free.getsockname()[1])


def ended(processes: list[subprocess.Popen[str]]) -> list[tuple[int, str, str]]:
    """Exit status, standard output and standard error of each, by rank."""
    found = [process.communicate(timeout=280) for process in processes]
    return [(process.returncode, out, error) for process, (out, error) in zip(processes, found, strict=True)]


def launch(folder: Path, configs: list[Config]) -> None:
    """Train them in several processes."""
    folder.mkdir(exist_ok=True)
    (folder / "configs.json").write_text(json.dumps([config.model_dump() for config in configs]), encoding="utf-8")
    for status, _, error in ended(started([__file__, str(folder)])):
        assert status == 0, error


def assert_logged_alike(run: Path, expected: Path, *, kl: float = 1e-5) -> None:
    """Two runs' metrics are the same to rounding, however processes divided them; a KL of samples to ``kl``."""
    found, lines = (read_metrics(folder / "metrics.jsonl") for folder in (run, expected))
    assert [line["step"] for line in found] == [line["step"] for line in lines]
    for pair in zip(found, lines, strict=True):
        # Ratios are of a micro-batch, which processes divide.
        line, like = ({k: v for k, v in without_costs(of).items() if "sampling/" not in k} for of in pair)
        assert line.keys() == like.keys()
        for key, value in like.items():
            if key == "rewards/accuracies" and like["rewards/margins"] == pytest.approx(0, abs=1e-5):
                continue  # before the first update a policy is its reference, and the sign of a margin is rounding's
            close = 1e-4 if key == "grad_norm" else kl if "kl" in key.split("_") else 1e-5
            assert line[key] == pytest.approx(value, rel=close, abs=close), (key, line["step"])


def final(run: Path) -> dict[str, Tensor]:
    """The weights that a run ended with."""
    return load_file(next((run / "final").glob("*.safetensors")))


def assert_saved_alike(run: Path, expected: Path) -> None:
    """Two runs' final weights are the same to rounding."""
    found, weights = final(run), final(expected)
    assert found.keys() == weights.keys()
    for key, value in weights.items():
        torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-4, msg=lambda text, key=key: f"{key}: {text}")


def main(folder: Path) -> None:
    warnings.simplefilter("ignore")
    for values in json.loads((folder / "configs.json").read_text(encoding="utf-8")):
        config = Config(**values)
        with ExitStack() as patches:
            patches.enter_context(patch("hypo_train.preflight.checks._check_memory"))  # as in tests of one process
            if config.fsdp and os.environ["RANK"] != "0":  # it is given its part, and reads no weights
                readers = {"load_policy": None, "load_reward_model": None}
                patches.enter_context(patch.multiple("hypo_train.build", **readers))
            train(config, progress=False)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
