"""pytest options, the measuring session, and the tables at the end."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import report
from benchmarks.grid import Grid
from benchmarks.session import Measured, Session

SESSION = pytest.StashKey[Session]()
OPENED = pytest.StashKey[bool]()
SECTIONS = pytest.StashKey[list[tuple[str, str]]]()  # title and text of further sections at the end


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("hypo-kernels benchmarks")
    group.addoption("--quick", action="store_true", help="tiny shapes, few rounds, without torch.compile")
    group.addoption("--full", action="store_true", help="the full grids: hours on a CPU")
    group.addoption("--bf16", action="store_true", help="bf16 steps too where fp32 products are faster")
    group.addoption("--results", type=Path, metavar="PATH", help="append the tables to PATH as a dated section")
    group.addoption(
        "--rounds", type=int, metavar="N", help="rounds of optimizer steps (default: 2, --quick: 1, --full: 5)"
    )
    group.addoption("--same-section", action="store_true", help="the section in --results has a head already")


def grid(config: pytest.Config) -> Grid:
    """Return the part of the benchmarks that was asked for."""
    if config.getoption("quick"):
        return Grid.QUICK
    return Grid.FULL if config.getoption("full") else Grid.SHORT


def results_file(config: pytest.Config, device: torch.device) -> Path | None:
    """Return the file of ``--results`` (None without it), after writing the head of a dated section."""
    path: Path | None = config.getoption("results")
    if path is not None and not config.getoption("same_section") and not config.stash.get(OPENED, False):
        report.open_section(path, device, f"pytest {shlex.join(sys.argv[1:])}")
        config.stash[OPENED] = True
    return path


def say(config: pytest.Config, line: str) -> None:
    """Print a line at once, although pytest captures the output of tests."""
    plugins = config.pluginmanager
    terminal, capture = plugins.get_plugin("terminalreporter"), plugins.get_plugin("capturemanager")
    if terminal is not None and capture is not None:
        with capture.global_and_fixture_disabled():
            terminal.ensure_newline()
            terminal.write_line(line)


@pytest.fixture(scope="session")
def session(pytestconfig: pytest.Config) -> Session:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    path = results_file(pytestconfig, device)

    def keep(measured: Measured, seconds: float) -> None:
        if path is not None:
            report.append_group(path, measured, device)
        say(pytestconfig, f"measured {measured.group} in {seconds:.0f} s")

    measuring = Session(device, few_rounds=grid(pytestconfig) is not Grid.FULL, on_measured=keep)
    pytestconfig.stash[SESSION] = measuring
    return measuring


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    for title, text in config.stash.get(SECTIONS, []):
        terminalreporter.section(title)
        terminalreporter.write_line(text)
    done = config.stash.get(SESSION, None)
    if done is None or not done.measured:
        return
    measured = list(done.measured.values())
    terminalreporter.section("benchmarks, providers interleaved")
    terminalreporter.write_line(f"{report.hardware(done.device)}; {report.state(done.device)}")
    terminalreporter.write_line(report.versions())
    if done.device.type == "cuda":
        terminalreporter.write_line("ms: with a cold L2 cache; hot ms: with a hot cache")
    terminalreporter.write_line(
        "x: ratio of times; rate: FLOP of the bare GEMMs per second; peak: memory beyond the inputs, gradients included"
    )
    terminalreporter.write_line("err: max |result - float64| / max |float64|")
    terminalreporter.write_line("")
    terminalreporter.write_line(report.tables(measured, done.device))
    path = config.getoption("results")
    if path is not None:
        report.close_section(path, measured, done.device)
        terminalreporter.write_line(f"\nappended to {path}")
