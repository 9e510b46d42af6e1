"""One contender while it is measured: its check, its samples, and its rest while others are measured."""

from __future__ import annotations

import gc
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.step.contender import Contender, Pool, caught_gradients, distance, move_from_reference
from benchmarks.step.material import Material
from benchmarks.step.memory import Parking, forget_peak, give_back, peak_bytes
from benchmarks.step.variants import Variant


class Tolerance(NamedTuple):
    loss: float  # absolute
    gradient: float  # |g - TRL's| / |TRL's|


# By whether the case computes in bf16. Two exact programs differ by rounding, in fp32 by 1e-7 (loss) and 1e-5
# (gradient: the KL's is weighted by differences of log-ratios that are sums themselves). Under bf16 autocast each
# token's log-prob is off by about 2**-8, and a sequence's by their sum.
TOLERANCE = {False: Tolerance(1e-4, 1e-3), True: Tolerance(5e-2, 0.2)}


@dataclass(frozen=True)
class Check:
    """A step on given samples compared with TRL's."""

    loss: float | None  # of DPO
    loss_error: float | None  # |loss - TRL's|
    gradient_error: float  # |gradient - TRL's| / |TRL's|, over all trained weights
    held_bytes: int
    wrong: str  # why the step is wrong, or an empty text


@dataclass(frozen=True)
class Sample:
    """The mean of ``steps_per_sample`` consecutive steps."""

    seconds: float
    phases: dict[str, float]
    peak_bytes: int  # of the whole process on a CPU, of torch's tensors on a GPU
    flop: float | None  # of the matrix products that the step needs
    wrong: str


class Trial:
    """Builds a variant's contender and measures it.

    On a CPU a trial has a process of its own (:mod:`benchmarks.step.process`) and gives its memory back while it rests.
    On a GPU all trials are in one process and share weights in ``pool``.
    """

    def __init__(self, variant: Variant, material: Material, folder: Path, pool: Pool | None = None) -> None:
        self.variant = variant
        self.material = material
        self.folder = folder
        self.contender = build(variant, material, folder / variant.name)
        self.device = next(iter(self.contender.parameters().values())).device
        self.pool = pool
        self.parking = Parking(folder / "weights") if pool is None else None
        self.rests = False

    def check(self) -> Check:
        """Compare a step on given samples, from weights away from the reference's, with TRL's step.

        The first trial of an algorithm writes its gradients and is the truth of the others. If only a part of the
        prompts gets samples, TRL has no such step: a prompt's samples are made equal then, which makes the KL's
        gradient 0, and the truth is DPO's.
        """
        contender, case = self.contender, self.material.case
        move_from_reference(contender)
        some = self.variant.online_fraction < 1
        contender.tap.given = self.material.given_samples(equal=some)
        with caught_gradients(contender) as gradients:
            loss = contender.step()
        contender.tap.given = None
        path = self.folder / f"truth-{'dpo' if some else self.variant.algorithm}.pt"
        if not path.exists():
            torch.save((loss, gradients), path)
        true_loss, truth = torch.load(path, mmap=True)
        loss_error = None if loss is None else abs(loss - true_loss)
        error = distance(gradients, truth)
        wrong = self._wrong_ids()
        if not wrong and loss_error is not None and not loss_error <= TOLERANCE[case.autocast].loss:
            wrong = f"loss {loss:.6g} is off by {loss_error:.2g}"
        if not wrong and not error <= TOLERANCE[case.autocast].gradient:
            wrong = f"gradient is off by {error:.2g}"
        found = Check(loss, loss_error, error, contender.held_bytes(), wrong)
        if self.pool is not None:
            self.pool.share(contender)
        return found

    def sample(self, steps: int | None = None) -> Sample:
        """Measure ``steps`` consecutive steps, by default the variant's ``steps_per_sample``."""
        steps = steps or self.variant.steps_per_sample
        if self.parking is not None and self.rests:
            self.parking.bring_back(self.contender)
        self.rests = False
        contender, phases, seconds = self.contender, Counter[str](), 0.0
        contender.flop()
        contender.tap.tokens = 0
        self._forget_peak()
        for _ in range(steps):
            give_back()  # before every step, so that one among several pays for as many page faults as one alone
            gc.disable()
            try:
                self._wait()
                start = time.perf_counter()
                phases.update(contender.timed_step())
                seconds += time.perf_counter() - start
            finally:
                gc.enable()
        flop = contender.flop()
        return Sample(
            seconds / steps,
            {name: value / steps for name, value in phases.items()},
            self._peak_bytes(),
            None if flop is None else flop / steps,
            self._wrong_draw() if steps % self.variant.steps_per_sample == 0 else "",
        )

    def rest(self) -> None:
        """Give back the memory that others could use until the next sample."""
        if self.parking is not None:
            self.parking.park(self.contender)
        else:
            give_back()
        self.rests = True

    def close(self) -> None:
        del self.contender
        give_back()

    def _wrong_ids(self) -> str:
        contender, pairs = self.contender, self.material.pairs
        if contender.seen_pairs() != {(pair.prompt, pair.chosen, pair.rejected) for pair in pairs}:
            return "other token ids than it was given"
        if self.variant.algorithm == "dpo":
            return ""
        given, asked = {pair.prompt for pair in pairs}, contender.tap.prompts
        if not (asked == given if self.variant.online_fraction == 1 else asked and asked <= given):
            return "samples from other prompts than it was given"
        return ""

    def _wrong_draw(self) -> str:
        case, variant, tokens = self.material.case, self.variant, self.contender.tap.tokens
        prompts = variant.online_fraction * case.pairs * variant.steps_per_sample if variant.algorithm == "hypo" else 0
        of_prompt = case.num_generations * case.new_tokens
        # A share of the prompts need not be a whole number in every window.
        expected, off = round(prompts * of_prompt), of_prompt if variant.online_fraction < 1 else 0
        return "" if abs(tokens - expected) <= off else f"drew {tokens} tokens, not {expected}"

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _forget_peak(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            forget_peak()

    def _peak_bytes(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return peak_bytes()


def build(variant: Variant, material: Material, output_dir: Path) -> Contender:
    """Return the variant's trainer on the case's material."""
    if variant.side == "ours":
        from benchmarks.step.ours import Ours

        return Ours(variant, material, output_dir)
    from benchmarks.step.trl_side import TrlDPO, TrlHyPO

    return (TrlDPO if variant.algorithm == "dpo" else TrlHyPO)(variant, material, output_dir)
