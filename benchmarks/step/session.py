"""Check every variant of a case, and time all of them in turns."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from benchmarks.measure import median, spread
from benchmarks.step.cases import Case
from benchmarks.step.contender import Pool
from benchmarks.step.material import Material, prepare_material
from benchmarks.step.process import TrialError, TrialProcess
from benchmarks.step.rate import gemm_rate
from benchmarks.step.trial import Trial
from benchmarks.step.variants import DPO, TRL_DPO, TRL_HYPO, Variant, variants

TRUTH = {"dpo": TRL_DPO, "hypo": TRL_HYPO}  # unless another variant of TRL's for the algorithm is measured


@dataclass
class StepResult:
    """The result of one variant in one case; ``failed`` says why it has no samples."""

    variant: Variant
    failed: str = ""
    wrong: str = ""
    loss_error: float | None = None  # |loss - TRL's|, of DPO
    gradient_error: float | None = None  # |gradient - TRL's| / |TRL's|, over all trained weights
    held_bytes: int = 0  # policy, reference and AdamW's state
    peak_bytes: int = 0  # the most memory in the measured steps
    flop: float | None = None  # of the matrix products that a step needs
    first_seconds: float = 0.0  # of the step before the measured ones
    samples: list[float] = field(default_factory=list)  # seconds of a step
    phases: list[dict[str, float]] = field(default_factory=list)  # seconds, one entry a sample

    @property
    def is_right(self) -> bool:
        return bool(self.samples) and not self.wrong and not self.failed

    @property
    def median(self) -> float:
        return median(self.samples)

    @property
    def spread(self) -> float:
        return spread(self.samples)

    def phase(self, name: str) -> float:
        """Return the median seconds of a phase; 0 if it never ran."""
        return median([phases.get(name, 0.0) for phases in self.phases]) if self.phases else 0.0


@dataclass
class MeasuredCase:
    """The results of a case by the variant's name."""

    case: Case
    results: dict[str, StepResult]
    gemm_rate: float | None = None  # FLOP per second of bare products in the case's dtype, during the same rounds

    @property
    def best_trl_dpo(self) -> StepResult | None:
        """Return the fastest right DPO of TRL's."""
        found = [result for result in self.results.values() if result.variant.is_trl_dpo and result.is_right]
        return min(found, key=lambda result: result.median, default=None)

    def seconds(self, name: str) -> float | None:
        """Return the median seconds of a variant, or None if it did not run or was wrong."""
        result = self.results.get(name)
        return result.median if result is not None and result.is_right else None

    def times(self, result: StepResult, name: str) -> float | None:
        """Return the ratio of the median time to that of variant ``name``, or None if that one did not run."""
        other = self.seconds(name)
        return None if other is None or not result.samples else result.median / other

    def times_best(self, result: StepResult) -> float | None:
        """Return the ratio of the median time to that of TRL's fastest DPO."""
        best = self.best_trl_dpo
        return None if best is None or not result.samples else result.median / best.median

    def extra_seconds(self, result: StepResult) -> float | None:
        """Return the seconds beyond those of this project's DPO step."""
        other = self.seconds(DPO)
        return None if other is None or not result.samples else result.median - other

    def times_gemms(self, result: StepResult) -> float | None:
        """Return the ratio of the time to that of the step's bare matrix products, if they were counted."""
        if result.flop is None or self.gemm_rate is None or not result.samples:
            return None
        return result.median * self.gemm_rate / result.flop


