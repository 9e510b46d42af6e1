"""Train every method in every world, and record what is selected, seed by seed."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.paper.interaction.methods import CHECKPOINTS, METRICS, SWEEPS, train
from benchmarks.paper.interaction.selection import BUDGETS, HEADLINE, RULES, of_reference, select
from benchmarks.paper.interaction.world import KINDS, Kind, make_worlds

# In the world where coverage matters: online_fraction and rollout_steps of HyPO.
ONLINE_KIND = Kind(epsilon=0.01, covering=False, misleading=True)
ONLINE = ((1.0, 1), (0.5, 1), (0.25, 1), (0.0625, 1), (1.0, 2), (1.0, 4))
# The settings and worlds whose curves over training are kept.
AT_THE_SAME_BETA = ("DPO β 0.1", "DPO + NLL β 0.1 NLL 0.01", "χPO β 0.1", "HyPO β 0.1 λ 0.03")
CURVES_IN = ("silent, misleading, 0.01", "covering, misleading, 0.01")


class Task(NamedTuple):
    """Nine settings of a method in the worlds of a kind."""

    kind: Kind
    method: str
    online_fraction: float
    rollout_steps: int
    seeds: tuple[int, ...]

    def run(self) -> dict[str, Any]:
        torch.set_num_threads(1)
        started, worlds = time.perf_counter(), make_worlds(self.kind, self.seeds)
        points = train(
            worlds, self.seeds, SWEEPS[self.method], online_fraction=self.online_fraction,
            rollout_steps=self.rollout_steps,
        )  # fmt: skip
        print(f"{self.kind.name}: {self.method}, {time.perf_counter() - started:.0f} s", flush=True)
        return _record(points, of_reference(worlds), [setting.name for setting in SWEEPS[self.method]])


def _run(task: Task) -> dict[str, Any]:
    return task.run()


def _record(points: dict[str, Tensor], reference: dict[str, Tensor], names: list[str]) -> dict[str, Any]:
    """Return what is kept of a task: selected candidates by seed, a few curves' means, the last checkpoint by seed."""
    selected: dict[str, Any] = {}
    for rule in RULES:
        for budget in BUDGETS:
            found = select(points, reference, budget=budget, rule=rule)
            kept = (*METRICS, "choice") if (rule, budget) == (RULES[0], HEADLINE) else ("reward", "kl")
            selected.setdefault(rule, {})[f"{budget:g}"] = {name: _rounded(found[name]) for name in kept}
    errors = {name: values.std(2) / values.shape[2] ** 0.5 for name, values in points.items()}
    curves = {
        setting: {
            metric: {"mean": _rounded(points[metric][:, i].mean(1)), "error": _rounded(errors[metric][:, i])}
            for metric in ("reward", "kl", "uncovered")
        }
        for i, setting in enumerate(names)
        if setting in AT_THE_SAME_BETA
    }
    last = {
        setting: {metric: _rounded(points[metric][-1, i]) for metric in ("reward", "kl", "uncovered")}
        for i, setting in enumerate(names)
    }
    return {"selected": selected, "curves": curves, "last": last}


def _rounded(values: Tensor) -> list[float]:
    return [float(f"{value:.5g}") for value in values.tolist()]


def run(seeds: Sequence[int], workers: int) -> dict[str, Any]:
    """Train everything; return the record that the report is made of."""
    chosen = tuple(seeds)
    tasks = [Task(kind, method, 1.0, 1, chosen) for kind in KINDS for method in SWEEPS]
    online = [Task(ONLINE_KIND, "HyPO", *draw, chosen) for draw in ONLINE]
    context = multiprocessing.get_context("spawn")  # a fork of a process that has used torch may hang
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        found = list(pool.map(_run, tasks + online))
    record: dict[str, Any] = {"seeds": list(chosen), "checkpoints": list(CHECKPOINTS), "worlds": {}, "online": {}}
    for task, result in zip(tasks, found, strict=False):
        del result["last"]
        if task.kind.name not in CURVES_IN:
            del result["curves"]
        world = record["worlds"].setdefault(task.kind.name, {"c_glo": task.kind.c_glo, "methods": {}})
        world["methods"][task.method] = result
    for task, result in zip(online, found[len(tasks) :], strict=True):
        del result["curves"]
        record["online"][f"{task.online_fraction:g}, {task.rollout_steps}"] = result
    return record
