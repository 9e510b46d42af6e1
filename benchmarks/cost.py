"""Count the FLOP and bytes of each schedule's operations, and the least time that a device needs for them.

    python -m benchmarks.cost --rows 8192 --vocab 128256 --width 4096 --tflops 790 --bandwidth 4.3

The model counts five things and does not read the code: the GEMMs, how often the row step reads and
writes the (C, V) buffer of a chunk, the passes over a weight gradient (V, D), those over hidden states (C, D),
and how many rows a chunk holds. An operation takes the longer of its FLOP at the device's GEMM rate and its bytes
at its bandwidth; operations follow one another. ``tests/benchmarks/test_cost.py`` holds the model against the
operations that torch issues (``issued.py``): the torch row step, with fp32 and with bf16 operands. The passes of
"triton" and of "exponentials" are read off their kernels, and no test counts them.

bf16 and fp32 are modelled, eager. fp16 takes its weight gradient block by block, and a compiled call sums every
weight gradient in fp32: neither is in here.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
WIDE = 4  # bytes of an fp32 logit, statistic or sum
TILE_COLUMNS = 256  # vocabulary entries of a tile of the GEMMs with an epilogue, on sm_80 and sm_90
ALIGNED_COLUMNS = 32  # a row of logits is padded to whole multiples on CUDA


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
        """Return the least seconds at ``rate`` FLOP/s and ``bandwidth`` bytes/s."""
        return max(self.flop / rate, self.bytes / bandwidth)


@dataclass(frozen=True)
class Passes:
    """How often one use of the row step reads and writes a chunk's logits (C, V), in fp32, and its gradients (C, V).

    With ``partials``, the logits' GEMM does it in its epilogue: it writes the gradients, if any, and so many
    numbers a row and tile, and no logits.
    """

    logits_read: int = 0
    logits_written: int = 0
    gradients_written: int = 0  # in the dtype of GEMM operands
    narrowed: bool = False  # gradients overwrite the logits; 16-bit operands are a copy
    partials: int = 0


@dataclass(frozen=True)
class RowStep:
    """The passes of each use of the row step."""

    statistics: Passes
    gradients: Passes  # and statistics
    known_norms: Passes  # gradients from the norms of an earlier pass
    entropy: Passes  # statistics with the moment
    entropy_gradients: Passes
    divergence: Passes  # statistics of the policy's and the reference's logits
    divergence_gradients: Passes
    leaves_upstream_one: bool  # a gradient times 1 is not read


# Statistics alone are computed from hidden states without stored logits, at the GEMM rate. Gradients read a row of
# logits twice, with or without the norms of an earlier pass. The second read may come from L2; it is counted as memory
# traffic here.
TRITON = RowStep(
    statistics=Passes(partials=2),
    gradients=Passes(2, gradients_written=1),
    known_norms=Passes(2, gradients_written=1),
    entropy=Passes(partials=3),
    entropy_gradients=Passes(2, gradients_written=1),
    divergence=Passes(2),
    divergence_gradients=Passes(2, gradients_written=1),
    leaves_upstream_one=True,
)
# One operator after another. A block of rows and its scratch memory stay in a CPU's cache.
TORCH = RowStep(
    statistics=Passes(5, 2),  # copy, amax, softmax, sum, amax
    gradients=Passes(4, 1, narrowed=True),  # amax, softmax, sum, amax
    known_norms=Passes(3, 3, narrowed=True),  # −, exp, ÷
    entropy=Passes(9, 5),  # copy, amax, −, clamp; exp, sum; ·, sum
    entropy_gradients=Passes(9, 8, narrowed=True),  # −, clamp; exp, ÷; −; ·, +, ·
    divergence=Passes(17, 10),  # copy, amax, −, clamp of both; −; exp, sum of both; ·, sum
    divergence_gradients=Passes(15, 13, narrowed=True),  # as for the entropy; copy, −, clamp, − of the reference's; −
    leaves_upstream_one=False,
)
# A GEMM with an epilogue, also at the GEMM rate. bf16 exponentials are, up to a factor per row, the operand of the
# gradients' GEMMs; the gradient of an entropy or divergence needs the logits.
EXPONENTIALS = replace(
    TRITON,
    gradients=Passes(gradients_written=1, partials=1),
    known_norms=Passes(gradients_written=1, partials=1),
)
ROW_STEPS = {"triton": TRITON, "torch": TORCH, "exponentials": EXPONENTIALS}


@dataclass(frozen=True)
class Work:
    """The sizes of a call: ``rows`` N are the counted ones; ``chunks`` is the number of GEMMs for the logits."""

    rows: int
    vocab: int
    width: int
    chunks: int = 1
    dtype: torch.dtype = torch.bfloat16  # of hidden, weight and GEMM operands
    row_step: RowStep = TRITON
    upstream: float = 1.0  # the gradient of the loss, which is 1 in ``loss.backward()``
    cuda: bool = True  # on CUDA an fp32 sum is scaled and cast in one pass

    @property
    def nvd(self) -> int:
        return self.rows * self.vocab * self.width

    def reduced(self, use: str, passes: Passes, name: str = "logits") -> Iterator[Operation]:
        """Yield the operations of the rows' logits and of one use of the row step."""
        if passes.partials == 0:
            yield from self.logits(name)
            yield self.row_pass(use, passes)
            return
        partials = passes.partials * self.rows * _ceil(self.vocab, TILE_COLUMNS) * WIDE
        yield self._gathered()
        if passes.gradients_written:
            yield Operation("offsets of exponentials", 2 * self._hidden, 0)  # each row's, and its target's weight
        written = passes.gradients_written * self._gradients + partials
        yield Operation(f"{name} -> {use}", self._hidden + self.chunks * self._weight, written, self._product)
        yield Operation(f"row step: {use} of tiles", partials, 0)

    def logits(self, name: str = "logits", of: str = "hidden") -> Iterator[Operation]:
        yield self._gathered(of)
        yield Operation(name, self._hidden + self.chunks * self._weight, self._logits, self._product)

    def stacked_logits(self) -> Iterator[Operation]:
        """Yield the GEMM for the stacked logits of policy and reference, which share one weight."""
        both = 2 * self._hidden
        yield self._gathered()
        yield self._gathered("reference hidden")
        yield Operation("stack hidden", both, both)
        yield Operation("logits of both", both + self.chunks * self._weight, 2 * self._logits, 2 * self._product)

    def row_pass(self, use: str, passes: Passes) -> Operation:
        copies = passes.narrowed and self.dtype.itemsize != WIDE
        return Operation(
            f"row step: {use}",
            (passes.logits_read + copies) * self._logits,
            passes.logits_written * self._logits + (passes.gradients_written + copies) * self._gradients,
        )

    def hidden_gradient(self, *, scaled: bool) -> Iterator[Operation]:
        yield Operation("zero dHidden", 0, self._hidden)
        read = self._gradients + self.chunks * self._weight
        yield Operation("dHidden = U . W", read, self._features, self._product)
        yield Operation("scale dHidden by row", self._features, self._features)
        yield from self._narrowed("dHidden", self._features, self._hidden)
        yield Operation("place dHidden", self._hidden, self._hidden)
        yield from self._handed_out("dHidden", self._hidden, self._hidden, scaled=scaled)

    def weight_gradient(self, *, scaled: bool) -> Iterator[Operation]:
        # The GEMM itself rounds the result of a single product.
        sums = self._weight if self.chunks == 1 else self.vocab * self.width * WIDE
        yield self._gathered()
        yield Operation("weigh hidden", self._hidden, self._features)
        yield from self._narrowed("weighed hidden", self._features, self._hidden)
        read = self._gradients + self._hidden + (self.chunks - 1) * sums  # the first product has nothing to be added to
        yield Operation("dW = U' . hidden", read, self.chunks * sums, self._product)
        yield from self._handed_out("dW", sums, self._weight, scaled=scaled)

    def _handed_out(self, name: str, sums: int, leaf: int, *, scaled: bool) -> Iterator[Operation]:
        """Yield the cast of a summed gradient to the input's dtype, times the upstream gradient if ``scaled``."""
        if scaled and self.cuda and sums != leaf:
            yield Operation(f"{name} times upstream, narrowed", sums, leaf)
            return
        if scaled and not (self.row_step.leaves_upstream_one and self.upstream == 1.0):
            yield Operation(f"{name} times upstream", sums, sums)
        yield from self._narrowed(name, sums, leaf)

    def _narrowed(self, name: str, wide: int, narrow: int) -> Iterator[Operation]:
        if wide != narrow:
            yield Operation(f"{name} narrowed", wide, narrow)

    def _gathered(self, what: str = "hidden") -> Operation:
        return Operation(f"gather {what}", self._hidden, self._hidden)

    @property
    def _product(self) -> int:
        return 2 * self.nvd

    @property
    def _logits(self) -> int:
        return self.rows * self.vocab * WIDE

    @property
    def _gradients(self) -> int:
        return self.rows * self.vocab * self.dtype.itemsize

    @property
    def _features(self) -> int:
        return self.rows * self.width * WIDE

    @property
    def _hidden(self) -> int:
        return self.rows * self.width * self.dtype.itemsize

    @property
    def _weight(self) -> int:
        return self.vocab * self.width * self.dtype.itemsize


