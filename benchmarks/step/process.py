"""Run a trial in a process of its own, so that no contender pays for the memory of another."""

from __future__ import annotations

import multiprocessing
import pickle
from contextlib import suppress
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from benchmarks.step.material import Material
from benchmarks.step.trial import Check, Sample, Trial
from benchmarks.step.unsloth_process import serve_with_unsloth
from benchmarks.step.variants import Variant


class TrialError(Exception):
    """A trial failed; the message names the error in its process."""


class TrialProcess:
    """Has the methods of :class:`Trial`; its process works only during a call."""

    def __init__(self, variant: Variant, material: Material, folder: Path) -> None:
        self._connection, other = multiprocessing.Pipe()
        if variant.side == "unsloth":  # it changes other packages, so it has to be imported first
            arguments = pickle.dumps((variant, material, folder))
            self._process: BaseProcess = multiprocessing.get_context("spawn").Process(
                target=serve_with_unsloth, args=(other, arguments, str(folder / "unsloth")), daemon=True
            )
        else:
            # A server that has imported everything forks the processes: each starts within milliseconds.
            context = multiprocessing.get_context("forkserver")
            context.set_forkserver_preload(["benchmarks.step.ours", "benchmarks.step.trl_side", __name__])
            self._process = context.Process(target=serve, args=(other, variant, material, folder), daemon=True)
        self._process.start()
        other.close()
        self._answer()

    def check(self) -> Check:
        found: Check = self._ask("check")
        return found

    def sample(self, steps: int | None = None) -> Sample:
        found: Sample = self._ask("sample", steps)
        return found

    def rest(self) -> None:
        self._ask("rest")

    def close(self) -> None:
        """End the process, which gives all of its memory back."""
        self._process.terminate()
        self._process.join()

    def _ask(self, method: str, *arguments: Any) -> Any:
        with suppress(ConnectionError):  # the process has ended: reading says how
            self._connection.send((method, arguments))
        return self._answer()

    def _answer(self) -> Any:
        try:
            answer, error = self._connection.recv()
        except (EOFError, ConnectionError):
            self._process.join()
            killed = ": out of memory?" if self._process.exitcode == -9 else ""
            raise TrialError(f"its process ended with exit code {self._process.exitcode}{killed}") from None
        if error:
            raise TrialError(error)
        return answer


def serve(connection: Connection, variant: Variant, material: Material, folder: Path) -> None:
    """Build a trial and answer calls of its methods until the other end closes."""
    _be_killed_first()
    try:
        trial = Trial(variant, material, folder)
        connection.send((None, ""))
        while True:
            method, arguments = connection.recv()
            connection.send((getattr(trial, method)(*arguments), ""))
    except EOFError:
        pass
    except Exception as error:
        connection.send((None, f"{type(error).__name__}: {error}".splitlines()[0]))


def _be_killed_first() -> None:
    """Let Linux end this process, not another one, if the machine runs out of memory."""
    score = Path("/proc/self/oom_score_adj")
    if score.exists():
        score.write_text("1000")
