"""Check every variant of a case, measure its memory, and time all of them in turns."""

from __future__ import annotations

import ctypes
import gc
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.measure import median, peak_extra_bytes, spread
from benchmarks.step.cases import Case
from benchmarks.step.contender import Contender, Pool, caught_gradients, distance, move_from_reference
from benchmarks.step.material import Material, prepare_material
from benchmarks.step.ours import Ours
from benchmarks.step.trl_side import TrlDPO, TrlHyPO
from benchmarks.step.variants import TRL_DPO, TRL_HYPO, Variant, variants


class Tolerance(NamedTuple):
    loss: float  # absolute
    gradient: float  # |g - TRL's| / |TRL's|


# By whether the case computes in bf16. Two exact programs differ by rounding, in fp32 by 1e-7 (loss) and 1e-5
# (gradient: the KL's is weighted by differences of log-ratios that are sums themselves). Under bf16 autocast each
# token's log-prob is off by about 2**-8, and a sequence's by their sum.
TOLERANCE = {False: Tolerance(1e-4, 1e-3), True: Tolerance(5e-2, 0.2)}
TRUTH = {"dpo": TRL_DPO, "hypo": TRL_HYPO}


@dataclass
class StepResult:
    """The result of one variant in one case; ``failed`` says why it has no samples."""

    variant: Variant
    failed: str = ""
    wrong: str = ""
    loss: float | None = None  # DPO's loss in the step that is compared with TRL's
    loss_error: float | None = None  # |loss - TRL's|
    gradient_error: float | None = None  # |gradient - TRL's| / |TRL's|, over all trained weights
    held_bytes: int = 0  # policy, reference and AdamW's state
    extra_bytes: int = 0  # peak of a step beyond these
    samples: list[float] = field(default_factory=list)  # seconds of a step
    phases: list[dict[str, float]] = field(default_factory=list)  # seconds, one entry a sample

    @property
    def median(self) -> float:
        return median(self.samples)

    @property
    def spread(self) -> float:
        return spread(self.samples)

    @property
    def peak_bytes(self) -> int:
        return self.held_bytes + self.extra_bytes

    def phase(self, name: str) -> float:
        """Return the median seconds of a phase; 0 if it never ran."""
        return median([phases.get(name, 0.0) for phases in self.phases]) if self.phases else 0.0


@dataclass
class MeasuredCase:
    """The results of a case by the variant's name."""

    case: Case
    results: dict[str, StepResult]

    def seconds(self, name: str) -> float | None:
        """Return the median seconds of a variant, or None if it did not run or was wrong."""
        result = self.results.get(name)
        return result.median if result is not None and result.samples and not result.wrong else None

    def times(self, result: StepResult, name: str) -> float | None:
        """Return the ratio of the median time to that of variant ``name``, or None if that one did not run."""
        other = self.seconds(name)
        return None if other is None or not result.samples else result.median / other


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
        """Measure ``names`` and the variants that they are compared with. Raises Missing."""
        if case not in self.measured:
            wanted = {*names, *TRUTH.values()}
            start = time.perf_counter()
            with tempfile.TemporaryDirectory() as folder:
                material = prepare_material(case, Path(folder), self.device)
                chosen = [variant for variant in variants(case) if variant.name in wanted]
                self.measured[case] = self._measure(material, chosen, Path(folder))
            _clear(self.device)
            self.on_measured(self.measured[case], time.perf_counter() - start)
        return self.measured[case]

    def _measure(self, material: Material, chosen: list[Variant], folder: Path) -> MeasuredCase:
        results = {variant.name: StepResult(variant) for variant in chosen}
        contenders: dict[str, Contender] = {}
        pool, truths = Pool(), dict[str, tuple[float | None, dict[str, Tensor]]]()
        for i, variant in enumerate(chosen):
            result = results[variant.name]
            try:
                contender = build(variant, material, folder / str(i))
                self._check(contender, result, material, truths)
                pool.share(contender)
                _clear(self.device)
                _, result.extra_bytes = peak_extra_bytes(contender.step, self.device)
            except Exception as error:
                if variant.side == "TRL":  # there is nothing to compare with
                    raise
                result.failed = f"{type(error).__name__}: {error}".splitlines()[0]
            else:
                contenders[variant.name] = contender
        truths.clear()
        self._take_turns(contenders, results)
        return MeasuredCase(material.case, results)

    def _check(
        self,
        contender: Contender,
        result: StepResult,
        material: Material,
        truths: dict[str, tuple[float | None, dict[str, Tensor]]],
    ) -> None:
        """Compare a step on given samples, from weights away from the reference's, with TRL's step."""
        move_from_reference(contender)
        contender.tap.given = material.given_samples()
        with caught_gradients(contender) as gradients:
            result.loss = contender.step()
        contender.tap.given = None
        result.held_bytes = contender.held_bytes()
        algorithm = result.variant.algorithm
        loss, truth = truths.setdefault(algorithm, (result.loss, gradients))
        if loss is not None and result.loss is not None:
            result.loss_error = abs(result.loss - loss)
        result.gradient_error = distance(gradients, truth)
        result.wrong = _wrong(result, contender, material)

    def _take_turns(self, contenders: dict[str, Contender], results: dict[str, StepResult]) -> None:
        """Time one step of each per round. Each round starts with another one; every second round runs backwards."""
        names = list(contenders)
        for turn in range(self.rounds):
            first = turn % max(1, len(names))
            order = names[first:] + names[:first]
            for name in order if turn % 2 == 0 else reversed(order):
                contender, result = contenders[name], results[name]
                contender.tap.tokens = 0
                _clear(self.device)
                gc.disable()
                try:
                    _wait(self.device)
                    start = time.perf_counter()
                    phases = contender.timed_step()
                    result.samples.append(time.perf_counter() - start)
                finally:
                    gc.enable()
                result.phases.append(phases)
                result.wrong = result.wrong or _wrong_draw(contender, result)


def build(variant: Variant, material: Material, output_dir: Path) -> Contender:
    """Return the variant's trainer on the case's material."""
    if variant.side == "ours":
        return Ours(variant, material, output_dir)
    return (TrlDPO if variant.algorithm == "dpo" else TrlHyPO)(variant, material, output_dir)


def _wrong(result: StepResult, contender: Contender, material: Material) -> str:
    """Return why the checked step is wrong, or an empty text."""
    tolerance = TOLERANCE[material.case.autocast]
    if contender.seen_pairs() != {(pair.prompt, pair.chosen, pair.rejected) for pair in material.pairs}:
        return "other token ids than it was given"
    if result.variant.algorithm == "hypo" and contender.tap.prompts != {pair.prompt for pair in material.pairs}:
        return "samples from other prompts than it was given"
    if result.loss_error is not None and not result.loss_error <= tolerance.loss:
        return f"loss {result.loss:.6g} is off by {result.loss_error:.2g}"
    if result.gradient_error is not None and not result.gradient_error <= tolerance.gradient:
        return f"gradient is off by {result.gradient_error:.2g}"
    return ""


def _wrong_draw(contender: Contender, result: StepResult) -> str:
    case = contender.tap.material.case
    expected = case.pairs * case.num_generations * case.new_tokens if result.variant.algorithm == "hypo" else 0
    if contender.tap.tokens == expected:
        return ""
    return f"drew {contender.tap.tokens} tokens a step, not {expected}"


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _clear(device: torch.device) -> None:
    """Free unused memory, so that every step starts alike and a dozen contenders fit into memory."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif trim := getattr(ctypes.CDLL(None), "malloc_trim", None):  # glibc keeps gigabytes in pieces otherwise
        trim(0)