class StepSession:
    """Measures each case once. ``on_measured`` is called with every measured case and the seconds that it took."""

    def __init__(
        self, device: torch.device, *, rounds: int, on_measured: Callable[[MeasuredCase, float], None]
    ) -> None:
        self.device = device
        self.rounds = rounds
        self.on_measured = on_measured
        self.measured: dict[Case, MeasuredCase] = {}

    def measure(self, case: Case, names: Iterable[str]) -> MeasuredCase:
        """Measure ``names``, compared with TRL's steps. Raises Missing."""
        if case not in self.measured:
            wanted = set(names)
            chosen = [variant for variant in variants(case) if variant.name in wanted]
            start = time.perf_counter()
            with tempfile.TemporaryDirectory() as folder:
                material = prepare_material(case, Path(folder), self.device)
                self.measured[case] = self._measure(material, chosen, Path(folder))
            self.on_measured(self.measured[case], time.perf_counter() - start)
        return self.measured[case]

    def _measure(self, material: Material, chosen: list[Variant], folder: Path) -> MeasuredCase:
        results = {variant.name: StepResult(variant) for variant in chosen}
        trials: dict[str, Trial | TrialProcess] = {}
        pool = Pool()

        def start(variant: Variant) -> Trial | TrialProcess:
            if self.device.type == "cuda":
                return Trial(variant, material, folder, pool)
            return TrialProcess(variant, material, folder)

        try:
            for variant in _truths(material.case, chosen):  # not timed: there is nothing to compare with without them
                trial = start(_settled(variant, results))
                trial.check()
                trial.close()
            for variant in chosen:
                result = results[variant.name]
                result.variant = _settled(variant, results)
                try:
                    trial = trials[variant.name] = start(result.variant)
                    check = trial.check()
                    result.loss_error, result.gradient_error = check.loss_error, check.gradient_error
                    result.held_bytes, result.wrong = check.held_bytes, check.wrong
                    result.first_seconds = trial.sample(1).seconds
                    trial.rest()
                except Exception as error:
                    _fail(result, error)
                    if variant.name in trials:
                        trials.pop(variant.name).close()
            rate = self._take_turns(trials, results, material.case)
        finally:
            for trial in trials.values():
                trial.close()
        return MeasuredCase(material.case, results, rate)

    def _take_turns(
        self, trials: dict[str, Trial | TrialProcess], results: dict[str, StepResult], case: Case
    ) -> float | None:
        """Take a sample of each per round. Each round starts with another one; every second round runs backwards.

        Return the rate of bare products, measured in every round.
        """
        names, rates = list(trials), []
        for turn in range(self.rounds):
            rates.append(gemm_rate(self.device, torch.bfloat16 if case.autocast else torch.float32))
            first = turn % max(1, len(names))
            order = names[first:] + names[:first]
            for name in order if turn % 2 == 0 else reversed(order):
                trial, result = trials[name], results[name]
                if result.failed:
                    continue
                try:
                    sample = trial.sample()
                    trial.rest()
                except Exception as error:
                    _fail(result, error)
                    continue
                result.samples.append(sample.seconds)
                result.phases.append(sample.phases)
                result.peak_bytes = max(result.peak_bytes, sample.peak_bytes)
                result.flop = sample.flop
                result.wrong = result.wrong or sample.wrong
        return median(rates) if rates else None


def _truths(case: Case, chosen: list[Variant]) -> list[Variant]:
    """Return TRL's variants that the chosen ones are compared with, as far as they are not among them."""
    needed = {"dpo" if variant.online_fraction < 1 else variant.algorithm for variant in chosen}
    present = {variant.algorithm for variant in chosen if variant.side == "TRL"}
    return [variant for variant in variants(case) if variant.name in {TRUTH[name] for name in needed - present}]


def _settled(variant: Variant, results: dict[str, StepResult]) -> Variant:
    """Return the variant; one that runs as TRL's best DPO gets that one's settings."""
    if not variant.as_best_dpo:
        return variant
    ran = [result for result in results.values() if result.variant.is_trl_dpo and result.first_seconds]
    best = min(ran, key=lambda result: result.first_seconds, default=None)
    return variant if best is None else replace(variant, settings=best.variant.settings)


def _fail(result: StepResult, error: Exception) -> None:
    result.failed = str(error) if isinstance(error, TrialError) else f"{type(error).__name__}: {error}".splitlines()[0]
