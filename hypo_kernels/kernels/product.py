"""One tile of h·Wᵀ in Triton, shared by the kernels that contain a GEMM.

    C rows, V vocabulary entries, D features; x (C, D), W (V, D), raw = x·Wᵀ (C, V), never stored in memory

A persistent grid, about one program a multiprocessor, walks the (BLOCK_M, BLOCK_N) tiles of (C, V).
Operands arrive as host tensor descriptors (TMA, sm_90 and newer) where their addresses allow it, else
through pointers, which allow any strides.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from hypo_kernels.head import LMHead
from hypo_kernels.kernels.tiles import GemmTile

TMA_ALIGNMENT = 16  # bytes, of a descriptor's base address and of all its strides but the last
INTERPRETED_PROGRAMS = 3  # few, so that each program processes several tiles


@triton.jit
def tile_position(tile, num_m, num_n, GROUP: tl.constexpr):
    """Return (m, n) of the ``tile``-th tile.

    Tiles are ordered down GROUP columns at a time: the programs that run together share GROUP panels of W, so that each
    panel is read from HBM once and the rows of x come from L2.
    """
    per_group = GROUP * num_m
    first = tile // per_group * GROUP
    width = tl.minimum(num_n - first, GROUP)
    within = tile % per_group
    return within // width, first + within % width


@triton.jit
def raw_tile(
    x,  # (C, D): descriptor of (BLOCK_M, BLOCK_K) blocks, or pointer
    weight,  # (V, D): descriptor of (BLOCK_N, BLOCK_K) blocks, or pointer
    rows,  # (BLOCK_M,) int64, within x: for pointers
    first_row,  # used with descriptors
    first_col,
    V,
    D,
    x_row_stride,
    x_stride,
    weight_row_stride,
    weight_stride,
    DESCRIPTORS: tl.constexpr,
    WIDEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Return the fp32 product (BLOCK_M, BLOCK_N). Columns from V on are finite, and the caller must mask them."""
    raw = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if DESCRIPTORS:
        for k in range(0, D, BLOCK_K):
            a = x.load([first_row, k])
            b = weight.load([first_col, k])
            if WIDEN:
                a, b = a.to(tl.float32), b.to(tl.float32)
            raw = tl.dot(a, b.T, raw, input_precision="ieee")
    else:
        # Clamped, not masked: a repeated row or entry needs no predicate in the loop.
        cols = tl.minimum(first_col + tl.arange(0, BLOCK_N), V - 1).to(tl.int64)
        x_rows = x + rows[:, None] * x_row_stride
        weight_rows = weight + cols[None, :] * weight_row_stride
        for k in range(0, D, BLOCK_K):
            # Computed in each step: pointers that the loop carries take registers from the accumulators.
            features = k + tl.arange(0, BLOCK_K)
            inside = features < D
            features = features.to(tl.int64)
            a = tl.load(x_rows + features[None, :] * x_stride, mask=inside[None, :], other=0.0)
            b = tl.load(weight_rows + features[:, None] * weight_stride, mask=inside[:, None], other=0.0)
            if WIDEN:
                a, b = a.to(tl.float32), b.to(tl.float32)
            raw = tl.dot(a, b, raw, input_precision="ieee")
    return raw


