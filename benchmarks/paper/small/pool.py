"""Run tasks in processes of one thread each."""

from __future__ import annotations

import contextlib
import multiprocessing
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class Task:
    """One function call in a process of its own, whose output goes to a file."""

    label: str
    log: Path
    function: Callable[..., None]
    arguments: tuple[Any, ...]

    def __call__(self) -> float:
        """Run the task and return the seconds that it took."""
        started = time.perf_counter()
        self.log.parent.mkdir(parents=True, exist_ok=True)
        log = self.log.open("a", encoding="utf-8")
        with log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
            self.function(*self.arguments)
        return time.perf_counter() - started


def workers(count: int) -> ProcessPoolExecutor:
    context = multiprocessing.get_context("spawn")  # a fork of a process that has used torch may hang
    return ProcessPoolExecutor(count, mp_context=context, initializer=_one_thread)


def _one_thread() -> None:
    """Use one thread: the models are so small that threads would only wait for each other."""
    torch.set_num_threads(1)


def run_all(pool: ProcessPoolExecutor, tasks: Sequence[Task]) -> bool:
    """Run all tasks; return False if one failed, after the others are done."""
    futures: dict[Future[float], Task] = {pool.submit(task): task for task in tasks}
    failed = 0
    for done, future in enumerate(as_completed(futures), start=1):
        task = futures[future]
        if error := future.exception():
            failed += 1
            print(f"{task.label} failed: {type(error).__name__}: {error} (see {task.log})", flush=True)
        else:
            print(f"{task.label}: {future.result():.0f} s ({done} of {len(tasks)})", flush=True)
    return not failed
