"""Frozen tile configurations of the Triton kernels, by architecture; nothing is tuned on a user's step."""

from __future__ import annotations

from dataclasses import dataclass


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
