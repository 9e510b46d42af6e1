"""Compare the loss with its peers: time, peak memory and error of forward, frozen-head and trained-head work.

The first test of a group measures all of the group's providers, interleaved; every test then replays its own samples
to pytest-benchmark (``replay.py``).
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.conftest import grid
from benchmarks.grid import Grid
from benchmarks.providers import GEMMS, OURS, PROVIDERS, Provider
from benchmarks.replay import CLOCK
from benchmarks.session import Session
from benchmarks.workloads import Group, groups


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    chosen = grid(metafunc.config)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    cases = [
        pytest.param(group, provider, id=f"{group}-{provider.name}")
        for group in groups(device, chosen)
        for provider in PROVIDERS
        if provider.serves(group) and not (chosen is Grid.QUICK and provider.compiles)
    ]
    metafunc.parametrize(("group", "provider"), cases)


@pytest.mark.benchmark(timer=CLOCK)
def bench_loss(
    group: Group, provider: Provider, session: Session, request: pytest.FixtureRequest, benchmark: Any
) -> None:
    measured = session.measure(group, _selected(group, request))
    result = measured.results[provider.name]
    if result.failed:
        pytest.fail(result.failed)
    if result.skipped:
        pytest.skip(result.skipped)
    if result.wrong:
        (pytest.fail if provider.is_ours else pytest.xfail)(f"WRONG: {result.wrong}")
    benchmark.group = str(group)
    benchmark.extra_info.update(
        provider=provider.name,
        version=provider.version,
        peak_bytes=result.peak_bytes,
        gradient_bytes=result.gradient_bytes,
        flop_per_second=measured.flop / result.median,
        times_ours=measured.times(result, OURS[session.device.type]),
        times_bare_gemms=measured.times(result, GEMMS),
        hot_seconds=result.hot_median,
        **{f"error_{quantity}": error for quantity, error in result.errors.items()},
    )
    CLOCK.replay(result.samples, benchmark)


def _selected(group: Group, request: pytest.FixtureRequest) -> list[str]:
    """Return the group's providers that pytest selected (``-k`` leaves some out)."""
    cases: list[dict[str, Any]] = [
        item.callspec.params for item in request.session.items if isinstance(item, pytest.Function)
    ]
    return [case["provider"].name for case in cases if case.get("group") == group]
