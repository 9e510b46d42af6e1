"""Measure each group once, all of its providers in turns."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch

from benchmarks.accuracy import Truth, errors, truth, wrong
from benchmarks.measure import Step, interleaved, median, peak_extra_bytes, spread
from benchmarks.providers import BY_NAME, EAGER, GEMMS, OURS, Provider, Unavailable
from benchmarks.workloads import Batch, Group, Workload, make_batch

# A run that takes this many seconds and this many times our time is reported without repeats. The ratio keeps a busy
# machine from dropping peers that are only slower.
LONG_RUN = {"cuda": 2.0, "cpu": 4.0}
LONG_TIMES_OURS = 5


@dataclass
class Result:
    """One provider in one group. Without samples, ``skipped`` says why (``failed`` if it should have run)."""

    provider: Provider
    skipped: str = ""
    failed: str = ""
    wrong: str = ""
    errors: dict[str, float] = field(default_factory=dict)
    peak_bytes: int = 0  # beyond the inputs, gradients included
    gradient_bytes: int = 0
    run_seconds: float = 0.0  # of the run that measured the peak
    samples: list[float] = field(default_factory=list)  # seconds, on CUDA with a cold cache
    hot_samples: list[float] = field(default_factory=list)  # seconds with a hot cache, only on CUDA

    @property
    def median(self) -> float:
        return median(self.samples)

    @property
    def hot_median(self) -> float | None:
        return median(self.hot_samples) if self.hot_samples else None

    @property
    def spread(self) -> float:
        return spread(self.samples)


@dataclass
class Measured:
    """A group's results, by provider name."""

    group: Group
    counted_rows: int
    results: dict[str, Result]
    rounded: dict[str, float]  # gradient errors if exact gradients of logits are rounded to 16 bits

    @property
    def flop(self) -> float:
        """FLOP of the necessary GEMMs."""
        workload = self.group.workload
        return 2.0 * self.group.gemms * self.counted_rows * workload.vocab * workload.width

    def times(self, result: Result, name: str) -> float | None:
        """Return the ratio of the median time to that of provider ``name``, or None if that one did not run."""
        other = self.results.get(name)
        return result.median / other.median if other is not None and other.samples else None


class Session:
    """A measuring session; it holds the batch and the truth of one workload at a time.

    ``on_measured`` is called with every measured group and the seconds that it took.
    """

    def __init__(
        self, device: torch.device, *, few_rounds: bool, on_measured: Callable[[Measured, float], None]
    ) -> None:
        self.device = device
        self.few_rounds = few_rounds
        self.on_measured = on_measured
        self.measured: dict[Group, Measured] = {}
        self._workload: Workload | None = None
        self._batch: Batch | None = None
        self._truth: Truth | None = None

    def measure(self, group: Group, names: Iterable[str]) -> Measured:
        """Measure ``names`` and the providers that they are compared with."""
        if group not in self.measured:
            wanted = {*names, GEMMS, EAGER, OURS[self.device.type]}
            start = time.perf_counter()
            self.measured[group] = self._measure(group, [BY_NAME[name] for name in BY_NAME if name in wanted])
            self.on_measured(self.measured[group], time.perf_counter() - start)
        return self.measured[group]

    def _measure(self, group: Group, providers: list[Provider]) -> Measured:
        batch = self._prepare(group.workload)
        exact = self._exact(batch, gradients=group.mode != "forward")
        results, steps = {}, {}
        for provider in providers:
            result, step = self._first_runs(provider, batch, group.mode, exact)
            results[provider.name] = result
            if step is not None:
                steps[provider.name] = step
        ours = results[OURS[self.device.type]].run_seconds
        limit = max(LONG_RUN[self.device.type], LONG_TIMES_OURS * ours)
        for result in results.values():
            if result.run_seconds > limit:
                result.skipped = f"one run took {result.run_seconds:.1f} s and ours {ours:.1f} s: too long to repeat"
                del steps[result.provider.name]
        for name in steps.keys() - {GEMMS}:
            result = results[name]
            result.wrong = wrong(result.errors, results[EAGER].errors, group.mode, group.workload.dtype)
        cuda = self.device.type == "cuda"
        samples = interleaved(
            steps,
            self.device,
            before=lambda: batch.prepare(group.mode),
            seconds=1.0 if self.few_rounds else 6.0,
            min_rounds=3 if self.few_rounds else 5,
            max_rounds=50 if cuda else 15,
            warm_up_rounds=1 if cuda else 0,  # a GPU's clocks need time to rise
        )
        for name, (seconds, *hot) in samples.items():
            results[name].samples = seconds
            results[name].hot_samples = hot[0] if hot else []
        batch.prepare(group.mode)
        return Measured(group, len(batch.counted_rows), results, exact.rounded if group.mode != "forward" else {})

    def _first_runs(self, provider: Provider, batch: Batch, mode: str, exact: Truth) -> tuple[Result, Step | None]:
        """Run once to compile and compare, and once to measure memory. A peer that fails is skipped with its reason."""
        result = Result(provider)
        try:
            batch.prepare(mode)
            step = provider.make_step(batch, mode)
            logps = step()
            if provider.name != GEMMS:
                result.errors = errors(exact, batch, logps)
            del logps
            batch.prepare(mode)
            start = time.perf_counter()
            _, result.peak_bytes = peak_extra_bytes(step, self.device)
            result.run_seconds = time.perf_counter() - start
            result.gradient_bytes = sum(grad.nbytes for grad in batch.grads)
        except Unavailable as why:
            result.skipped = str(why)
        except Exception as error:
            if provider.is_ours:
                result.failed = _one_line(error)
            else:
                result.skipped = _one_line(error)
        if result.skipped or result.failed:
            return result, None
        return result, step

    def _prepare(self, workload: Workload) -> Batch:
        if self._workload != workload or self._batch is None:
            self._batch = self._truth = None
            gc.collect()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            last, self._workload = self._workload, workload
            if last is None or (last.vocab, last.width, last.dtype) != (workload.vocab, workload.width, workload.dtype):
                torch.compiler.reset()  # compilers then specialize for these shapes and never reach their limit
            self._batch = make_batch(workload, self.device)
        return self._batch

    def _exact(self, batch: Batch, *, gradients: bool) -> Truth:
        if self._truth is None or (gradients and self._truth.hidden is None):
            self._truth = None
            self._truth = truth(batch, gradients=gradients)
        return self._truth


def _one_line(error: Exception) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0] if text else 'no message'}"
