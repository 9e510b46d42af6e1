"""A short soak test, and the checks with which it would notice an error."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.soak.attempt import Death, Outcome
from benchmarks.soak.differences import differences
from benchmarks.soak.soak import Soak, _judge, report

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.timeout(0)  # an attempt without progress raises
def test_randomly_killed_runs_equal_uninterrupted_ones(tmp_path):
    command = [
        sys.executable,
        "-m",
        "benchmarks.soak",
        "--kills",
        "8",
        "--stops",
        "2",
        "--keep",
        str(tmp_path / "soak"),
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(tmp_path)}
    found = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout + found.stderr
    assert "told to stop by SIGTERM" in found.stdout
    assert "0 differences" in found.stdout
    kills = next(line for line in found.stdout.splitlines()[::-1] if "kills" in line)
    assert int(kills.split()[0]) >= 8


@pytest.fixture
def runs(tmp_path):
    """Two folders of runs that are equal without timings."""
    for name in ("found", "expected"):
        for folder in ("samples", "final"):
            (tmp_path / name / folder).mkdir(parents=True)
            (tmp_path / name / folder / "file").write_text("the same")
        lines = [{"step": step, "loss": 0.5, "time/step": float(len(name))} for step in (1, 2)]
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path / "found", tmp_path / "expected"


def test_runs_that_differ_in_timings_are_equal(runs):
    assert differences(*runs) == []


@pytest.mark.parametrize(
    ("file", "text", "difference"),
    [
        ("metrics.jsonl", '{"step": 1, "loss": 0.5}\n', "metrics.jsonl has 1 lines instead of 2"),
        (
            "metrics.jsonl",
            '{"step": 1, "loss": 0.5}\n{"step": 2, "loss": 0.25}\n',
            "metrics.jsonl, step 2: loss is 0.25 instead of 0.5",
        ),
        ("samples/file", "another", "samples/file differs"),
        ("final/file", "another", "final/file differs"),
        ("final/more", "another", "final/more differs"),
    ],
)
def test_every_other_difference_is_named(runs, file, text, difference):
    (runs[0] / file).write_text(text)
    assert differences(*runs) == [difference]


def test_temporary_files_are_named(runs):
    (runs[0] / "checkpoint-4.old.tmp").mkdir()
    assert differences(*runs) == ["checkpoint-4.old.tmp is left behind"]


@pytest.mark.parametrize(
    ("status", "moment", "death", "is_right"),
    [
        (-signal.SIGKILL, "save: os.fsync", Death(), True),
        (0, "end", Death(), True),
        (1, "save: os.fsync", Death(), False),
        (-signal.SIGKILL, "save: os.fsync", None, False),
        (-signal.SIGTERM, "preparing: begins", Death(signal.SIGTERM), True),
        (-signal.SIGTERM, "step: backward", Death(signal.SIGTERM), False),
        (143, "save: ends", Death(signal.SIGTERM), True),
        (143, "save: ends", Death(signal.SIGKILL), False),
    ],
)
def test_an_attempt_must_end_as_its_death_asked(status, moment, death, is_right):
    soak = Soak()
    output = "hypo_train: stopped by SIGTERM, saved in run/checkpoint-4"
    assert (_judge(soak, Outcome(status, moment, output, 1.0), death) is None) == is_right
    assert soak.kills.total() + soak.stops.total() == (is_right and status != 0)
    assert "0 differences" in report(soak)
