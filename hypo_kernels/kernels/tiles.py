"""Tile configurations of the Triton kernels, by architecture. They are constants: nothing is tuned at run time."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch


@dataclass(frozen=True)
class RowTile:
    """Block width and warps of the row kernel: one program reads a row of logits."""

    BLOCK_V: int
    num_warps: int


# Keyed by compute capability. Four live fp32 vectors of BLOCK_V / (32 · num_warps) = 16 elements keep a
# thread under 128 registers, which leaves two programs of eight warps resident on every listed device.
ROW_TILES = {
    (8, 0): RowTile(BLOCK_V=4096, num_warps=8),
    (9, 0): RowTile(BLOCK_V=2048, num_warps=8),
    (10, 0): RowTile(BLOCK_V=4096, num_warps=8),
}
# An unlisted device and Triton's interpreter use the entry of the oldest listed device.
DEFAULT_ROW_TILE = ROW_TILES[(8, 0)]


def fits(tile: RowTile) -> bool:
    """Return whether a thread's part of the row, in four live vectors, fits in half of the register file."""
    return tile.BLOCK_V // (32 * tile.num_warps) * 4 <= 128


def row_tile(vocab_size: int, capability: tuple[int, int]) -> RowTile:
    """Return the tile for rows of ``vocab_size`` logits, at most as wide as the next power of two."""
    tile = ROW_TILES.get(capability, DEFAULT_ROW_TILE)
    width = max(128, 1 << (vocab_size - 1).bit_length())
    if width >= tile.BLOCK_V:
        return tile
    return RowTile(BLOCK_V=width, num_warps=max(1, min(tile.num_warps, width // 512)))


@dataclass(frozen=True)
class GemmTile:
    """Block sizes and launch options of a kernel with a GEMM: (C, V) logits, D features."""

    BLOCK_M: int  # rows
    BLOCK_N: int  # vocabulary entries
    BLOCK_K: int  # features
    num_warps: int
    num_stages: int  # blocks of features in flight
    group: int = 16  # columns of tiles that are processed together
    descriptors: bool = False  # operands through TMA, sm_90 and newer
    # Not used on Hopper: a program of 128 rows with descriptors from the host does not compile there
    # (triton-lang/triton#11587).
    warp_specialize: bool = False
    flatten: bool = False  # one software pipeline over all tiles of a program: loads of the next tile start early

    def constants(self) -> dict[str, Any]:
        """Return the kernel's compile-time constants."""
        return {
            "BLOCK_M": self.BLOCK_M,
            "BLOCK_N": self.BLOCK_N,
            "BLOCK_K": self.BLOCK_K,
            "GROUP": self.group,
            "DESCRIPTORS": self.descriptors,
            "WARP_SPECIALIZE": self.warp_specialize,
            "FLATTEN": self.flatten,
        }

    def launch_options(self) -> dict[str, int]:
        """Return the keyword arguments of the launch itself."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages}


KB = 1024
SHARED_MEMORY = {(8, 0): 163 * KB, (9, 0): 227 * KB, (10, 0): 227 * KB}  # the maximum of one program
EPILOGUE_PARTS = 4  # parts of a tile's columns; a store is staged part by part

# Without tensor cores, which do not multiply in full fp32.
FP32_TILE = GemmTile(64, 64, 32, num_warps=8, num_stages=2)
# Triton's interpreter takes as long for a small block as for a large one.
INTERPRETER = (0, 0)
INTERPRETED_TILE = GemmTile(32, 1024, 64, num_warps=1, num_stages=1)
# Tile for a list of rows, which TMA cannot gather.
POINTER_TILE = GemmTile(128, 128, 32, num_warps=8, num_stages=4)
# Tile for unaligned operands, whose elements are loaded one by one, and for devices that are not listed.
UNALIGNED_TILE = GemmTile(64, 128, 32, num_warps=8, num_stages=3)
_HOPPER = GemmTile(128, 256, 64, num_warps=8, num_stages=4, descriptors=True)
_AMPERE = GemmTile(128, 256, 32, num_warps=8, num_stages=4)
# Keyed by kernel, compute capability and bytes an operand. None of these was timed: they are the largest of the usual
# tiles that Triton 3.6 and 3.9 compile without spills; benchmarks/tune_tiles.py times them on a device. A bias and a
# softcap need additional registers ("shaped"). On sm_100, both Tritons refuse a softcap's exponentials with
# descriptors, or spill the plain ones.
GEMM_TILES = {
    ("statistics", (8, 0), 2): _AMPERE,
    ("statistics", (9, 0), 2): _HOPPER,
    ("statistics", (10, 0), 2): replace(_HOPPER, BLOCK_N=128),
    ("shaped statistics", (8, 0), 2): _AMPERE,
    ("shaped statistics", (9, 0), 2): replace(_HOPPER, BLOCK_N=128),
    ("shaped statistics", (10, 0), 2): replace(_HOPPER, BLOCK_N=128),
    ("exponentials", (8, 0), 2): _AMPERE,
    ("exponentials", (9, 0), 2): _HOPPER,
    ("exponentials", (10, 0), 2): POINTER_TILE,
    ("shaped exponentials", (8, 0), 2): POINTER_TILE,
    ("shaped exponentials", (9, 0), 2): replace(_HOPPER, BLOCK_N=128),
    ("shaped exponentials", (10, 0), 2): UNALIGNED_TILE,
}


# Each (compute capability, operand dtype) where benchmarks/bench_loss.py has measured impl="triton-epilogue" to be
# faster than "triton-rows". For these, impl="triton" uses the epilogue schedule. Empty: none was measured yet.
EPILOGUE_IS_FASTER: frozenset[tuple[tuple[int, int], torch.dtype]] = frozenset()


def is_listed(capability: tuple[int, int]) -> bool:
    """Return whether a device has GEMM tiles of its own; the tile of all others is no match for a library's GEMM."""
    return capability == INTERPRETER or capability in SHARED_MEMORY


def gemm_tile(kernel: str, capability: tuple[int, int], operand_bytes: int, *, shaped: bool, aligned: bool) -> GemmTile:
    """Return the tile of a kernel.

    Args:
        shaped: the head has a bias or a softcap.
        aligned: the operands' rows start at addresses that TMA and wide loads accept.
    """
    if operand_bytes == 4:
        return INTERPRETED_TILE if capability == INTERPRETER else FP32_TILE
    if not aligned:
        return UNALIGNED_TILE
    return GEMM_TILES.get(("shaped " * shaped + kernel, capability, operand_bytes), UNALIGNED_TILE)


def gemm_fits(tile: GemmTile, capability: tuple[int, int], operand_bytes: int, out_bytes: int = 0) -> bool:
    """Return whether pipeline stages and a store fit in shared memory, and accumulators in half of the registers."""
    stages = tile.num_stages * (tile.BLOCK_M + tile.BLOCK_N) * tile.BLOCK_K * operand_bytes
    staged = tile.BLOCK_M * tile.BLOCK_N // EPILOGUE_PARTS * out_bytes
    accumulators = tile.BLOCK_M * tile.BLOCK_N // (32 * tile.num_warps)
    return stages + staged + KB <= SHARED_MEMORY[capability] and accumulators <= 128


def gemm_candidates(capability: tuple[int, int], operand_bytes: int, out_bytes: int = 0) -> list[GemmTile]:
    """Return the tiles to time on a device: the usual shapes that fit, with all of their valid options."""
    tma, blackwell = capability >= (9, 0), capability >= (10, 0)
    depths = [(64, 3), (64, 4), (128, 2)] if tma else [(32, 3), (32, 4), (32, 5), (64, 3)]
    options = [(False, False)] + [(False, True)] * tma + [(True, False)] * blackwell
    tiles = [
        GemmTile(block_m, block_n, block_k, num_warps, num_stages, group, tma, specialize, flatten)
        for block_m, block_n in [(128, 256), (256, 128), (128, 128)]
        for block_k, num_stages in depths
        for num_warps in (4, 8)
        for group in (8, 16)
        for specialize, flatten in options
    ]
    return [tile for tile in tiles if gemm_fits(tile, capability, operand_bytes, out_bytes)]
