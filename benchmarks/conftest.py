"""Options, the session that measures, and the tables at the end."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks import report
from benchmarks.session import Session

SESSION = pytest.StashKey[Session]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("hypo-kernels benchmarks")
    group.addoption("--quick", action="store_true", help="small shapes, few rounds, nothing that compiles")
    group.addoption("--results", type=Path, metavar="PATH", help="append the tables to PATH as a dated section")


@pytest.fixture(scope="session")
def session(pytestconfig: pytest.Config) -> Session:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    plugins = pytestconfig.pluginmanager
    terminal, capture = plugins.get_plugin("terminalreporter"), plugins.get_plugin("capturemanager")

    def announce(line: str) -> None:
        if terminal is not None and capture is not None:
            with capture.global_and_fixture_disabled():  # a test's output is captured
                terminal.ensure_newline()
                terminal.write_line(line)

    measuring = Session(device, quick=pytestconfig.getoption("quick"), announce=announce)
    pytestconfig.stash[SESSION] = measuring
    return measuring


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    done = config.stash.get(SESSION, None)
    if done is None or not done.measured:
        return
    measured = list(done.measured.values())
    terminalreporter.section("benchmarks, providers interleaved")
    terminalreporter.write_line(f"{report.hardware(done.device)}; {report.state(done.device)}")
    terminalreporter.write_line(report.versions())
    terminalreporter.write_line(
        "x: times as long; rate: of the bare GEMMs' FLOP; peak: beyond the inputs, with gradients"
    )
    terminalreporter.write_line("err: max |result - float64| / max |float64|")
    terminalreporter.write_line("")
    terminalreporter.write_line(report.tables(measured, done.device))
    path = config.getoption("results")
    if path is not None:
        report.append_section(path, measured, done.device)
        terminalreporter.write_line(f"\nappended to {path}")
