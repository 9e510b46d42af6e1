"""The proof kit: a failed step ends no other, missing tools are named, and outcomes are written at once."""

from __future__ import annotations

import math
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import proof, small_shapes
from benchmarks.proof import Step


def python(name: str, code: str, **options: object) -> Step:
    settings: dict = {"what": "a test's own", "limit": 60, "on_cpu": True, **options}
    return Step(name, command=(sys.executable, "-c", code), **settings)


def run_kit(monkeypatch: pytest.MonkeyPatch, results: Path, *steps: Step) -> int:
    monkeypatch.setattr(proof, "steps", lambda results, *, quick: list(steps))
    monkeypatch.setattr(sys, "argv", ["proof", "--results", str(results)])
    return proof.main()


def test_a_failed_step_fails_the_kit_but_no_other_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    results = tmp_path / "RESULTS.md"
    crash = python("crash", "import os; print('half done'); os.abort()")
    fine = python("fine", "print('===== 3 passed =====')")
    assert run_kit(monkeypatch, results, crash, fine) == 1
    lines = [line for line in results.read_text().splitlines() if line.startswith("- ")]
    assert re.fullmatch(r"- crash: failed in \d+ s \(half done\)", lines[-2])
    assert re.fullmatch(r"- fine: passed in \d+ s \(3 passed\)", lines[-1])
    assert "crash: failed" in capsys.readouterr().out.rsplit("proof kit on", 1)[1]


def test_an_outcome_is_written_before_the_next_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = tmp_path / "RESULTS.md"
    reads = python("second", f"assert '- first: passed' in open({str(results)!r}).read()")
    assert run_kit(monkeypatch, results, python("first", ""), reads) == 0


@pytest.fixture(scope="module")
def limit() -> int:
    """Seconds in which this machine, busy or not, starts a shell: a second and twenty times what it takes now."""
    start = time.perf_counter()
    subprocess.run(["sh", "-c", "echo"], check=True, stdout=subprocess.DEVNULL)
    return math.ceil(1 + 20 * (time.perf_counter() - start))


def shell(script: str, limit: int) -> Step:
    return Step("shell", "a test's own", ("sh", "-c", script), limit=limit, on_cpu=True)


def test_a_step_at_its_limit_is_interrupted(limit: int) -> None:
    outcome = proof.run(shell("trap 'echo 3 of 7 done; exit 1' INT; while :; do sleep 0.1; done", limit), cuda=False)
    assert (outcome.status, outcome.note) == ("failed", f"stopped at its limit of {limit} s: 3 of 7 done")


def test_a_stubborn_step_is_killed_with_its_children(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proof, "GRACE", 1)
    # The child holds the output pipe too: if it lived, this would wait for an hour.
    outcome = proof.run(shell("trap '' INT; echo on; sleep 3600; sleep 3600", limit), cuda=False)
    assert (outcome.status, outcome.note) == ("failed", f"stopped at its limit of {limit} s: on")


def test_a_missing_tool_is_skipped_and_a_missing_package_fails() -> None:
    tool = proof.run(python("tool", "", tool="no-such-sanitizer"), cuda=True)
    assert tool.line == "tool: skipped (no-such-sanitizer is not installed)"
    package = proof.run(python("package", "", needs=("no_such_package",)), cuda=True)
    assert package.line == "package: failed (not installed: pip install no-such-package)"


def test_cuda_tools_are_found_in_cuda_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bin").mkdir()
    tool = tmp_path / "bin" / "a-sanitizer"
    tool.write_text("#!/bin/sh\necho ========= ERROR SUMMARY: 0 errors\n")
    tool.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    step = Step("memcheck", "a test's own", ("a-sanitizer",), limit=60, tool="a-sanitizer")
    outcome = proof.run(step, cuda=True)
    assert (outcome.status, outcome.note) == ("passed", "ERROR SUMMARY: 0 errors")


def test_a_device_without_sanitizer_support_is_skipped() -> None:
    refuses = python("memcheck", "print('Device not supported'); raise SystemExit(1)", tool="sh")
    outcome = proof.run(refuses, cuda=True)
    assert (outcome.status, outcome.note) == ("skipped", "sh does not support this device")


def test_a_cpu_runs_its_steps_and_names_the_others(tmp_path: Path) -> None:
    plan = proof.steps(tmp_path / "RESULTS.md", quick=True)
    assert [step.name for step in plan if step.on_cpu] == ["grid", "sweep"]
    assert proof.run(plan[0], cuda=False).line == "tests: skipped (needs CUDA)"
    text = proof.page(plan, tmp_path / "RESULTS.md")
    assert all(step.what in text and step.shown in text for step in plan)
    assert len(text.splitlines()) < 40


def test_the_quick_kit_ends_within_ten_minutes() -> None:
    assert sum(step.limit + proof.GRACE for step in proof.steps(Path("RESULTS.md"), quick=True)) <= 600


def test_the_quick_kit_refuses_a_step_that_it_leaves_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["proof", "--quick", "--only", "step"])
    with pytest.raises(SystemExit, match="2"):
        proof.main()
    assert "--quick leaves out step" in capsys.readouterr().err


def test_the_kernel_for_racecheck_exists() -> None:
    rows_kernels = pytest.importorskip("hypo_kernels.kernels.rows", reason="Triton is not installed")
    assert hasattr(rows_kernels, proof.ROW_KERNEL)


@pytest.mark.slow
def test_small_shapes_run_on_every_kernel(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    if device.type == "cpu":  # the interpreter takes seconds for the large vocabulary
        monkeypatch.setattr(small_shapes, "VOCABULARIES", small_shapes.VOCABULARIES[:1])
    assert len(list(small_shapes.calls(device))) == len(small_shapes.VOCABULARIES) * 6
