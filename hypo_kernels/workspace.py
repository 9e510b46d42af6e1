"""Memory planning of a call: the number of rows that fit in ``max_chunk_bytes``, and the buffer of their logits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property

import torch
from torch import Tensor

from hypo_kernels import amx, gemm
from hypo_kernels.head import LMHead

# fp16 gradients of the weight are added block by block, through a temporary of this size.
FP16_BLOCK_BYTES = 2**26
# The buffer on a CPU has the larger of these sizes. A larger buffer would not be faster, as it would leave the caches.
# Fewer rows would read and write the weight's gradient more often. A group that needs more rows gets them.
CPU_BUFFER_BYTES = 2**25
CPU_ROWS = 512

# Bytes for each counted row that live during the full call: index, target, length, log-prob, norms, coefficient.
BYTES_PER_COUNTED_ROW = 64

# Bytes of the exact estimator's baseline for each row and each other sample of its group: position, index, value.
BYTES_PER_OTHER_SAMPLE = 32

# Bytes of importance weighting for each row: log-prob of the behaviour policy, weight, statistics in fp32 and fp64.
BYTES_PER_WEIGHTED_ROW = 128


# The default budget: a gibibyte, and on CUDA this part of the device's memory if that is more. It lets realistic groups
# stay in one chunk (8,192 rows of 128,256 logits on a device of 141 GB), so that their logits are computed once and
# their weight's gradient is written once.
DEFAULT_BYTES = 2**30
DEVICE_SHARE = 28


def default_budget(device: torch.device) -> int:
    """Return the bytes of ``max_chunk_bytes`` on ``device`` where the caller gives none."""
    if device.type != "cuda":
        return DEFAULT_BYTES
    return max(DEFAULT_BYTES, torch.cuda.get_device_properties(device).total_memory // DEVICE_SHARE)


class BudgetError(ValueError):
    """``max_chunk_bytes`` is too small for a single row; the message gives the smallest value that works."""


def row_bytes(vocab: int, logits_bytes: int, width: int, device: torch.device, compute_dtype: torch.dtype) -> int:
    """Return the bytes of one row in a chunk: its logits, of ``logits_bytes`` each, and copies of its features.

    The features (``width`` of them) are gathered and converted, multiplied by coefficients, and have gradients before
    and after conversion.
    """
    operand, accumulator = gemm.operand_dtype(device, compute_dtype), gemm.accumulator_dtype(compute_dtype)
    return vocab * logits_bytes + width * (2 * operand.itemsize + 3 * accumulator.itemsize)


def rows_on_cpu(rows: int, row_bytes: int, largest_group: int) -> int:
    """Return the number of ``rows`` in one chunk on a CPU: those that fit its caches, at least the largest group."""
    return min(rows, max(largest_group, CPU_BUFFER_BYTES // row_bytes, CPU_ROWS))


def estimated_bytes(
    weight_dtype: torch.dtype,
    vocab: int,
    width: int,
    num_rows: int,
    *,
    device: torch.device,
    compute_dtype: torch.dtype,
    max_chunk_bytes: int,
    largest_group: int,
    buffers: int,
) -> int:
    """Estimate the bytes of a call's temporaries: ``max_chunk_bytes``, or less if all rows fit in less.

    ``vocab`` and ``width`` are the head's on this rank. ``num_rows`` are counted rows, ``largest_group`` those of the
    largest pair or group. ``buffers`` is 2 with an exact KL, else 1.
    """
    operand = gemm.operand_dtype(device, compute_dtype)
    per_row = buffers * row_bytes(vocab, gemm.accumulator_dtype(compute_dtype).itemsize, width, device, compute_dtype)
    rows = rows_on_cpu(num_rows, per_row, largest_group) if device.type == "cpu" else num_rows
    is_operand = weight_dtype == compute_dtype == operand
    share = gemm.CUDA_SHARE if device.type == "cuda" else gemm.PANEL_SHARE
    converted = 0 if is_operand else min(vocab * width * operand.itemsize, max_chunk_bytes // share)
    return min(max_chunk_bytes, rows * per_row + converted)


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
    fused_statistics: bool,
    stacked: int,
    objective_bytes: int = 0,
) -> int:
    """Return the number of rows in one chunk, such that all temporaries fit in ``max_chunk_bytes``.

    Args:
        num_rows: counted rows of the call.
        scratch_bytes: the row step's function of that name.
        gradients_in_place: the row step's constant of that name.
        largest_group: rows of the largest pair or group.
        buffers: 2 if the logits of two heads are needed together, else 1.
        buffer_dtype: dtype of the buffer.
        fused_statistics: whether kernels with a GEMM allocate partial results.
        stacked: 2 if one GEMM computes the logits of policy and reference, which are then both in the buffer; else 1.
        objective_bytes: bytes that the objective stores for each counted row.

    Raises:
        BudgetError: a single row does not fit.
    """
    weights = list({id(weight): weight for head in heads for weight in head.weights}.values())
    device, vocab = weights[0].device, heads[0].largest_share
    width = max(sum(weight.shape[1] for weight in head.weights) for head in heads)
    operand = gemm.operand_dtype(device, compute_dtype)
    accumulator = gemm.accumulator_dtype(compute_dtype)
    per_row = buffers * row_bytes(pitch(vocab, device), buffer_dtype.itemsize, width, device, compute_dtype)
    if fused_statistics:
        per_row += fused_statistics_bytes(vocab)
    if operand != accumulator and not gradients_in_place:
        per_row += vocab * operand.itemsize

    def fixed(budget: int) -> int:
        panels = sum(gemm.copy_bytes(weights, compute_dtype, budget, vocab))
        block = min(FP16_BLOCK_BYTES, 4 * vocab * width) if operand == torch.float16 else 0
        if device.type == "cpu" and operand == torch.bfloat16:
            block = min(amx.BLOCK_BYTES, 2 * vocab * width)
        return panels + block + (BYTES_PER_COUNTED_ROW + objective_bytes) * num_rows

    logits_bytes = vocab * accumulator.itemsize
    scratch_per_row = scratch_bytes(1, logits_bytes)  # grows with the rows up to a plateau
    plateau = scratch_bytes(2**62 // logits_bytes, logits_bytes)
    for_rows = max_chunk_bytes - fixed(max_chunk_bytes)
    rows = max(for_rows // (per_row + scratch_per_row), (for_rows - plateau) // per_row)
    if rows < 1:
        needed = max_chunk_bytes
        # A larger budget also grants larger panels, by a fraction of the growth, so this converges.
        while needed < (more := fixed(needed) + per_row + scratch_per_row):
            needed = more
        raise BudgetError(
            f"max_chunk_bytes={max_chunk_bytes} cannot hold one row of {vocab} logits: "
            f"pass at least {needed} for this call"
        )
    if device.type == "cpu":
        rows = rows_on_cpu(rows, per_row, largest_group)
    return min(rows, max(1, stacked * num_rows))


def fused_statistics_bytes(vocab_size: int) -> int:
    """Return the largest size of a row's partial results in ``kernels.statistics`` and ``kernels.exponentials``."""
    return 3 * 4 * -(-vocab_size // 64)


def pitch(vocab_size: int, device: torch.device) -> int:
    """Return the row stride of the logits buffer, in elements: CUDA's GEMMs need aligned row addresses."""
    return -(-vocab_size // 32) * 32 if device.type == "cuda" else vocab_size


class Workspace:
    """The buffer for every chunk's logits, allocated on first use."""

    def __init__(self, num_rows: int, vocab_size: int, dtype: torch.dtype, device: torch.device) -> None:
        self.num_rows, self.vocab_size = num_rows, vocab_size
        self.pitch = pitch(vocab_size, device)
        self.dtype, self.device = dtype, device

    @cached_property
    def _buffer(self) -> Tensor:
        return torch.empty(self.num_rows * self.pitch, dtype=self.dtype, device=self.device)

    def rows(self, count: int) -> Tensor:
        """Return the first ``count`` rows, (count, V) with a row stride of ``pitch``."""
        return self._buffer[: count * self.pitch].view(count, self.pitch)[:, : self.vocab_size]
