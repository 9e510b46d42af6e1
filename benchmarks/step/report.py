"""Format the results of measured steps as tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from benchmarks.report import MIB, aligned, ratio
from benchmarks.step.phases import REST
from benchmarks.step.session import MeasuredCase, StepResult
from benchmarks.step.variants import DPO, HYPO, HYPO_RECOMMENDED, TRL_DPO

PHASES = ("sample", "reference", "forward", "loss", "backward", "optimizer", REST)
COLUMNS = ("step", "s", "IQR", "x DPO", "x TRL best", "+ s", "x GEMMs", "peak MiB", "err loss", "err grad")

# Targets as ratios of times: (variant, compared variant, largest ratio). None: TRL's fastest DPO.
SMALL = "SmolLM2-135M"
TARGETS: dict[str, tuple[tuple[str, str | None, float], ...]] = {
    f"{SMALL}-full-TLDR": (
        (HYPO, DPO, 1.6),
        (HYPO, None, 0.65),
    ),
    f"{SMALL}-full-TLDR-32": ((HYPO_RECOMMENDED, DPO, 1.25), (HYPO_RECOMMENDED, None, 0.5)),
    f"{SMALL}-full-chat": (
        (HYPO, DPO, 3.0),
        (HYPO, None, 1.5),
    ),
    f"{SMALL}-full-chat-32": ((HYPO_RECOMMENDED, DPO, 1.5), (HYPO_RECOMMENDED, None, 0.75)),
    f"{SMALL}-LoRA-TLDR": ((HYPO, None, 0.8),),
    f"{SMALL}-last-4-TLDR": ((HYPO, None, 0.8),),
    "Pythia-2.8B-full-TLDR": ((HYPO, TRL_DPO, 0.65),),
    "Llama-3-8B-last-4-UltraFeedback": ((HYPO, TRL_DPO, 1.5),),
}
BEST = "TRL's best DPO"
SAMPLING_SHARE = {"Pythia-2.8B-full-TLDR": 0.15}  # of the HyPO step


def tables(measured: Iterable[MeasuredCase], device: torch.device) -> str:
    return "\n\n".join("\n".join(table(case, device)) for case in measured)


def table(measured: MeasuredCase, device: torch.device) -> list[str]:
    """Return the title, a row per variant, its phases, the failures, and the targets that were met or missed."""
    done = [result for result in measured.results.values() if result.samples]
    phases = [phase for phase in PHASES if any(result.phase(phase) for result in done)]
    rate = f", bare GEMMs {measured.gemm_rate / 1e9:.0f} GFLOP/s" if measured.gemm_rate else ""
    best = measured.best_trl_dpo
    lines = [f"{measured.case.title}, {measured.case.dtype}{rate}"]
    lines += aligned([COLUMNS, *(_cells(measured, result) for result in done)])
    lines += [f"  TRL best: {best.variant.name}"] if best is not None else []
    lines += ["", *aligned([("seconds by phase", *phases), *(_phases(result, phases) for result in done)])]
    lines += [f"  WRONG    {r.variant.name}: {r.wrong}" for r in done if r.wrong]
    lines += [f"  FAILED   {r.variant.name}: {r.failed}" for r in measured.results.values() if r.failed]
    return [*lines, *target_lines(measured)]


def legend(device: torch.device) -> list[str]:
    peak = "torch's peak on the device" if device.type == "cuda" else "the most resident memory of its process"
    return [
        "s: median seconds of an optimizer step with its sampling, in turns; IQR: interquartile range; "
        "x: ratio of seconds; + s: seconds beyond DPO's",
        "TRL best: the fastest right DPO of TRL's; x GEMMs: seconds over those of the step's necessary products at the "
        "rate of bare GEMMs (counted for this project's steps alone)",
        f"peak: {peak}; phases: medians (TRL's forward pass and loss are in its rest)",
        "err: difference to TRL's step on given samples: of the loss, and the relative one of all gradients",
    ]


def target_lines(measured: MeasuredCase) -> list[str]:
    """Return each target of the case and whether it was met; memory must not exceed TRL's DPO step in any case."""
    lines = []
    key = str(measured.case).removesuffix(f"-{measured.case.dtype}")
    for name, other, bound in TARGETS.get(key, ()):
        result = measured.results.get(name)
        found = None
        if result is not None and result.is_right:
            found = measured.times_best(result) if other is None else measured.times(result, other)
        lines.append(_target(f"{name} <= {bound} x {other or BEST}", found, bound))
    hypo, dpo = measured.results.get(HYPO), measured.results.get(TRL_DPO)
    share = SAMPLING_SHARE.get(key)
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
    extra = measured.extra_seconds(result)
    return (
        result.variant.name,
        f"{result.median:.3g}",
        f"{result.spread:.2g}",
        ratio(measured.times(result, DPO)),
        ratio(measured.times_best(result)),
        "-" if extra is None else f"{extra:+.2f}",
        ratio(measured.times_gemms(result)),
        f"{result.peak_bytes / MIB:.0f}",
        _error(result.loss_error),
        _error(result.gradient_error),
    )


def _phases(result: StepResult, phases: Sequence[str]) -> tuple[str, ...]:
    return (result.variant.name, *(_seconds(result.phase(phase)) for phase in phases))


def _seconds(seconds: float) -> str:
    return f"{seconds:.2g}" if seconds else "-"


def _error(error: float | None) -> str:
    return "-" if error is None else f"{error:.0e}"
