"""Which rows go through the LM head together: whole pairs and groups, within a memory budget."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from hypo_kernels import gemm
from hypo_kernels.head import LMHead


class BudgetError(ValueError):
    """``max_chunk_bytes`` is less than a single row takes; the message says how much would do."""


@dataclass(frozen=True)
class Chunk:
    """Whole pairs and groups: consecutive sequences, in group order, and their consecutive rows."""

    sequences: slice
    rows: slice
    num_pairs: int

    def blocks(self, max_rows: int) -> Iterator[tuple[slice, slice]]:
        """Its rows, at most ``max_rows`` at a time, in the layout and in the chunk: one block when it fits."""
        for block in split(self.rows, max_rows):
            yield block, slice(block.start - self.rows.start, block.stop - self.rows.start)


def split(rows: slice, max_rows: int) -> Iterator[slice]:
    """Consecutive slices of at most ``max_rows``; no rows are one empty slice."""
    for start in range(rows.start, max(rows.stop, rows.start + 1), max_rows):
        yield slice(start, min(start + max_rows, rows.stop))


def chunks(lengths: Sequence[int], num_pairs: int, num_generations: int, max_rows: int) -> list[Chunk]:
    """Group-closed chunks of at most ``max_rows`` rows; a larger group is a chunk of its own."""
    sizes = [2] * num_pairs + [num_generations] * ((len(lengths) - 2 * num_pairs) // num_generations)
    out: list[Chunk] = []
    seq = row = first_seq = first_row = pairs = 0
    for i, size in enumerate(sizes):
        rows = sum(lengths[seq : seq + size])
        if row > first_row and row + rows - first_row > max_rows:
            out.append(Chunk(slice(first_seq, seq), slice(first_row, row), pairs))
            first_seq, first_row, pairs = seq, row, 0
        seq, row, pairs = seq + size, row + rows, pairs + (i < num_pairs)
    if seq > first_seq:
        out.append(Chunk(slice(first_seq, seq), slice(first_row, row), pairs))
    return out


# fp16 gradients of the weight are summed through a block of products of this size.
FP16_BLOCK_BYTES = 2**26
# A CPU gains nothing from chunks beyond either of these, unless a group needs them to stay whole: the buffer
# leaves its caches, while the weight's gradient is read and written once a chunk.
CPU_BUFFER_BYTES = 2**25
CPU_ROWS = 512

# Index, target, length, log-prob, softmax norms and coefficient of every counted row, kept for a call.
BYTES_PER_COUNTED_ROW = 64

# Of each other sample of its group, an online row's place, index and value in the exact estimator's baseline.
BYTES_PER_OTHER_SAMPLE = 32

# An online row's log-prob under the policy that drew it, its weight, and what a sample sums up of them, in fp64 too.
BYTES_PER_WEIGHTED_ROW = 128


def max_rows(
    heads: Sequence[LMHead],
    compute_dtype: torch.dtype,
    num_rows: int,
    max_chunk_bytes: int,
    *,
    scratch_bytes: Callable[[int, int], int],
    gradients_in_place: bool,
    largest_group: int,
    buffers: int,
    buffer_dtype: torch.dtype,
    straight: bool,
    stacked: int,
    objective_bytes: int = 0,
) -> int:
    """How many rows fit through the head at once with every temporary within ``max_chunk_bytes``.

    ``buffers`` is 2 where the logits of two heads have to be there together, ``straight`` says that kernels make
    partial results of their own, and ``stacked`` how many times a row may stand in a buffer: the policy's and the
    reference's, where one GEMM makes both. ``objective_bytes`` of every counted row are the objective's. Raises
    BudgetError when not even one row fits.
    """
    weights = [weight for head in heads for weight in head.weights]
    device, vocab = weights[0].device, heads[0].largest_share
    width = max(sum(weight.shape[1] for weight in head.weights) for head in heads)
    operand = gemm.operand_dtype(device, compute_dtype)
    accumulator = gemm.accumulator_dtype(compute_dtype)
    per_row = buffers * pitch(vocab, device) * buffer_dtype.itemsize + (straight_bytes(vocab) if straight else 0)
    if operand != accumulator and not gradients_in_place:
        per_row += vocab * operand.itemsize
    # Gathered and converted inputs, inputs times coefficients, and their gradients before and after conversion.
    per_row += buffers * width * (2 * operand.itemsize + 3 * accumulator.itemsize)

    def fixed(budget: int) -> int:
        panels = sum(gemm.Panels.copy_bytes(weight, compute_dtype, budget, vocab) for weight in weights)
        block = min(FP16_BLOCK_BYTES, 4 * vocab * width) if operand == torch.float16 else 0
        return panels + block + (BYTES_PER_COUNTED_ROW + objective_bytes) * num_rows

    logits_bytes = vocab * accumulator.itemsize
    scratch_per_row = scratch_bytes(1, logits_bytes)  # grows with the rows up to a plateau
    plateau = scratch_bytes(2**62 // logits_bytes, logits_bytes)
    room = max_chunk_bytes - fixed(max_chunk_bytes)
    rows = max(room // (per_row + scratch_per_row), (room - plateau) // per_row)
    if rows < 1:
        needed = max_chunk_bytes
        # A larger budget grants a converted head larger panels, by a fraction of the growth: this settles.
        while needed < (more := fixed(needed) + per_row + scratch_per_row):
            needed = more
        raise BudgetError(
            f"max_chunk_bytes={max_chunk_bytes} cannot hold one row of {vocab} logits: "
            f"pass at least {needed} for this call"
        )
    if device.type == "cpu":
        rows = min(rows, max(largest_group, CPU_BUFFER_BYTES // per_row, CPU_ROWS))
    return min(rows, max(1, stacked * num_rows))


def straight_bytes(vocab_size: int) -> int:
    """The most that a row's partial results take in ``kernels.statistics`` and ``kernels.exponentials``."""
    return 3 * 4 * -(-vocab_size // 64)


def pitch(vocab_size: int, device: torch.device) -> int:
    """Columns to allocate for a row of logits: CUDA's GEMMs want rows to start on aligned addresses."""
    return -(-vocab_size // 32) * 32 if device.type == "cuda" else vocab_size
