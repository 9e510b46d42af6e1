"""How soon a command answers. CPU time is what is held to a budget: other work on the machine is no fault of ours."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HEAVY = {"torch", "transformers", "datasets", "numpy", "pandas", "peft", "accelerate", "pyarrow", "matplotlib"}


def run(*argv):
    """(the finished process, its CPU seconds)"""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, *argv], cwd=ROOT, capture_output=True, text=True, timeout=250)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return done, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


@pytest.mark.parametrize(
    "command",
    [
        ["--config"],
        ["--dry-run", "--config"],
        ["demo", "--no_such_flag"],
        ["evaluate", "--no_such_flag"],
        ["judge", "--no_such_flag"],
    ],
)
def test_a_mistake_is_reported_without_a_heavy_import(tmp_path, command):
    recipe = tmp_path / "bad.yaml"
    recipe.write_text("model_name_or_path: m\ndataset_name: d\nlerning_rate: 1.0e-6\n")
    done, seconds = run("-X", "importtime", "-m", "hypo_train", *command, str(recipe))
    assert done.returncode == 2, done.stderr
    imported = {line.split("|")[-1].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert "hypo_train.config" in imported
    assert not HEAVY & imported
    assert seconds < 3


_TO_THE_FIRST_STEP = """
import os, sys
import hypo_train.cli, hypo_train.train
step = hypo_train.train.train_step
def first(*arguments):
    step(*arguments)
    print("first step done", flush=True)
    os._exit(0)
hypo_train.train.train_step = first
hypo_train.cli.main(["demo", "--output_dir", sys.argv[1]])
"""


@pytest.mark.slow
def test_the_demo_takes_its_first_step_within_15_seconds(tmp_path):
    done, seconds = run("-c", _TO_THE_FIRST_STEP, str(tmp_path / "demo"))
    assert done.stdout.endswith("first step done\n"), done.stderr
    assert seconds < 15
