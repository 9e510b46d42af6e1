"""Tables, targets, and samples with a cold and a hot cache."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest
import torch

from benchmarks import measure, report, targets
from benchmarks.grid import Grid
from benchmarks.providers import BY_NAME, GEMMS, OURS, PROVIDERS
from benchmarks.session import Measured, Result
from benchmarks.workloads import LLAMA, LLAMA_HALF, MODES, Group, groups

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
ERRORS = {"logps": 1.2e-6, "hidden": 1.8e-3, "weight": 1.7e-3}
TRL = "TRL ChunkedLogProb"


def result(name: str, milliseconds: float, *, device: torch.device = CUDA, **options: object) -> Result:
    seconds = [milliseconds / 1e3] * 3
    settings: dict = {"errors": ERRORS, "peak_bytes": 3 * 2**30, "gradient_bytes": 2**31, **options}
    return Result(BY_NAME[name], samples=seconds, hot_samples=seconds if device == CUDA else [], **settings)


def measured(group: Group, *results: Result) -> Measured:
    rounded = {} if group.mode == "forward" else {"hidden": 2.0e-3, "weight": 1.8e-3}
    return Measured(group, group.workload.rows, {r.provider.name: r for r in results}, rounded)


def line(text: str, *found: Measured) -> str:
    """Return the only target line that contains ``text``."""
    [only] = [line for line in targets.lines(found, CUDA) if text in line]
    return only


def test_a_target_line_says_by_how_much_it_is_met() -> None:
    group = Group(LLAMA, "trained")
    met = measured(group, result(GEMMS, 100), result(OURS["cuda"], 115), result(TRL, 160))
    missed = measured(group, result(GEMMS, 100), result(OURS["cuda"], 130), result(TRL, 160))
    assert line(f"{group}: <= 1.15 x the bare GEMMs", met).endswith("measured 1.15: met")
    assert line(f"{group}: <= 1.15 x the bare GEMMs", missed).endswith("measured 1.30: MISSED")
    assert line(f"{group}: >= 1.3 x faster", met).endswith("measured 1.39: met")
    assert line(f"{group}: >= 1.3 x faster", missed).endswith("measured 1.23: MISSED")
    assert line(f"{group}: <= 1.25 GiB", met).endswith("measured 1.00: met")
    assert line(f"{group}: gradient error", met).endswith("measured 0.94: met")


def test_wrong_results_meet_no_target() -> None:
    group = Group(LLAMA, "frozen")
    wrong_peer = result(TRL, 1, wrong="far off")
    found = measured(group, result(GEMMS, 100), result(OURS["cuda"], 110), wrong_peer, result("Liger scaled CE", 220))
    assert line(f"{group}: >= 1.9 x faster", found).endswith("measured 2.00: met")
    ours_wrong = measured(group, result(GEMMS, 100), result(OURS["cuda"], 50, wrong="far off"))
    assert line(f"{group}: <= 1.15 x", ours_wrong).endswith("not measured")


def test_half_of_the_rows_is_compared_with_all_rows() -> None:
    every = measured(Group(LLAMA, "frozen"), result(OURS["cuda"], 100))
    half = measured(Group(LLAMA_HALF, "frozen"), result(OURS["cuda"], 52))
    assert line(f"{half.group}: <= 0.55", every, half).endswith("measured 0.52: met")
    assert line(f"{half.group}: <= 0.55", half).endswith("not measured")


def test_the_grid_has_the_groups_of_every_target() -> None:
    for chosen in Grid:
        assert {target.group for target in targets.TARGETS} <= set(groups(CUDA, chosen))


def test_targets_are_for_cuda_alone() -> None:
    assert list(targets.lines([], CPU)) == []


@pytest.mark.parametrize("device", [CPU, CUDA], ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_a_table_of_all_providers_fits_in_120_columns(mode: str, device: torch.device) -> None:
    """Holds for times up to ten seconds and peaks up to 99 GiB."""
    results = [
        result(provider.name, 9999.4, device=device, peak_bytes=99 * 2**30, gradient_bytes=2**33)
        for provider in PROVIDERS
    ]
    group = Group(replace(LLAMA, counted=0.5), mode)
    lines = report.tables([measured(group, *results)], device).splitlines()
    tables = lines[: 4 + len(results)]
    assert ("hot ms" in tables[1]) == (device == CUDA)
    assert not any(line.endswith("...") for line in tables)
    assert max(map(len, tables)) <= 120


def test_cuda_has_samples_with_a_cold_and_a_hot_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []

    def timer(cache: str):
        def timed(step: measure.Step) -> float:
            order.append(f"{cache} {step()}")
            return 2.0 if cache == "cold" else 1.0

        return timed

    monkeypatch.setattr(measure, "_cuda_timers", lambda device: (timer("cold"), timer("hot")))
    steps = {"a": lambda: "a", "b": lambda: "b"}
    samples = measure.interleaved(
        steps, CUDA, before=lambda: order.append("before"), seconds=0, min_rounds=2, max_rounds=2, warm_up_rounds=1
    )
    assert samples == {"a": ([2.0, 2.0], [1.0, 1.0]), "b": ([2.0, 2.0], [1.0, 1.0])}
    first = order.index("cold a")
    assert order[first : first + 3] == ["cold a", "before", "hot a"]  # hot: straight after its own cold run


def test_a_cpu_has_one_list_of_samples() -> None:
    samples = measure.interleaved(
        {"nap": lambda: time.sleep(0.01)}, CPU, before=lambda: None, seconds=0, min_rounds=2, max_rounds=5
    )
    [[first, second]] = samples["nap"]
    assert min(first, second) >= 0.01
