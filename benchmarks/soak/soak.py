"""Kill and stop runs at random moments, resume them, and compare them with uninterrupted runs."""

from __future__ import annotations

import argparse
import json
import random
import shutil
import signal
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# A run imports these late; imported here once, for all attempts.
import peft  # noqa: F401
import torch.utils.tensorboard  # noqa: F401
import transformers.models.llama.modeling_llama  # noqa: F401

from benchmarks.soak.attempt import Death, Outcome, attempt
from benchmarks.soak.differences import differences
from benchmarks.soak.moments import OUTSIDE_OF_THE_LOOP
from benchmarks.soak.runs import RUNS, make_world, write_recipe

KILLS_PER_RUN = 5
SHARE_OF_DELAYS = 0.25  # of the kills; the others come at a moment


@dataclass
class Soak:
    """Counts of kills, stops and resumes, and the differences so far."""

    kills: Counter[str] = field(default_factory=Counter)  # by moment
    stops: Counter[str] = field(default_factory=Counter)  # by SIGTERM, by outcome
    resumes: int = 0
    runs: int = 0
    different: list[str] = field(default_factory=list)


class Victim:
    """One kind of run: its uninterrupted result, and the moments at which it can be killed."""

    def __init__(self, name: str, settings: dict[str, Any], folder: Path, rng: random.Random) -> None:
        self.name, self.settings, self.folder, self.rng = name, settings, folder / name.replace(", ", "-"), rng
        recipe = write_recipe(folder, self.folder / "uninterrupted", settings)
        counts = self.folder / "moments.json"
        uninterrupted = attempt(recipe, record=counts)
        if uninterrupted.status != 0:
            raise SystemExit(
                f"{name}: an uninterrupted run fails with status {uninterrupted.status}:\n{uninterrupted.output}"
            )
        self.expected, self.seconds = recipe.parent / "run", uninterrupted.seconds
        self.moments: dict[str, int] = json.loads(counts.read_text(encoding="utf-8"))
        del self.moments["end"]
        self._names: dict[signal.Signals, list[str]] = {}

    def death(self, number: signal.Signals) -> Death:
        """Return a death at the next kind of moment, in a random order for each signal, or after a random delay."""
        if number == signal.SIGKILL and self.rng.random() < SHARE_OF_DELAYS:
            return Death(seconds=self.rng.uniform(0, self.seconds))
        names = self._names.setdefault(number, [])
        if not names:
            names += self.rng.sample(sorted(self.moments), len(self.moments))
        moment = names.pop()
        return Death(number, moment, self.rng.randint(1, self.moments[moment]))

    def live(self, soak: Soak, kills: int, stops: int) -> None:
        """Kill and stop a run so many times, let it end, and compare it."""
        soak.runs += 1
        folder = self.folder / str(soak.runs)
        recipe = write_recipe(self.folder.parent, folder, self.settings)
        deaths = [signal.SIGKILL] * kills + [signal.SIGTERM] * stops
        self.rng.shuffle(deaths)
        planned: list[Death | None] = [*map(self.death, deaths), None]
        for number, death in enumerate(planned):
            outcome = attempt(recipe, death)
            soak.resumes += number > 0
            problem = _judge(soak, outcome, death)
            if problem is not None:
                soak.different.append(f"{self.name}, run {soak.runs}: {problem}\n{outcome.output}")
                return
            if outcome.status == 0:  # it ended before its death
                break
        found = differences(folder / "run", self.expected)
        soak.different += [f"{self.name}, run {soak.runs}: {line}" for line in found]
        if not found:
            shutil.rmtree(folder)


def _judge(soak: Soak, outcome: Outcome, death: Death | None) -> str | None:
    """Count how an attempt ended, and return the problem if it did not end as its death asked for."""
    if outcome.status == 0:
        return None
    killed = death is not None and death.signal == signal.SIGKILL
    if killed and outcome.status == -signal.SIGKILL:
        soak.kills[outcome.moment] += 1
        return None
    stopped = death is not None and death.signal == signal.SIGTERM
    if stopped and outcome.status == 128 + signal.SIGTERM and "stopped by SIGTERM, saved in" in outcome.output:
        soak.stops["saved, then left with status 143"] += 1
        return None
    if stopped and outcome.status == -signal.SIGTERM and outcome.moment.startswith(OUTSIDE_OF_THE_LOOP):
        soak.stops["ended at once, before the first step"] += 1
        return None
    return f"status {outcome.status} at {outcome.moment!r} with {death}"


def run(arguments: argparse.Namespace, folder: Path) -> Soak:
    """Run all kinds in turn until the requested numbers of kills and stops are reached."""
    rng, soak = random.Random(arguments.seed), Soak()
    make_world(folder)
    victims = [Victim(name, settings, folder, rng) for name, settings in RUNS.items()]
    print(f"{len(victims)} kinds of runs, {victims[0].seconds:.1f} s each without kills", flush=True)
    while not soak.different:
        kills, stops = arguments.kills - soak.kills.total(), arguments.stops - soak.stops.total()
        if kills <= 0 and stops <= 0:
            break
        at_once = min(kills, rng.randint(1, KILLS_PER_RUN)) if kills > 0 else 0
        victims[soak.runs % len(victims)].live(soak, at_once, min(max(stops, 0), 1 + (kills <= 0)))
        if soak.runs % 10 == 0:
            print(_summary(soak), flush=True)
    return soak


def _summary(soak: Soak) -> str:
    return (
        f"{soak.kills.total()} kills, {soak.stops.total()} stops, {soak.resumes} resumes of {soak.runs} runs, "
        f"{len(soak.different)} differences"
    )


def report(soak: Soak) -> str:
    lines = [f"  {count:4}  {moment}" for moment, count in sorted(soak.kills.items())]
    lines = ["killed by SIGKILL at:", *lines, "told to stop by SIGTERM:"]
    lines += [f"  {count:4}  {what}" for what, count in sorted(soak.stops.items())]
    return "\n".join([*lines, *soak.different, _summary(soak)])