def _products(work: Work, *, hidden: bool, weight: bool, scaled: bool) -> list[Operation]:
    """Return the GEMMs from the logits' gradients to the gradients of hidden states and weight."""
    return [
        *(work.hidden_gradient(scaled=scaled) if hidden else ()),
        *(work.weight_gradient(scaled=scaled) if weight else ()),
    ]


def log_probs(work: Work, *, entropy: bool = False) -> list[Operation]:
    """Return the operations of log-probs without gradients: a forward pass, a reference, ``token_logprobs``."""
    return [*work.reduced("statistics", work.row_step.entropy if entropy else work.row_step.statistics)]


def group_closed(work: Work, *, hidden: bool, weight: bool) -> list[Operation]:
    """Return the operations of ``fused_hypo_loss`` on chunks of complete groups: the logits are computed once."""
    return [
        *work.reduced("statistics and gradients", work.row_step.gradients),
        *_products(work, hidden=hidden, weight=weight, scaled=True),
    ]


def group_closed_with_own_reference(work: Work) -> list[Operation]:
    """Return the operations of ``fused_hypo_loss`` if the reference uses the policy's frozen weight, in one GEMM.

    Of the chunks that leave half of the buffer free, which is cut to the rows of the call: no chunk that is
    alone in its call does, nor any but the last of many small groups. The others take ``log_probs`` first, as do
    all where no logits are written.
    """
    if work.row_step.statistics.partials:
        return [*log_probs(work), *group_closed(work, hidden=True, weight=False)]
    return [
        *work.stacked_logits(),
        work.row_pass("statistics of the reference", work.row_step.statistics),
        work.row_pass("statistics and gradients", work.row_step.gradients),
        *_products(work, hidden=True, weight=False, scaled=True),
    ]


