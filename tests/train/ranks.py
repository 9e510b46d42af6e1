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
from pathlib import Path

from hypo_train.config import Config
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


def main(folder: Path) -> None:
    warnings.simplefilter("ignore")
    for values in json.loads((folder / "configs.json").read_text(encoding="utf-8")):
        train(Config(**values), progress=False)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
