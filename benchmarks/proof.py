"""The proof kit: every test and measurement for a CUDA machine, in one command.

    python -m benchmarks.proof [--quick] [--only STEP] [--results PATH]

It installs nothing and uses this Python and its torch; it names what a step lacks. Every step is a process of
its own with a time limit, so that a crash ends no other step; its outcome is written to the end of
PATH as soon as it is known, the grid's tables and the sweep's points as they are measured. On a machine without
CUDA, it says what it would run and runs the steps that a CPU has. The exit code is 0 if no step failed.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from benchmarks import report

ROOT = Path(__file__).parents[1]
# hypo_train cannot be imported without these; its tests are left out then.
TRAINING = ("accelerate", "datasets", "peft", "pydantic", "transformers", "yaml")
GRACE = 10  # seconds that a step has at its limit to write its results
ROW_KERNEL = "_row_kernel"  # of hypo_kernels.kernels.rows: the kernel whose programs share memory


@dataclass(frozen=True)
class Step:
    """One command. It fails without the Python packages it ``needs``, and is skipped without its ``tool``."""

    name: str
    what: str
    command: tuple[str, ...]
    limit: int  # seconds
    needs: tuple[str, ...] = ()
    tool: str = ""
    on_cpu: bool = False
    in_quick: bool = True
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def shown(self) -> str:
        """Return the command as a user would type it."""
        environment = [f"{name}={value}" for name, value in self.environment.items()]
        words = ["python" if word == sys.executable else word for word in self.command]
        return " ".join([*environment, shlex.join(words)])


@dataclass(frozen=True)
class Outcome:
    step: Step
    status: str  # "passed", "failed" or "skipped"
    seconds: float
    note: str

    @property
    def line(self) -> str:
        after = f" in {self.seconds:.0f} s" if self.seconds else ""
        return f"{self.step.name}: {self.status}{after}" + (f" ({self.note})" if self.note else "")


def steps(results: Path, *, quick: bool) -> list[Step]:
    """Return the steps in the order in which they run. The limits of the quick ones add up to ten minutes."""
    pytest = (sys.executable, "-m", "pytest")
    small = (sys.executable, "-m", "benchmarks.small_shapes")
    quickly = ("--quick",) if quick else ()
    size = ("--quick",) if quick else ("--full",)
    # torch's caching allocator is one large block to the sanitizer, which would miss overruns between tensors.
    uncached = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    everything = [
        Step(
            "tests",
            "kernels and losses compared with float64, on real Triton",
            (*pytest, "tests/kernels" if _missing(TRAINING) else "tests", "-k", "kernel or loss",
             *(("-m", "not slow") if quick else ()), *_in_parallel()),
            limit=250 if quick else 1500,
            needs=("pytest",),
        ),
        Step(
            "training",
            "the training loop on the device: packed trees, samplers, steps",
            (*pytest, "tests/train", *_in_parallel()),
            limit=1800,
            needs=("pytest", *TRAINING),
            in_quick=False,
        ),
        Step(
            "memcheck",
            "every kernel on small shapes, for accesses out of bounds",
            ("compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "1", *small),
            limit=50 if quick else 900,
            tool="compute-sanitizer",
            environment=uncached,
        ),
        Step(
            "racecheck",
            "the row kernel on small shapes, for races in shared memory",
            ("compute-sanitizer", "--tool", "racecheck", "--error-exitcode", "1",
             "--kernel-regex", f"kns={ROW_KERNEL}", *small),
            limit=30 if quick else 900,
            tool="compute-sanitizer",
        ),
        Step(
            "grid",
            "the loss beside every installed peer: time with a cold and a hot cache, memory, error",
            (*pytest, "benchmarks/bench_loss.py", "--benchmark-only", *size,
             "--results", str(results), "--same-section"),
            limit=160 if quick else 3600,
            needs=("pytest", "pytest_benchmark"),
            on_cpu=True,
        ),
        Step(
            "sweep",
            "time, memory and share of the GEMM rate over tokens and over the vocabulary, with plots",
            (sys.executable, "-m", "benchmarks.sweep", *quickly, "--results", str(results)),
            limit=60 if quick else 1800,
            on_cpu=True,
            environment={"KINETO_LOG_LEVEL": "99"},
        ),
        Step(
            "step",
            "an optimizer step beside TRL's: time by phase, memory, loss and gradients, each saving switched off",
            (*pytest, "benchmarks/bench_step.py", "--benchmark-only", *size,
             "--results", str(results), "--same-section"),
            limit=3600,
            needs=("pytest", "pytest_benchmark", "trl", *TRAINING),
            in_quick=False,
        ),
    ]  # fmt: skip
    return [step for step in everything if step.in_quick or not quick]


def _missing(modules: Sequence[str]) -> list[str]:
    return [name for name in modules if importlib.util.find_spec(name) is None]


def _in_parallel() -> tuple[str, ...]:
    """Return flags for a few processes, if pytest-xdist is installed: most of the time is spent compiling kernels."""
    return ("-n", "4", "--dist", "loadscope") if importlib.util.find_spec("xdist") else ()


def run(step: Step, *, cuda: bool) -> Outcome:
    """Run the step and print its output."""
    if not cuda and not step.on_cpu:
        return Outcome(step, "skipped", 0.0, "needs CUDA")
    if missing := _missing(step.needs):
        packages = " ".join(name.replace("_", "-") for name in missing)
        return Outcome(step, "failed", 0.0, f"not installed: pip install {packages}")
    if step.tool and shutil.which(step.tool, path=_path()) is None:
        return Outcome(step, "skipped", 0.0, f"{step.tool} is not installed")
    print(f"\n== {step.name}: {step.what}\n$ {step.shown}", flush=True)
    start = time.perf_counter()
    code, lines = _passed_on(step)
    seconds = time.perf_counter() - start
    last = next((text for line in reversed(lines) if (text := line.strip(" =\n"))), "")
    if code is None:
        return Outcome(step, "failed", seconds, f"stopped at its limit of {step.limit} s: {last}")
    if step.tool and any("Device not supported" in line for line in lines):
        return Outcome(step, "skipped", seconds, f"{step.tool} does not support this device")
    return Outcome(step, "failed" if code else "passed", seconds, last)


def _path() -> str:
    """Return the PATH with CUDA's own programs, which are often installed but not on the PATH."""
    cuda = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return os.pathsep.join([os.environ.get("PATH", os.defpath), f"{cuda}/bin"])