def exact(work: Work, *, weight: bool, own_reference: bool = False) -> list[Operation]:
    """Return the operations of ``fused_hypo_loss`` with the exact KL: the buffer holds the logits of both models."""
    return [
        *(
            work.stacked_logits()
            if own_reference
            else (*work.logits(), *work.logits("reference logits", "reference hidden"))
        ),
        work.row_pass("statistics of both", work.row_step.divergence),
        work.row_pass("gradients", work.row_step.divergence_gradients),
        *_products(work, hidden=True, weight=weight, scaled=True),
    ]


def token_backward(work: Work, *, hidden: bool, weight: bool, entropy: bool = False) -> list[Operation]:
    """Return the operations of the backward pass of ``token_logprobs``, which computes the logits again."""
    return [
        *_gradients_again(work, entropy=entropy),
        *_products(work, hidden=hidden, weight=weight, scaled=False),
    ]


def recomputed(work: Work, *, hidden: bool, weight: bool) -> list[Operation]:
    """Return the operations of ``fused_hypo_loss`` on groups larger than a chunk."""
    return [
        *log_probs(work),
        *_gradients_again(work),
        *_products(work, hidden=hidden, weight=weight, scaled=True),
    ]


def _gradients_again(work: Work, *, entropy: bool = False) -> Iterator[Operation]:
    passes = work.row_step.entropy_gradients if entropy else work.row_step.known_norms
    yield from work.reduced("gradients", passes, "logits once more")


