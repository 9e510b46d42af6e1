"""The loss's targets on CUDA, and whether a run met them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch

from benchmarks.providers import GEMMS, OURS
from benchmarks.session import Measured, Result
from benchmarks.workloads import LLAMA, LLAMA_1K, LLAMA_HALF, MODES, PYTHIA, Group, Workload

GIB = 2**30
OUR_NAME = OURS["cuda"]


@dataclass(frozen=True)
class Target:
    """A bound for ``quantity``, a function of a group and of all groups of the run; None if it was not measured."""

    group: Group
    what: str  # the target and its bound in words
    quantity: Callable[[Measured, Mapping[Group, Measured]], float | None]
    bound: float
    at_least: bool = False
    digits: str = ".2f"

    def line(self, groups: Mapping[Group, Measured]) -> str:
        measured = groups.get(self.group)
        found = None if measured is None else self.quantity(measured, groups)
        if found is None:
            verdict = "not measured"
        else:
            met = found >= self.bound if self.at_least else found <= self.bound
            verdict = f"measured {format(found, self.digits)}: {'met' if met else 'MISSED'}"
        return f"{self.group}: {self.what} -- {verdict}"


def ours(measured: Measured) -> Result | None:
    """Return our result in a group, or None if it did not run or is wrong."""
    result = measured.results.get(OUR_NAME)
    return result if result is not None and result.samples and not result.wrong else None


def best_fused_head(measured: Measured) -> Result | None:
    """Return the fastest right result of a peer's per-token head."""
    peers = [r for r in measured.results.values() if r.provider.is_fused_head and r.samples and not r.wrong]
    return min(peers, key=lambda result: result.median, default=None)


def _times_gemms(measured: Measured, groups: Mapping[Group, Measured]) -> float | None:
    result = ours(measured)
    return None if result is None else measured.times(result, GEMMS)


def _peer_times_ours(measured: Measured, groups: Mapping[Group, Measured]) -> float | None:
    result, best = ours(measured), best_fused_head(measured)
    return None if result is None or best is None else best.median / result.median


def _gib_beyond_gradients(measured: Measured, groups: Mapping[Group, Measured]) -> float | None:
    result = ours(measured)
    return None if result is None else (result.peak_bytes - result.gradient_bytes) / GIB


def _share_of_all_rows(measured: Measured, groups: Mapping[Group, Measured]) -> float | None:
    whole = groups.get(Group(LLAMA, measured.group.mode))
    some, every = ours(measured), None if whole is None else ours(whole)
    return None if some is None or every is None else some.median / every.median


def _error(*quantities: str) -> Callable[[Measured, Mapping[Group, Measured]], float | None]:
    def worst(measured: Measured, groups: Mapping[Group, Measured]) -> float | None:
        result = ours(measured)
        return None if result is None else max(result.errors[quantity] for quantity in quantities)

    return worst


def _error_beside_rounded(measured: Measured, groups: Mapping[Group, Measured]) -> float | None:
    result = ours(measured)
    if result is None or not measured.rounded:
        return None
    known = {name: error for name, error in result.errors.items() if name in measured.rounded}
    return max(error / measured.rounded[name] for name, error in known.items())


def _near_gemms(workload: Workload, mode: str, bound: float) -> Target:
    return Target(Group(workload, mode), f"<= {bound:.2f} x the bare GEMMs", _times_gemms, bound)


def _faster(workload: Workload, mode: str, bound: float) -> Target:
    what = f">= {bound:.1f} x faster than the best per-token peer"
    return Target(Group(workload, mode), what, _peer_times_ours, bound, at_least=True)


TARGETS = (
    _near_gemms(LLAMA, "forward", 1.12),
    _near_gemms(LLAMA, "frozen", 1.15),
    _faster(LLAMA, "frozen", 1.9),
    _near_gemms(LLAMA, "trained", 1.15),
    _faster(LLAMA, "trained", 1.3),
    Target(Group(LLAMA, "trained"), "<= 1.25 GiB beyond the gradients", _gib_beyond_gradients, 1.25),
    *(_near_gemms(workload, mode, 1.25) for workload in (PYTHIA, LLAMA_1K) for mode in MODES),
    *(
        # Half of each prompt is rounded down, so a little more than half of the rows count.
        Target(Group(LLAMA_HALF, mode), "<= 0.55 x the time of all rows", _share_of_all_rows, 0.55)
        for mode in MODES
    ),
    Target(Group(LLAMA, "forward"), "error of log-probs <= 1e-5", _error("logps"), 1e-5, digits=".1e"),
    Target(Group(LLAMA, "trained"), "error of log-probs <= 1e-5", _error("logps"), 1e-5, digits=".1e"),
    Target(Group(LLAMA, "trained"), "gradient error <= 1 x that of exact d-logits in bf16", _error_beside_rounded, 1.0),
)


def lines(measured: Iterable[Measured], device: torch.device) -> Iterator[str]:
    """Yield one line per target. The targets are for CUDA: a CPU gets no lines."""
    if device.type == "cuda":
        groups = {group.group: group for group in measured}
        yield from (f"target {target.line(groups)}" for target in TARGETS)
