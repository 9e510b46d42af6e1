"""Run TRL's own tests of ``DPOTrainer`` on ``HyPOTrainer``: ``python tests/peers/trl_suite.py PATH_TO_TRL_CHECKOUT``.

The tests run twice, with TRL's trainer and with ``HyPOTrainer`` (``kl_coef=0``) in its place, on stand-ins for the
Hub's models and data sets. A test counts if it passes with TRL's trainer here. The command prints the tests that then
fail with ``HyPOTrainer``, and exits with 1 if there are any. Arguments after ``--`` are pytest's.
"""

from __future__ import annotations

import argparse
import importlib
import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import trl

from hypo_train.trl import HyPOConfig, HyPOTrainer

HERE = Path(__file__).parent
_REPLACE = "HYPO_PEER_REPLACES_TRAINER"


@dataclass
class ConfigOfDPO(HyPOConfig):
    """``HyPOConfig`` that is DPO's unless a test says otherwise."""

    kl_coef: float = 0.0


def pytest_configure() -> None:
    """Put ``HyPOTrainer`` in the place of ``DPOTrainer`` before a test imports it (this file is a pytest plugin)."""
    # Tests of another version may ask for packages that the installed version does not know.
    importlib.import_module("trl.import_utils").__getattr__ = _is_unknown_package_available
    if os.environ.get(_REPLACE):
        trl.DPOTrainer, trl.DPOConfig = HyPOTrainer, ConfigOfDPO


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out Liger's tests where there is no GPU: its kernels fail there, and stay in place for later tests."""
    if torch.cuda.is_available():
        return
    config.hook.pytest_deselected(items=[item for item in items if "liger" in item.name])
    items[:] = [item for item in items if "liger" not in item.name]


def _is_unknown_package_available(name: str) -> Callable[[], bool]:
    if not name.startswith("is_"):
        raise AttributeError(name)
    return lambda: False


def main() -> int:
    """Run the tests twice and compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkout", type=Path, help="a checkout of github.com/huggingface/trl")
    parser.add_argument("--stand-ins", type=Path, help="folder of the stand-ins, built if empty")
    parser.add_argument("pytest_options", nargs="*", help="for example: -- -k eval")
    args = parser.parse_args()

    checkout = args.checkout.resolve()
    with tempfile.TemporaryDirectory() as temporary:
        folder = (args.stand_ins or Path(temporary, "hub")).resolve()
        from trl_stand_ins import build

        build(checkout, folder)
        theirs, ours = (
            _outcomes(checkout, folder, args.pytest_options, replaces=replaces) for replaces in (False, True)
        )
    counted = [name for name, problem in theirs.items() if problem is None]
    failed = {name: ours[name] for name in counted if ours[name] is not None}
    for name, problem in failed.items():
        print(f"{name}: {problem}")
    print(
        f"{len(theirs)} tests, {len(counted)} pass with TRL's DPOTrainer here; of these, "
        f"{len(counted) - len(failed)} pass with HyPOTrainer and {len(failed)} fail"
    )
    return 1 if failed else 0


def _outcomes(checkout: Path, folder: Path, options: list[str], *, replaces: bool) -> dict[str, str | None]:
    """Return each test's error, None for a test that passed; skipped tests are left out."""
    report = folder / ("hypo.xml" if replaces else "trl.xml")
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")]),
        _REPLACE: "1" if replaces else "",
    }
    command = [
        sys.executable,
        "-m",
        "pytest",
        str(checkout / "tests/test_dpo_trainer.py"),
        "-p",
        HERE.joinpath(__file__).stem,
    ]
    command += ["--rootdir", str(checkout), "-c", os.devnull, "-q", "-m", "not slow", "-p", "no:cacheprovider"]
    command += [f"--junit-xml={report}", "--tb=no", "-W", "ignore", *options]
    subprocess.run(command, cwd=folder, env=environment, check=False)
    outcomes: dict[str, str | None] = {}
    for case in ET.parse(report).iter("testcase"):
        if case.find("skipped") is None:
            problem = next((p for kind in ("failure", "error") if (p := case.find(kind)) is not None), None)
            name = f"{case.get('classname', '').rpartition('.')[2]}::{case.get('name')}"
            outcomes[name] = None if problem is None else (problem.get("message") or "").splitlines()[0]
    return outcomes


if __name__ == "__main__":
    sys.exit(main())
