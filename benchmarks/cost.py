"""What each schedule has to do: FLOP and bytes of its operations, and the least time a device can take for them.

    python -m benchmarks.cost --rows 8192 --vocab 128256 --width 4096 --tflops 790 --bandwidth 4.3

The model knows four things, and nothing of the code's functions: the GEMMs, how often the row step reads and
writes the (C, V) buffer of a chunk, the passes over a weight gradient (V, D), and those over hidden states
(C, D). An operation takes the longer of its FLOP at the device's GEMM rate and its bytes at its bandwidth;
operations follow one another. ``tests/benchmarks/test_cost.py`` holds the model against the operations that
torch issues (``issued.py``).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
WIDE = 4  # bytes of an fp32 logit, statistic or sum


@dataclass(frozen=True)
class Operation:
    """One operation, summed over the chunks of a call."""

    name: str
    read: int  # bytes
    written: int  # bytes
    flop: int = 0

    @property
    def bytes(self) -> int:
        return self.read + self.written

    @property
    def is_gemm(self) -> bool:
        return self.flop > 0

    def seconds(self, rate: float, bandwidth: float) -> float:
        """The least it can take, at ``rate`` FLOP/s and ``bandwidth`` bytes/s."""
        return max(self.flop / rate, self.bytes / bandwidth)


@dataclass(frozen=True)
class Passes:
    """How often a row step goes over a chunk's raw logits (C, V), in fp32, and its unit gradients (C, V)."""

    logits_read: int
    logits_written: int = 0
    gradients_written: int = 0  # in the dtype of GEMM operands


@dataclass(frozen=True)
class RowStep:
    """The passes of the row step's three uses: norms alone, norms and gradients, gradients from known norms."""

    statistics: Passes
    gradients: Passes
    known_norms: Passes


ROW_STEPS = {
    # The gradients read a row a second time, from L2 where the resident rows fit in it: counted as memory here.
    "triton": RowStep(Passes(1), Passes(2, gradients_written=1), Passes(1, gradients_written=1)),
    # One operator of torch after another: amax, −, exp, sum, ÷. A block of rows stays in a CPU's cache.
    "torch": RowStep(Passes(4, 2), Passes(5, 3), Passes(3, 3)),
}


@dataclass(frozen=True)
class Work:
    """The sizes of a call. ``rows`` N are those that count; ``chunks`` is how many GEMMs the logits take."""

    rows: int
    vocab: int
    width: int
    chunks: int = 1
    operand: int = 2  # bytes of an element of hidden, weight and GEMM operands
    row_step: RowStep = ROW_STEPS["triton"]

    @property
    def nvd(self) -> int:
        return self.rows * self.vocab * self.width

    def logits(self, name: str = "logits = hidden . W'") -> Iterator[Operation]:
        yield Operation("gather hidden", self._hidden, self._hidden)
        yield Operation(name, self._hidden + self.chunks * self._weight, self.rows * self.vocab * WIDE, 2 * self.nvd)

    def row_pass(self, name: str, passes: Passes) -> Operation:
        logits, gradients = self.rows * self.vocab * WIDE, self.rows * self.vocab * self.operand
        return Operation(
            f"row step: {name}",
            passes.logits_read * logits,
            passes.logits_written * logits + passes.gradients_written * gradients,
        )

    def hidden_gradient(self) -> Iterator[Operation]:
        sums = self.rows * self.width * WIDE
        read = self.rows * self.vocab * self.operand + self.chunks * self._weight
        yield Operation("zero dHidden", 0, self._hidden)
        yield Operation("dHidden = U . W", read, sums, 2 * self.nvd)
        yield Operation("scale and place dHidden", 2 * sums + self._hidden, sums + 2 * self._hidden)
        yield Operation("dHidden times upstream", self._hidden, self._hidden)

    def weight_gradient(self) -> Iterator[Operation]:
        sums = self.vocab * self.width * WIDE
        inputs = self.rows * self.width * WIDE
        yield Operation("zero dW", 0, sums)
        yield Operation("gather and weigh hidden", 2 * self._hidden + inputs, 2 * self._hidden + inputs)
        read = self.rows * self.vocab * self.operand + self._hidden + self.chunks * sums
        yield Operation("dW += U' . hidden", read, self.chunks * sums, 2 * self.nvd)
        yield Operation("dW times upstream", sums, sums)
        if self.operand != WIDE:
            yield Operation("dW to the weight's dtype", sums, self._weight)

    @property
    def _hidden(self) -> int:
        return self.rows * self.width * self.operand

    @property
    def _weight(self) -> int:
        return self.vocab * self.width * self.operand


def log_probs(work: Work) -> list[Operation]:
    """Statistics alone: forward without gradients, a reference from its hidden states, ``token_logprobs``."""
    return [*work.logits(), work.row_pass("statistics", work.row_step.statistics)]


def group_closed(work: Work, *, hidden: bool, weight: bool) -> list[Operation]:
    """``fused_hypo_loss`` on chunks of whole groups: the logits are computed once."""
    return [
        *work.logits(),
        work.row_pass("statistics and gradients", work.row_step.gradients),
        *(work.hidden_gradient() if hidden else ()),
        *(work.weight_gradient() if weight else ()),
    ]


