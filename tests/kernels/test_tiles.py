"""The frozen tiles: each one fits, and each row gets one that covers it."""

import pytest

from hypo_kernels.tiles import DEFAULT_ROW_TILE, ROW_TILES, RowTile, fits, row_tile

VOCABULARIES = [1, 3, 128, 129, 1000, 4095, 4096, 4097, 50_257, 262_144]


@pytest.mark.parametrize("capability", ROW_TILES)
def test_every_tile_fits_in_half_of_the_register_file(capability: tuple[int, int]) -> None:
    assert fits(ROW_TILES[capability])


@pytest.mark.parametrize("capability", [*ROW_TILES, (7, 5), (0, 0)])
@pytest.mark.parametrize("vocab", VOCABULARIES)
def test_every_row_gets_a_tile_that_fits_and_is_no_wider_than_it_needs(vocab: int, capability: tuple[int, int]) -> None:
    tile = row_tile(vocab, capability)
    assert fits(tile)
    assert tile.BLOCK_V & (tile.BLOCK_V - 1) == 0, "Triton's ranges are powers of two"
    assert tile.num_warps in (1, 2, 4, 8, 16)
    assert 32 * tile.num_warps <= tile.BLOCK_V, "every thread has a column"
    assert 2 * max(vocab, 128) > tile.BLOCK_V


def test_an_unlisted_device_takes_the_oldest_listed_tile() -> None:
    assert row_tile(50_257, (7, 5)) == DEFAULT_ROW_TILE == ROW_TILES[min(ROW_TILES)]


def test_a_tile_too_wide_for_its_threads_does_not_fit() -> None:
    assert not fits(RowTile(BLOCK_V=8192, num_warps=4))