def _passed_on(step: Step) -> tuple[int | None, list[str]]:
    """Run the step; return its exit code (None at the time limit) and the last lines of its output.

    At the limit the step gets SIGINT, so that pytest prints its summary and the sweep draws its points; ``GRACE``
    seconds later it is killed with all processes that it started.
    """
    with _heard_interrupts():
        process = subprocess.Popen(
            step.command,
            cwd=ROOT,
            env={**os.environ, **step.environment, "PATH": _path(), "PYTHONUNBUFFERED": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,  # its own process group, to be killed as one
        )
    stopped = threading.Event()

    def stop() -> None:
        stopped.set()
        process.send_signal(signal.SIGINT)

    timers = [threading.Timer(step.limit, stop), threading.Timer(step.limit + GRACE, _end, [process])]
    for timer in timers:
        timer.start()
    lines: deque[str] = deque(maxlen=200)
    try:
        assert process.stdout is not None
        for line in process.stdout:
            sys.stdout.write(line)
            sys.stdout.flush()
            lines.append(line)
        code = process.wait()
    finally:
        for timer in timers:
            timer.cancel()
        if process.poll() is None:  # interrupted
            _end(process)
    return (None if stopped.is_set() else code), list(lines)


@contextlib.contextmanager
def _heard_interrupts() -> Iterator[None]:
    """Let the started processes react to SIGINT, which a script's background jobs start with ignored."""
    ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    if ignored:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        if ignored:
            signal.signal(signal.SIGINT, signal.SIG_IGN)


def _end(process: subprocess.Popen[str]) -> None:
    with contextlib.suppress(ProcessLookupError):  # it has just ended by itself
        os.killpg(process.pid, signal.SIGKILL)


def page(plan: Sequence[Step], results: Path) -> str:
    """Return what a CUDA machine would run."""
    lines = ["This machine has no CUDA device. With one, this command runs:", ""]
    for i, step in enumerate(plan, 1):
        lines += [f"{i}. {step.name}: {step.what}", f"     $ {step.shown}"]
        if step.tool:
            lines += [f"     skipped if {step.tool} is not installed"]
        lines += [f"     stopped after {step.limit} s", ""]
    cpu_steps = " and ".join(step.name for step in plan if step.on_cpu)
    lines += [
        f"If a step fails, the others still run; {results} gets a dated section with all outcomes.",
        f"This machine runs {cpu_steps or 'none of them'}, at sizes for a CPU.",
    ]
    return "\n".join(lines)


def main() -> int:
    names = [step.name for step in steps(Path(), quick=False)]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.proof", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="smaller, in less than 10 minutes")
    parser.add_argument("--only", action="append", choices=names, help="run only this step; can be repeated")
    parser.add_argument(
        "--results",
        type=Path,
        help="file for a dated section and plots/ (default: benchmarks/RESULTS.md on CUDA, else .benchmarks/)",
    )
    args = parser.parse_args()
    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    results = (args.results or ROOT / ("benchmarks" if cuda else ".benchmarks") / "RESULTS.md").resolve()
    plan = [step for step in steps(results, quick=args.quick) if step.name in (args.only or names)]
    if not plan:
        parser.error(f"--quick leaves out {' and '.join(args.only)}")
    if not cuda:
        print(page(plan, results), flush=True)
    print(f"\n{report.hardware(device)}; {report.state(device)}\n{report.versions()}; commit {report.commit()}")
    if missing := _missing(TRAINING):
        print(f"hypo_train's tests are skipped: {', '.join(missing)} not installed")
    report.open_section(results, device, f"python -m benchmarks.proof {shlex.join(sys.argv[1:])}".strip())
    start = time.perf_counter()
    outcomes = []
    for step in plan:
        outcome = run(step, cuda=cuda)
        outcomes.append(outcome)
        report.append(results, f"- {outcome.line}", "")
        print(f"== {outcome.line}", flush=True)
    print(f"\nproof kit on {report.hardware(device)}, {time.perf_counter() - start:.0f} s; {results}")
    for outcome in outcomes:
        print(f"  {outcome.line}")
    return int(any(outcome.status == "failed" for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
