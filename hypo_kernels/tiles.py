"""Frozen tile configurations of the Triton kernels, by architecture; nothing is tuned on a user's step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class RowTile:
    """How one program of the row kernel walks along a row of logits."""

    BLOCK_V: int
    num_warps: int


# Keyed by compute capability. Four live fp32 vectors of BLOCK_V / (32 · num_warps) = 16 elements keep a
# thread under 128 registers, which leaves two programs of eight warps resident on every listed device.
ROW_TILES = {
    (8, 0): RowTile(BLOCK_V=4096, num_warps=8),
    (9, 0): RowTile(BLOCK_V=4096, num_warps=8),
    (10, 0): RowTile(BLOCK_V=4096, num_warps=8),
}
# An unlisted device, and Triton's interpreter, take the oldest listed one.
DEFAULT_ROW_TILE = ROW_TILES[(8, 0)]


def fits(tile: RowTile) -> bool:
    """Whether a thread's share of the row, in four live vectors, fits in half of the register file."""
    return tile.BLOCK_V // (32 * tile.num_warps) * 4 <= 128


def row_tile(vocab_size: int, capability: tuple[int, int]) -> RowTile:
    """The tile for rows of ``vocab_size`` logits: never wider than the row's next power of two."""
    tile = ROW_TILES.get(capability, DEFAULT_ROW_TILE)
    width = max(128, 1 << (vocab_size - 1).bit_length())
    if width >= tile.BLOCK_V:
        return tile
    return RowTile(BLOCK_V=width, num_warps=max(1, min(tile.num_warps, width // 512)))


@dataclass(frozen=True)
class GemmTile:
    """How the kernels with a GEMM in them cut (C, V) logits and D features."""

    BLOCK_M: int  # rows
    BLOCK_N: int  # vocabulary entries
    BLOCK_K: int  # features
    num_warps: int
    num_stages: int  # blocks of features in flight
    group: int  # columns of tiles that are walked down together
    warp_specialize: bool = False  # Hopper: takes effect with num_warps=4 and flatten=False alone
    flatten: bool = False  # one pipeline through the tiles of a program: the next one's loads start early

    def constants(self) -> dict[str, Any]:
        """Of the kernel."""
        return {
            "BLOCK_M": self.BLOCK_M,
            "BLOCK_N": self.BLOCK_N,
            "BLOCK_K": self.BLOCK_K,
            "GROUP": self.group,
            "WARP_SPECIALIZE": self.warp_specialize,
            "FLATTEN": self.flatten,
        }

    def launch_options(self) -> dict[str, int]:
        return {"num_warps": self.num_warps, "num_stages": self.num_stages}


KB = 1024
SHARED_MEMORY = {(8, 0): 163 * KB, (9, 0): 227 * KB, (10, 0): 227 * KB}  # the most that one program may take

# Keyed by compute capability and bytes an operand. None was timed: they are the largest that compile without
# spills for every kernel and head (benchmarks/COMPILED.md), until benchmarks/tune_tiles.py has run on a device.
GEMM_TILES = {
    ((8, 0), 2): GemmTile(256, 128, 32, num_warps=8, num_stages=4, group=16),
    ((9, 0), 2): GemmTile(128, 256, 64, num_warps=8, num_stages=3, group=16),
    ((10, 0), 2): GemmTile(128, 256, 64, num_warps=8, num_stages=3, group=16, warp_specialize=True),
}
# Operands that no descriptor can address, on any device, and devices that are not listed.
POINTER_TILE = GemmTile(128, 128, 32, num_warps=8, num_stages=3, group=16)
# Full fp32 precision does not run on tensor cores.
FP32_TILE = GemmTile(64, 64, 32, num_warps=8, num_stages=2, group=16)


def gemm_tile(capability: tuple[int, int], operand_bytes: int, *, descriptors: bool) -> GemmTile:
    """The frozen tile of a GEMM on operands of so many bytes, through descriptors or pointers."""
    if operand_bytes == 4:
        return FP32_TILE
    if capability >= (9, 0) and not descriptors:
        return POINTER_TILE
    return GEMM_TILES.get((capability, operand_bytes), POINTER_TILE)
