"""Report the moments at which a run can be killed: in every phase of a step and every operation on its files.

    step: backward                       a phase of a step begins (or continues)
    save: os.fsync, save: os.rename      before or after an operation on files inside an area
    save: half of model.safetensors      a file of tensors is partly written
    final model: begins, final model: ends

A moment belongs to the innermost running function of ``AREAS``; files are not watched outside of them.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hypo_train import train
from hypo_train.checkpoint import files, state
from hypo_train.metrics import log
from hypo_train.metrics.timing import PhaseTimer

# (module or class, function, area)
AREAS = (
    (train, "prepare", "preparing"),
    (train, "resume", "loading"),
    (train, "precompute_ref_logps", "reference log-probs"),
    (log.RunLog, "__init__", "opening the log"),
    (train, "_evaluate", "evaluation"),
    (log.RunLog, "log", "logging"),
    (log.RunLog, "flush", "logging"),
    (train, "save", "save"),
    (state, "prune", "prune"),
    (train, "save_model", "final model"),
    (train, "write_card", "model card"),
)
# Before the first step, a signal ends a run at once.
OUTSIDE_OF_THE_LOOP = ("preparing", "loading", "reference log-probs", "opening the log")
_OPERATIONS = ("os.rename", "os.remove", "os.mkdir", "os.rmdir")  # audit events that come before the operation

Reached = Callable[..., None]  # (name of the moment, what to do to the files if the run is killed there)


def watch(reached: Reached) -> None:
    """Call ``reached`` at every moment from now on. It cannot be undone, so use it in a forked process."""
    areas: list[str] = []
    for owner, name, area in AREAS:
        setattr(owner, name, _within(getattr(owner, name), area, areas, reached))
    _watch_phases(reached)
    _watch_files(areas, reached)


def _within(function: Callable[..., Any], area: str, areas: list[str], reached: Reached) -> Callable[..., Any]:
    def watched(*args: Any, **options: Any) -> Any:
        reached(f"{area}: begins")
        areas.append(area)
        try:
            result = function(*args, **options)
        finally:
            areas.pop()
        reached(f"{area}: ends")
        return result

    return watched


def _watch_phases(reached: Reached) -> None:
    enter, leave = PhaseTimer._enter, PhaseTimer._leave

    def watched_enter(self: PhaseTimer, name: str) -> None:
        enter(self, name)
        reached(f"step: {name}")

    def watched_leave(self: PhaseTimer) -> None:
        leave(self)
        if self._open:
            reached(f"step: {self._open[-1]}")

    timer: Any = PhaseTimer
    timer._enter, timer._leave = watched_enter, watched_leave


def _watch_files(areas: list[str], reached: Reached) -> None:
    fsync, save_file = os.fsync, files.save_file

    def audited(event: str, args: tuple[Any, ...]) -> None:
        if areas and (event in _OPERATIONS or (event == "open" and _writes(args[1]))):
            reached(f"{areas[-1]}: {event}")

    def watched_fsync(descriptor: Any) -> None:
        fsync(descriptor)
        if areas:
            reached(f"{areas[-1]}: os.fsync")

    def watched_save_file(tensors: Any, path: Path, *args: Any) -> None:
        save_file(tensors, path, *args)
        reached(f"save: half of {path.name}", lambda: os.truncate(path, path.stat().st_size // 2))
        reached(f"save: {path.name}")

    vars(os)["fsync"], vars(files)["save_file"] = watched_fsync, watched_save_file
    sys.addaudithook(audited)


def _writes(mode: Any) -> bool:
    return isinstance(mode, str) and bool(set(mode) & set("wax+"))
