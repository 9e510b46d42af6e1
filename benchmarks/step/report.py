"""Format the results of measured steps as tables."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from benchmarks.report import MIB, aligned, ratio
from benchmarks.step.phases import REST
from benchmarks.step.session import MeasuredCase, StepResult
from benchmarks.step.variants import DPO, HYPO, TRL_DPO, TRL_HYPO

PHASES = ("sample", "reference", "forward", "loss", "backward", "optimizer", REST)
COLUMNS = ("step", "s", "IQR", "x TRL DPO", "x TRL HyPO", *PHASES, "held", "peak", "err loss", "err grad")

# Targets as ratios of times: (variant, compared variant, largest ratio).
SMALL = "SmolLM2-135M"
TARGETS: dict[str, tuple[tuple[str, str, float], ...]] = {
    f"{SMALL}-full": ((HYPO, TRL_DPO, 0.6), (HYPO, TRL_HYPO, 0.3), (DPO, TRL_DPO, 0.4)),
    f"{SMALL}-LoRA": ((HYPO, TRL_DPO, 0.8),),
    f"{SMALL}-last-4": ((HYPO, TRL_DPO, 0.8),),
    "Pythia-2.8B-full": ((HYPO, TRL_DPO, 0.65),),
    "Llama-3-8B-last-4": ((HYPO, TRL_DPO, 1.5),),
}
SAMPLING_SHARE = {"Pythia-2.8B-full": 0.15}  # of the HyPO step


def tables(measured: Iterable[MeasuredCase], device: torch.device) -> str:
    return "\n\n".join("\n".join(table(case, device)) for case in measured)


def table(measured: MeasuredCase, device: torch.device) -> list[str]:
    """Return the title, a row per variant, the failures, and the targets that were met or missed."""
    done = [result for result in measured.results.values() if result.samples]
    lines = [measured.case.title, *aligned([COLUMNS, *(_cells(measured, result) for result in done)])]
    lines += [f"  WRONG    {r.variant.name}: {r.wrong}" for r in done if r.wrong]
    lines += [f"  FAILED   {r.variant.name}: {r.failed}" for r in measured.results.values() if r.failed]
    return [*lines, *target_lines(measured)]


def legend(device: torch.device) -> list[str]:
    memory = "torch's peak on the device" if device.type == "cuda" else "allocated by torch's CPU allocator in a step"
    return [
        "s: median seconds of an optimizer step with its sampling, in turns; IQR: interquartile range; phases: "
        "medians (TRL's forward pass and loss are in its rest)",
        f"held: MiB of policy, reference and AdamW's state; peak: held and the peak of a step ({memory})",
        "err: difference to TRL's step on given samples: of the loss, and the relative one of all gradients",
    ]


def target_lines(measured: MeasuredCase) -> list[str]:
    """Return each target of the case and whether it was met; memory must not exceed TRL's DPO step in any case."""
    lines = []
    for name, other, bound in TARGETS.get(str(measured.case), ()):
        ours, theirs = measured.seconds(name), measured.seconds(other)
        found = None if ours is None or theirs is None else ours / theirs
        lines.append(_target(f"{name} <= {bound} x {other}", found, bound))
    hypo, dpo = measured.results.get(HYPO), measured.results.get(TRL_DPO)
    share = SAMPLING_SHARE.get(str(measured.case))
    if share is not None and hypo is not None and hypo.samples:
        lines.append(_target(f"sampling <= {share} of the HyPO step", hypo.phase("sample") / hypo.median, share))
    for result in (measured.results.get(DPO), hypo):
        if result is not None and result.samples and dpo is not None and dpo.samples:
            lines.append(_target(f"{result.variant.name}: peak <= TRL DPO's", result.peak_bytes / dpo.peak_bytes, 1.0))
    return lines


def _target(what: str, found: float | None, bound: float) -> str:
    verdict = "not measured" if found is None else f"measured {found:.2f}: {'met' if found <= bound else 'MISSED'}"
    return f"  target   {what} -- {verdict}"


def _cells(measured: MeasuredCase, result: StepResult) -> tuple[str, ...]:
    return (
        result.variant.name,
        f"{result.median:.3g}",
        f"{result.spread:.2g}",
        ratio(measured.times(result, TRL_DPO)),
        ratio(measured.times(result, TRL_HYPO)),
        *(_seconds(result.phase(phase)) for phase in PHASES),
        f"{result.held_bytes / MIB:.0f}",
        f"{result.peak_bytes / MIB:.0f}",
        _error(result.loss_error),
        _error(result.gradient_error),
    )


def _seconds(seconds: float) -> str:
    return f"{seconds:.2g}" if seconds else "-"


def _error(error: float | None) -> str:
    return "-" if error is None else f"{error:.0e}"