@dataclass(frozen=True)
class Schedule:
    operations: Callable[[Work], list[Operation]]
    needed: int  # necessary GEMMs
    buffers: int = 1  # buffer rows per row of the call


SCHEDULES = {
    "log-probs, or a reference": Schedule(log_probs, 1),
    "log-probs and entropies": Schedule(lambda work: log_probs(work, entropy=True), 1),
    "token_logprobs backward": Schedule(lambda work: token_backward(work, hidden=True, weight=True), 3),
    "with entropies, backward": Schedule(lambda work: token_backward(work, hidden=True, weight=True, entropy=True), 3),
    "loss, frozen head": Schedule(lambda work: group_closed(work, hidden=True, weight=False), 2),
    "loss, trained head": Schedule(lambda work: group_closed(work, hidden=True, weight=True), 3),
    "loss, frozen, recomputed": Schedule(lambda work: recomputed(work, hidden=True, weight=False), 2),
    "loss, trained, recomputed": Schedule(lambda work: recomputed(work, hidden=True, weight=True), 3),
    "loss, own reference": Schedule(group_closed_with_own_reference, 3, buffers=2),
    "exact KL, own reference": Schedule(lambda work: exact(work, weight=False, own_reference=True), 3, buffers=2),
    "exact KL, frozen head": Schedule(lambda work: exact(work, weight=False), 3, buffers=2),
    "exact KL, trained head": Schedule(lambda work: exact(work, weight=True), 4, buffers=2),
}


