"""Compare one optimizer step with TRL's: DPO and HyPO on the same model, pairs and dtype, and each saving switched off.

The first test of a case measures all of its variants in turns, as ``bench_loss.py`` does; ``step/variants.py`` lists
the variants.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import pytest
import torch

pytest.importorskip("trl", reason="needs trl: pip install -e '.[bench]'")

from benchmarks.conftest import SECTIONS, results_file, say
from benchmarks.replay import CLOCK
from benchmarks.report import append, hardware, state, versions
from benchmarks.step import report, waterfall
from benchmarks.step.cases import Case, cases
from benchmarks.step.material import Missing
from benchmarks.step.session import MeasuredCase, StepSession
from benchmarks.step.variants import TRL_DPO, TRL_HYPO, Variant, variants

HOURS = 3600
PLOTS = Path(__file__).parent / "plots"
QUICK_PLOTS = Path(__file__).parents[1] / ".benchmarks" / "plots"  # a quick run must not replace a real picture


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    metafunc.parametrize(
        ("case", "variant"),
        [
            pytest.param(case, variant, id=f"{case}-{variant}")
            for case in cases(device, quick=metafunc.config.getoption("quick"))
            for variant in variants(case)
        ],
    )


@pytest.fixture(scope="session")
def offline(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Prevent downloads, telemetry (TRL's trainers send it) and files in the user's cache of data sets."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("datasets")))
        datasets.disable_progress_bars()
        yield


@pytest.fixture(scope="session")
def step_session(pytestconfig: pytest.Config, offline: None) -> StepSession:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    path, quick = results_file(pytestconfig, device), pytestconfig.getoption("quick")
    rounds = pytestconfig.getoption("rounds") or (1 if quick else 3)
    heads = [f"{hardware(device)}; {state(device)}", versions(), *report.legend(device), ""]
    shown = [("steps, variants in turns", "\n".join(heads))]
    pytestconfig.stash[SECTIONS] = shown

    def keep(measured: MeasuredCase, seconds: float) -> None:
        where = f"{hardware(device)}, {datetime.date.today().isoformat()}"
        picture = waterfall.draw(measured, where, _picture_path(measured.case, device, path, quick))
        table = report.table(measured, device)
        if path is not None:
            link = [f"![waterfall]({picture.relative_to(path.parent.resolve())})", ""] if picture is not None else []
            append(path, f"**{table[0]}**", "", "```text", *table[1:], *report.legend(device), "```", "", *link)
        shown.append((str(measured.case), "\n".join([*table, f"  picture  {picture}", ""])))
        say(pytestconfig, f"measured {measured.case}, {rounds} rounds, in {seconds:.0f} s")

    return StepSession(device, rounds=rounds, on_measured=keep)


def _picture_path(case: Case, device: torch.device, results: Path | None, quick: bool) -> Path:
    """Return the path of a case's picture: beside the results file, if there is one."""
    folder = results.parent.resolve() / "plots" if results is not None else QUICK_PLOTS if quick else PLOTS
    return folder / f"step_waterfall_{str(case).lower().replace(' ', '-')}_{device.type}.png"


@pytest.mark.benchmark(timer=CLOCK)
@pytest.mark.timeout(6 * HOURS)  # the first test of a case measures the entire case
def bench_step(
    case: Case, variant: Variant, step_session: StepSession, request: pytest.FixtureRequest, benchmark: Any
) -> None:
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
        times_trl_dpo=measured.times(result, TRL_DPO),
        times_trl_hypo=measured.times(result, TRL_HYPO),
        held_bytes=result.held_bytes,
        peak_bytes=result.peak_bytes,
        loss_error=result.loss_error,
        gradient_error=result.gradient_error,
        **{f"{phase}_seconds": result.phase(phase) for phase in result.phases[0]},
    )
    CLOCK.replay(result.samples, benchmark)


def _selected(case: Case, request: pytest.FixtureRequest) -> list[str]:
    """Return the case's variants that pytest selected (``-k`` leaves some out)."""
    asked: list[dict[str, Any]] = [
        item.callspec.params for item in request.session.items if isinstance(item, pytest.Function)
    ]
    return [params["variant"].name for params in asked if params.get("case") == case]
