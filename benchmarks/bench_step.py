"""Compare one optimizer step with TRL's: DPO and HyPO on the same model, pairs and dtype, and each saving switched off.

The first test of a case measures all of its selected variants in turns; ``step/variants.py`` lists the variants.
``-m table`` selects the contenders of the table.
"""

from __future__ import annotations

import datetime
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("trl", reason="needs trl: pip install -e '.[bench]'")

from benchmarks.conftest import SECTIONS, grid, results_file, say
from benchmarks.grid import Grid
from benchmarks.replay import CLOCK
from benchmarks.report import append, hardware, state, versions
from benchmarks.step import report, waterfall
from benchmarks.step.cases import Case, cases
from benchmarks.step.material import Missing
from benchmarks.step.memory import allocator
from benchmarks.step.rate import why_no_bf16
from benchmarks.step.session import MeasuredCase, StepSession
from benchmarks.step.variants import DPO, HYPO_PLAIN, TABLE, Variant, variants

HOURS = 3600
PLOTS = Path(__file__).parent / "plots"
SMALL_PLOTS = Path(__file__).parents[1] / ".benchmarks" / "plots"  # a small run must not replace a real picture
ROUNDS = {Grid.QUICK: 1, Grid.SHORT: 2, Grid.FULL: 5}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    metafunc.parametrize(
        ("case", "variant"),
        [
            pytest.param(case, variant, id=f"{case}-{variant}", marks=[pytest.mark.table] if variant in TABLE else [])
            for case in cases(device, grid(metafunc.config))
            for variant in variants(case, grid(metafunc.config))
        ],
    )


@pytest.fixture(scope="session")
def offline(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Prevent downloads, telemetry (TRL's trainers send it) and files in the user's cache of data sets."""
    with pytest.MonkeyPatch.context() as patch:
        # The contenders' processes read them.
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("datasets")))
        patch.setenv("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
        yield


@pytest.fixture(scope="session")
def step_session(pytestconfig: pytest.Config, offline: None) -> StepSession:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    path, chosen = results_file(pytestconfig, device), grid(pytestconfig)
    rounds = pytestconfig.getoption("rounds") or ROUNDS[chosen]
    memory = f"allocator: {allocator()}"
    heads = [f"{hardware(device)}; {state(device)}", memory, versions(), *report.legend(device), ""]
    shown = [("steps, variants in turns", "\n".join(heads))]
    pytestconfig.stash[SECTIONS] = shown

    def keep(measured: MeasuredCase, seconds: float) -> None:
        where = f"{hardware(device)}, {datetime.date.today().isoformat()}"
        picture = None
        if HYPO_PLAIN in measured.results:  # the savings were measured
            picture = waterfall.draw(measured, where, _picture_path(measured.case, device, path, chosen))
        table = report.table(measured, device)
        if path is not None:
            link = [f"![waterfall]({picture.relative_to(path.parent.resolve())})", ""] if picture is not None else []
            conditions = [f"{rounds} rounds; {memory}", *report.legend(device)]
            append(path, f"**{table[0]}**", "", "```text", *table[1:], "", *conditions, "```", "", *link)
        shown.append((str(measured.case), "\n".join([*table, *([f"  picture  {picture}"] if picture else []), ""])))
        say(pytestconfig, f"measured {measured.case}, {rounds} rounds, in {seconds:.0f} s")

    return StepSession(device, rounds=rounds, on_measured=keep)


def _picture_path(case: Case, device: torch.device, results: Path | None, chosen: Grid) -> Path:
    """Return the path of a case's picture: beside the results file, if there is one."""
    folder = (
        results.parent.resolve() / "plots" if results is not None else PLOTS if chosen is Grid.FULL else SMALL_PLOTS
    )
    return folder / f"step_waterfall_{str(case).lower().replace(' ', '-')}_{device.type}.png"


@pytest.mark.benchmark(timer=CLOCK)
@pytest.mark.timeout(6 * HOURS)  # the first test of a case measures the entire case
def bench_step(
    case: Case, variant: Variant, step_session: StepSession, request: pytest.FixtureRequest, benchmark: Any
) -> None:
    if variant.why_missing:
        pytest.skip(variant.why_missing)
    if case.autocast and not request.config.getoption("bf16") and (reason := _why_no_bf16(step_session.device)):
        pytest.skip(reason)
    try:
        measured = step_session.measure(case, _selected(case, request))
    except Missing as why:
        pytest.skip(str(why))
    result = measured.results[variant.name]
    if result.failed:
        pytest.fail(result.failed)
    if result.wrong:
        pytest.fail(f"WRONG: {result.wrong}")
    benchmark.group = str(case)
    benchmark.extra_info.update(
        variant=variant.name,
        times_dpo=measured.times(result, DPO),
        times_best_trl_dpo=measured.times_best(result),
        times_bare_gemms=measured.times_gemms(result),
        extra_seconds=measured.extra_seconds(result),
        held_bytes=result.held_bytes,
        peak_bytes=result.peak_bytes,
        loss_error=result.loss_error,
        gradient_error=result.gradient_error,
        **{f"{phase}_seconds": result.phase(phase) for phase in result.phases[0]},
    )
    CLOCK.replay(result.samples, benchmark)


@functools.cache
def _why_no_bf16(device: torch.device) -> str:
    return why_no_bf16(device)


def _selected(case: Case, request: pytest.FixtureRequest) -> list[str]:
    """Return the case's variants that pytest selected (``-k`` leaves some out)."""
    asked: list[dict[str, Any]] = [
        item.callspec.params for item in request.session.items if isinstance(item, pytest.Function)
    ]
    chosen = [params["variant"] for params in asked if params.get("case") == case]
    return [variant.name for variant in chosen if not variant.why_missing]
