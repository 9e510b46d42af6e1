"""Tests of the code that runs on CUDA, on fake tensors and without a GPU: make test-cuda-fakes.

These tests compile the kernels, which other tests interpret, so they run in a process of their own, and they need
torch's CUDA build, as autograd refuses fake CUDA tensors in any other.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest
import torch

if torch.version.cuda is None:
    WHY_NOT = "needs torch's CUDA build (no GPU): make test-cuda-fakes"
elif importlib.util.find_spec("triton") is None:
    WHY_NOT = "Triton is not installed"
elif os.environ.get("TRITON_INTERPRET") == "1":
    WHY_NOT = "Triton interprets in this process: make test-cuda-fakes"
elif torch.cuda.is_available():
    WHY_NOT = "there is a GPU: the other tests run on it"
else:
    WHY_NOT = ""


class Skipped(pytest.File):
    """A module that cannot be imported here, as a single skipped test."""

    def collect(self) -> list[pytest.Item]:
        pytest.skip(WHY_NOT, allow_module_level=True)


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.Collector | None:
    return Skipped.from_parent(parent, path=module_path) if WHY_NOT else None


STEPS = pytest.StashKey[list[str]]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[STEPS] = []


@pytest.fixture
def step_table(request: pytest.FixtureRequest) -> list[str]:
    """Lines about training steps, which the end of the session shows."""
    return request.config.stash[STEPS]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if lines := config.stash.get(STEPS, []):
        columns = ("operators", "launches", "variants", "products", "copies", "unpinned")
        terminalreporter.write_sep("-", "a training step on fake CUDA; the host never waits")
        terminalreporter.write_line(" " * 47 + "".join(f"{column:>10}" for column in columns))
        for line in lines:
            terminalreporter.write_line(line)
