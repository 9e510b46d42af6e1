"""Several processes of one run, started as torchrun starts them, and waited for by their progress.

``python ranks.py FOLDER`` trains the configurations in ``FOLDER/configs.json``, one after the other in one start.
"""

from __future__ import annotations

import json
import os
import resource
import socket
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import IO, NamedTuple
from unittest.mock import patch

import psutil
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from hypo_train.config import Config
from hypo_train.metrics.log import read_metrics, without_costs
from hypo_train.train import train

WORLD = 2
# A process that waits for one that never answers uses no CPU, however busy the machine is. Work that never ends uses
# more CPU than the longest of these tests, which needs 150 seconds.
IDLE_SECONDS = 180
CPU_SECONDS = 1500


class RankProcess(NamedTuple):
    process: subprocess.Popen[str]
    output: IO[str]
    errors: IO[str]


def start(arguments: Sequence[str], world: int = WORLD) -> list[RankProcess]:
    """Start ``python ARGUMENTS`` once for each rank; modules of this folder can be imported there."""
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    shared = {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "localhost"}
    shared |= {"MASTER_PORT": free_port(), "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    ranks = []
    for rank in range(world):
        environment = os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        output, errors = (tempfile.TemporaryFile("w+") for _ in range(2))  # noqa: SIM115
        process = popen([sys.executable, *arguments], env=environment, stdout=output, stderr=errors)
        ranks.append(RankProcess(process, output, errors))
    return ranks


def popen(command: Sequence[str], **options: object) -> subprocess.Popen[str]:
    """Start a command that the kernel ends when it has used too much CPU."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))

    return subprocess.Popen(command, text=True, preexec_fn=limit, **options)


def free_port() -> str:
    """Return a port of this machine that is not in use."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return str(free.getsockname()[1])


def wait_until(done: Callable[[], bool], processes: Sequence[subprocess.Popen[str]]) -> None:
    """Wait for ``done()`` as long as the processes use the CPU; if they stay idle, kill them and fail.

    Processes that wait for each other's collectives use a few hundredths of a second of CPU in a second.
    """
    used, since = sum(map(_cpu_seconds, processes)), time.monotonic()
    while not done():
        waited = time.monotonic() - since
        if abs((now := sum(map(_cpu_seconds, processes))) - used) > max(0.5, 0.1 * waited):
            used, since = now, time.monotonic()
        elif waited > IDLE_SECONDS:
            for process in processes:
                process.kill()
            pytest.fail(f"{len(processes)} processes were idle for {IDLE_SECONDS} seconds")
        time.sleep(0.1)


def _cpu_seconds(process: subprocess.Popen[str]) -> float:
    """Return the CPU time of a process and its descendants."""
    seconds = 0.0
    with suppress(psutil.NoSuchProcess):
        first = psutil.Process(process.pid)
        for member in (first, *first.children(recursive=True)):
            with suppress(psutil.NoSuchProcess):
                seconds += sum(member.cpu_times()[:2])
    return seconds


def ended(ranks: Sequence[RankProcess]) -> list[tuple[int, str, str]]:
    """Wait for all ranks, and return the exit status, standard output and standard error of each."""
    processes = [rank.process for rank in ranks]
    wait_until(lambda: all(process.poll() is not None for process in processes), processes)
    texts = []
    for rank in ranks:
        for file in (rank.output, rank.errors):
            file.seek(0)
        texts.append((rank.process.returncode, rank.output.read(), rank.errors.read()))
    return texts


def launch(folder: Path, configs: list[Config]) -> None:
    """Train ``configs`` in several processes."""
    folder.mkdir(exist_ok=True)
    (folder / "configs.json").write_text(json.dumps([config.model_dump() for config in configs]), encoding="utf-8")
    for status, _, error in ended(start([__file__, str(folder)])):
        assert status == 0, error


def assert_logged_alike(run: Path, expected: Path, *, kl: float = 1e-5) -> None:
    """Check that two runs logged the same metrics to rounding, KLs of samples to a tolerance of ``kl``."""
    found, lines = (read_metrics(folder / "metrics.jsonl") for folder in (run, expected))
    assert [line["step"] for line in found] == [line["step"] for line in lines]
    for pair in zip(found, lines, strict=True):
        # Sampling ratios belong to a micro-batch, and another number of ranks divides the batch otherwise.
        line, like = ({k: v for k, v in without_costs(logged).items() if "sampling/" not in k} for logged in pair)
        assert line.keys() == like.keys()
        for key, value in like.items():
            if key == "rewards/accuracies" and like["rewards/margins"] == pytest.approx(0, abs=1e-5):
                continue  # before the first update margins are zero, and their sign is rounding
            close = 1e-4 if key == "grad_norm" else kl if "kl" in key.split("_") else 1e-5
            assert line[key] == pytest.approx(value, rel=close, abs=close, nan_ok=True), (key, line["step"])


def final(run: Path) -> dict[str, Tensor]:
    """Return the weights that a run ended with."""
    return load_file(next((run / "final").glob("*.safetensors")))


def assert_saved_alike(run: Path, expected: Path) -> None:
    """Check that two runs ended with the same weights to rounding."""
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
            if config.fsdp and os.environ["RANK"] != "0":  # it receives its shards from rank 0 and reads no weights
                readers = {"load_policy": None, "load_reward_model": None}
                patches.enter_context(patch.multiple("hypo_train.build", **readers))
            train(config, progress=False)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