@triton.jit
def take_tile(
    tile,
    num_m,
    num_n,
    num_rows,  # number of rows of x, or of the list
    row_ptr,  # (C,) int32, if LISTED: indices of rows of x
    x,
    weight,
    V,
    D,
    x_row_stride,
    x_stride,
    weight_row_stride,
    weight_stride,
    DESCRIPTORS: tl.constexpr,
    LISTED: tl.constexpr,
    WIDEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Return (m, n, places, counted, rows, raw) of the ``tile``-th tile.

    ``places`` (BLOCK_M,) are positions in x, or in the list. ``counted`` is False for positions after the last row.
    ``rows`` are the indices in x, and ``raw`` (BLOCK_M, BLOCK_N) is the product.
    """
    m, n = tile_position(tile, num_m, num_n, GROUP)
    places = m * BLOCK_M + tl.arange(0, BLOCK_M)
    counted = places < num_rows
    rows = tl.minimum(places, num_rows - 1)
    if LISTED:
        rows = tl.load(row_ptr + rows)
    raw = raw_tile(
        x,
        weight,
        rows.to(tl.int64),
        m * BLOCK_M,
        n * BLOCK_N,
        V,
        D,
        x_row_stride,
        x_stride,
        weight_row_stride,
        weight_stride,
        DESCRIPTORS,
        WIDEN,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
    )
    return m, n, places, counted, rows, raw


@triton.jit
def halves(raw):
    """Return the left and the right half of the columns."""
    BLOCK_M: tl.constexpr = raw.shape[0]
    HALF: tl.constexpr = raw.shape[1] // 2
    return tl.split(tl.permute(tl.reshape(raw, [BLOCK_M, 2, HALF]), [0, 2, 1]))


@triton.jit
def quarters(raw):
    """Return the four quarters of the columns, which an epilogue processes one after the other.

    This needs a quarter of the registers besides the accumulators, and a quarter of the shared memory that stages a
    store: a softcap's temporaries for the full tile would spill, and leave no shared memory for a fourth stage.
    """
    left, right = halves(raw)
    first, second = halves(left)
    third, fourth = halves(right)
    return first, second, third, fourth


@triton.jit
def load_targets(target_ptr, rows, V):
    """Return each row's target (BLOCK_M,), int32; −1 if another rank holds it."""
    target = tl.load(target_ptr + rows)
    return tl.where((target >= 0) & (target < V), target, -1).to(tl.int32)


def is_shaped(head: LMHead) -> bool:
    """Return whether the head has a bias or a softcap, so that logits are not a multiple of the product."""
    return head.bias is not None or head.logit_softcap is not None


def num_programs(device: torch.device, num_tiles: int) -> int:
    """Return the size of a persistent grid: one program for each multiprocessor, at most one for each tile."""
    if device.type != "cuda":
        return min(INTERPRETED_PROGRAMS, num_tiles)
    return min(torch.cuda.get_device_properties(device).multi_processor_count, num_tiles)


def aligned(*matrices: Tensor) -> bool:
    """Return whether all matrices have the alignment that tensor descriptors and wide loads need."""
    return all(
        matrix.stride(1) == 1
        and matrix.stride(0) * matrix.element_size() % TMA_ALIGNMENT == 0
        and matrix.data_ptr() % TMA_ALIGNMENT == 0
        for matrix in matrices
    )


def descriptor(matrix: Tensor, block_shape: list[int], tile: GemmTile) -> TensorDescriptor | Tensor:
    """Return a kernel's argument for a matrix: a descriptor of such blocks if the tile uses TMA, else the matrix."""
    return TensorDescriptor.from_tensor(matrix, block_shape) if tile.descriptors else matrix


def operand_arguments(x: Tensor, weight: Tensor, tile: GemmTile) -> dict[str, Any]:
    """Return the keyword arguments of a kernel that calls ``take_tile``, and its launch options."""
    return {
        "x": descriptor(x, [tile.BLOCK_M, tile.BLOCK_K], tile),
        "weight": descriptor(weight, [tile.BLOCK_N, tile.BLOCK_K], tile),
        "C": x.shape[0],
        "V": weight.shape[0],
        "D": x.shape[1],
        "x_row_stride": x.stride(0),
        "x_stride": x.stride(1),
        "weight_row_stride": weight.stride(0),
        "weight_stride": weight.stride(1),
        # The interpreter multiplies bf16 bit patterns as if they were integers.
        "WIDEN": x.dtype == torch.bfloat16 and triton.knobs.runtime.interpret,
        **tile.constants(),
        **tile.launch_options(),
    }


def check_operands(x: Tensor, weight: Tensor, targets: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    """Raise ValueError unless x (C, D), weight (V, D) and targets (C,) fit together, in one of ``dtypes``."""
    if x.ndim != 2 or weight.ndim != 2 or x.shape[1] != weight.shape[1] or targets.shape != x.shape[:1]:
        raise ValueError(
            f"expected x (C, D), weight (V, D) and targets (C,), got {tuple(x.shape)}, {tuple(weight.shape)} "
            f"and {tuple(targets.shape)}"
        )
    if x.dtype != weight.dtype or x.dtype not in dtypes:
        raise ValueError(f"x is {x.dtype} and weight {weight.dtype}: this kernel takes both in one of {dtypes}")