def max_rows(work: Work, max_chunk_bytes: int, buffers: int) -> int:
    """Return the rows per chunk on CUDA with the Triton row step: logits, hidden states, their gradients, partial sums.

    Keeping groups whole takes up to a group's rows from that. Exponentials would leave room for twice as many.
    """
    pitch = _ceil(work.vocab, ALIGNED_COLUMNS) * ALIGNED_COLUMNS
    features = work.width * (2 * work.dtype.itemsize + 3 * WIDE)
    kept = 64 * work.rows  # bytes per row of the call
    partials = 3 * WIDE * _ceil(work.vocab, 64)  # the most tiles per row
    return min(work.rows, max(1, (max_chunk_bytes - kept) // (buffers * (pitch * WIDE + features) + partials)))


def _ceil(x: int, step: int) -> int:
    return -(-x // step)


def floor(operations: Iterable[Operation], rate: float, bandwidth: float) -> float:
    """Return the least time, in seconds, of operations that run one after another."""
    return sum(operation.seconds(rate, bandwidth) for operation in operations)


Row = tuple[str, Work, Schedule]


def planned(work: Work, chunk_rows: Callable[[int], int]) -> Iterator[Row]:
    """Return every schedule with its number of chunks; ``chunk_rows`` maps its number of buffers to rows."""
    for name, schedule in SCHEDULES.items():
        yield name, replace(work, chunks=_ceil(work.rows, max(1, chunk_rows(schedule.buffers)))), schedule


def table(rows: Iterable[Row], rate: float, bandwidth: float) -> Iterator[str]:
    """Return one line per schedule: FLOP, bytes, the least time, and its ratio to the bare GEMMs at the same rate."""
    columns = ("TFLOP", "GEMM GB", "other GB", "GEMM ms", "other ms", "floor ms", "x GEMMs")
    yield f"{'schedule':26}{'chunks':>7}{'NVD':>4}" + "".join(f"{name:>10}" for name in columns)
    for name, work, schedule in rows:
        gemms, rest = _parted(schedule.operations(work))
        flop = sum(operation.flop for operation in gemms)
        gemm, other = (floor(part, rate, bandwidth) for part in (gemms, rest))
        yield f"{name:26}{work.chunks:7}{flop / work.nvd:4.0f}{flop / 1e12:10.1f}" + "".join(
            f"{cell:10.2f}"
            for cell in (
                sum(operation.bytes for operation in gemms) / 1e9,
                sum(operation.bytes for operation in rest) / 1e9,
                gemm * 1e3,
                other * 1e3,
                (gemm + other) * 1e3,
                (gemm + other) / (2 * schedule.needed * work.nvd / rate),
            )
        )


def detail(rows: Iterable[Row], rate: float, bandwidth: float) -> Iterator[str]:
    """Return one line per operation."""
    for name, work, schedule in rows:
        yield f"{name}"
        for operation in schedule.operations(work):
            seconds = operation.seconds(rate, bandwidth)
            bound = "compute" if operation.flop / rate >= operation.bytes / bandwidth else "memory"
            yield (
                f"  {operation.name:45}{operation.flop / 1e12:7.2f} TFLOP{operation.read / 1e9:7.2f} GB read"
                f"{operation.written / 1e9:7.2f} GB written{seconds * 1e3:8.2f} ms  {bound}"
            )


def _parted(operations: Iterable[Operation]) -> tuple[list[Operation], list[Operation]]:
    """Return the GEMMs and the other operations."""
    every = list(operations)
    return [x for x in every if x.is_gemm], [x for x in every if not x.is_gemm]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cost", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, default=8192, help="N, rows that count")
    parser.add_argument("--vocab", type=int, default=128256, help="V")
    parser.add_argument("--width", type=int, default=4096, help="D")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of hidden states and weight")
    parser.add_argument("--budget", type=float, default=1.0, help="max_chunk_bytes, in GiB")
    parser.add_argument("--chunk-rows", type=int, help="rows of logits in the buffer; by default, as many as fit")
    parser.add_argument("--row-step", choices=ROW_STEPS, default="triton", help="exponentials: in GEMMs of our own")
    parser.add_argument("--upstream", type=float, default=1.0, help="gradient of the loss, 1 in loss.backward()")
    parser.add_argument("--tflops", type=float, required=True, help="the device's GEMM rate in this dtype, measured")
    parser.add_argument("--bandwidth", type=float, required=True, help="its memory's, in TB/s, read and written")
    parser.add_argument("--operations", action="store_true", help="every operation of every schedule, too")
    args = parser.parse_args()
    work = Work(
        args.rows,
        args.vocab,
        args.width,
        dtype=DTYPES[args.dtype],
        row_step=ROW_STEPS[args.row_step],
        upstream=args.upstream,
    )

    def chunk_rows(buffers: int) -> int:
        return args.chunk_rows // buffers if args.chunk_rows else max_rows(work, int(args.budget * 2**30), buffers)

    rows = list(planned(work, chunk_rows))
    rate, bandwidth = args.tflops * 1e12, args.bandwidth * 1e12
    print(f"{work.rows} counted rows x V={work.vocab} x D={work.width}, {args.dtype}, row step: {args.row_step}")
    print(f"{args.tflops:g} TFLOP/s, {args.bandwidth:g} TB/s: arithmetic, nothing here was measured")
    for line in table(rows, rate, bandwidth):
        print(line)
    if args.operations:
        print()
        for line in detail(rows, rate, bandwidth):
            print(line)


if __name__ == "__main__":
    main()