def recomputed_backward(work: Work, *, hidden: bool, weight: bool) -> list[Operation]:
    """The logits once more and the gradients from known norms: the backward of ``token_logprobs``."""
    return [
        *work.logits("logits once more"),
        work.row_pass("gradients", work.row_step.known_norms),
        *(work.hidden_gradient() if hidden else ()),
        *(work.weight_gradient() if weight else ()),
    ]


def recompute(work: Work, *, hidden: bool, weight: bool) -> list[Operation]:
    """``fused_hypo_loss`` on groups larger than a chunk, and ``token_logprobs`` forward and backward."""
    return log_probs(work) + recomputed_backward(work, hidden=hidden, weight=weight)


Schedule = Callable[[Work], list[Operation]]
# By name: the operations, and the GEMMs that the work cannot do without.
SCHEDULES: dict[str, tuple[Schedule, int]] = {
    "log-probs, or a reference": (log_probs, 1),
    "loss, frozen head": (lambda work: group_closed(work, hidden=True, weight=False), 2),
    "loss, trained head": (lambda work: group_closed(work, hidden=True, weight=True), 3),
    "loss, frozen, recomputed": (lambda work: recompute(work, hidden=True, weight=False), 2),
    "loss, trained, recomputed": (lambda work: recompute(work, hidden=True, weight=True), 3),
    "token_logprobs backward": (lambda work: recomputed_backward(work, hidden=True, weight=True), 3),
}


def floor(operations: Iterable[Operation], rate: float, bandwidth: float) -> float:
    """The least time of operations that follow one another, in seconds."""
    return sum(operation.seconds(rate, bandwidth) for operation in operations)


def table(work: Work, rate: float, bandwidth: float) -> Iterator[str]:
    """A line a schedule: FLOP, bytes, the least time, and that over the bare GEMMs' at the same rate."""
    columns = ("NVD", "TFLOP", "GEMM GB", "other GB", "GEMM ms", "other ms", "floor ms", "x GEMMs")
    yield f"{'schedule':26}" + "".join(f"{name:>10}" for name in columns)
    for name, (schedule, needed) in SCHEDULES.items():
        gemms, rest = _parted(schedule(work))
        flop = sum(operation.flop for operation in gemms)
        gemm, other = (floor(part, rate, bandwidth) for part in (gemms, rest))
        yield f"{name:26}{flop / work.nvd:10.0f}{flop / 1e12:10.1f}" + "".join(
            f"{cell:10.2f}"
            for cell in (
                sum(operation.bytes for operation in gemms) / 1e9,
                sum(operation.bytes for operation in rest) / 1e9,
                gemm * 1e3,
                other * 1e3,
                (gemm + other) * 1e3,
                (gemm + other) / (2 * needed * work.nvd / rate),
            )
        )


def detail(work: Work, rate: float, bandwidth: float) -> Iterator[str]:
    """A line an operation."""
    for name, (schedule, _) in SCHEDULES.items():
        yield f"{name}"
        for operation in schedule(work):
            seconds = operation.seconds(rate, bandwidth)
            bound = "compute" if operation.flop / rate >= operation.bytes / bandwidth else "memory"
            yield (
                f"  {operation.name:38}{operation.flop / 1e12:8.2f} TFLOP{operation.read / 1e9:9.2f} GB read"
                f"{operation.written / 1e9:9.2f} GB written{seconds * 1e3:9.2f} ms  {bound}"
            )


def _parted(operations: Iterable[Operation]) -> tuple[list[Operation], list[Operation]]:
    """GEMMs, and the rest."""
    every = list(operations)
    return [x for x in every if x.is_gemm], [x for x in every if not x.is_gemm]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cost", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, default=8192, help="N, rows that count")
    parser.add_argument("--vocab", type=int, default=128256, help="V")
    parser.add_argument("--width", type=int, default=4096, help="D")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of hidden states and weight")
    parser.add_argument("--chunk-rows", type=int, help="rows a chunk; by default, 1 GiB of fp32 logits")
    parser.add_argument("--row-step", choices=ROW_STEPS, default="triton")
    parser.add_argument("--tflops", type=float, required=True, help="the device's GEMM rate in this dtype, measured")
    parser.add_argument("--bandwidth", type=float, required=True, help="its memory's, in TB/s, read and written")
    parser.add_argument("--operations", action="store_true", help="every operation of every schedule, too")
    args = parser.parse_args()
    chunk_rows = args.chunk_rows or max(1, 2**30 // (WIDE * args.vocab))
    chunks = -(-args.rows // chunk_rows)
    work = Work(
        args.rows, args.vocab, args.width, chunks, DTYPES[args.dtype].itemsize, row_step=ROW_STEPS[args.row_step]
    )
    rate, bandwidth = args.tflops * 1e12, args.bandwidth * 1e12
    print(
        f"{work.rows} counted rows x V={work.vocab} x D={work.width}, {args.dtype}, {chunks} chunks; "
        f"{args.tflops:g} TFLOP/s, {args.bandwidth:g} TB/s: arithmetic, nothing here was measured"
    )
    for line in table(work, rate, bandwidth):
        print(line)
    if args.operations:
        print()
        for line in detail(work, rate, bandwidth):
            print(line)


if __name__ == "__main__":
    main()
