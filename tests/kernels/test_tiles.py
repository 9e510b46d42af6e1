"""The tile tables: each tile fits the hardware, and each row gets a tile that covers it."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from hypo_kernels.kernels.tiles import (
    DEFAULT_ROW_TILE,
    FP32_TILE,
    GEMM_TILES,
    POINTER_TILE,
    ROW_TILES,
    SHARED_MEMORY,
    UNALIGNED_TILE,
    GemmTile,
    RowTile,
    fits,
    gemm_candidates,
    gemm_fits,
    gemm_tile,
    row_tile,
)

VOCABULARIES = [1, 3, 128, 129, 1000, 4095, 4096, 4097, 50_257, 262_144]


@pytest.mark.parametrize("capability", ROW_TILES)
def test_every_tile_fits_in_half_of_the_register_file(capability: tuple[int, int]) -> None:
    assert fits(ROW_TILES[capability])


@pytest.mark.parametrize("capability", [*ROW_TILES, (7, 5), (0, 0)])
@pytest.mark.parametrize("vocab", VOCABULARIES)
def test_row_tile_fits_and_is_no_wider_than_needed(vocab: int, capability: tuple[int, int]) -> None:
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


@pytest.mark.parametrize("capability", SHARED_MEMORY)
def test_every_gemm_tile_fits_with_the_store_it_stages(capability: tuple[int, int]) -> None:
    for tile in (POINTER_TILE, UNALIGNED_TILE):
        assert gemm_fits(tile, capability, 2, 2)
    assert gemm_fits(FP32_TILE, capability, 4, 4)
    for (_, listed, operand_bytes), tile in GEMM_TILES.items():
        if listed == capability:
            assert gemm_fits(tile, capability, operand_bytes, operand_bytes)
            assert capability >= (9, 0) or not tile.descriptors


def test_gemm_tile_beyond_the_hardware_does_not_fit() -> None:
    tile = GEMM_TILES["statistics", (9, 0), 2]
    assert not gemm_fits(replace(tile, num_stages=5), (9, 0), 2)
    assert not gemm_fits(replace(tile, num_warps=4), (9, 0), 2)


def test_gemm_tile_depends_on_operands_head_and_device() -> None:
    def tile(
        capability: tuple[int, int] = (9, 0), size: int = 2, *, shaped: bool = False, aligned: bool = True
    ) -> GemmTile:
        return gemm_tile("statistics", capability, size, shaped=shaped, aligned=aligned)

    assert tile() == GEMM_TILES["statistics", (9, 0), 2]
    assert tile(shaped=True) == GEMM_TILES["shaped statistics", (9, 0), 2] != tile()
    assert tile(aligned=False) == tile((8, 9)) == UNALIGNED_TILE
    assert tile(size=4) == FP32_TILE
    for pointers in (UNALIGNED_TILE, FP32_TILE, POINTER_TILE):
        assert not pointers.descriptors, "they serve what TMA does not"


@pytest.mark.parametrize("capability", SHARED_MEMORY)
def test_candidates_fit_differ_and_include_the_frozen_tile(capability: tuple[int, int]) -> None:
    for kernel, out_bytes in (("statistics", 0), ("exponentials", 2)):
        candidates = gemm_candidates(capability, 2, out_bytes)
        assert len(set(candidates)) == len(candidates)
        assert all(gemm_fits(tile, capability, 2, out_bytes) for tile in candidates)
        frozen = GEMM_TILES[kernel, capability, 2]
        assert frozen in candidates or not frozen.descriptors


def test_tuning_needs_a_gpu_and_says_so() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    command = [sys.executable, "-m", "benchmarks.tune_tiles"]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "CUDA" in done.stderr


def test_tuning_takes_the_tile_that_is_best_over_all_shapes() -> None:
    from benchmarks.tune_tiles import Timed, best, frozen_line

    slow, fast, lopsided = (replace(POINTER_TILE, group=group) for group in (1, 2, 4))
    timed = [
        Timed("statistics", tile, shape, times_gemm=ratio)
        for tile, ratios in [(slow, (1.2, 1.2)), (fast, (1.1, 1.1)), (lopsided, (1.0, 1.5))]
        for shape, ratio in zip(("large", "small"), ratios, strict=True)
    ]
    # Fastest, on the one shape that it ran on.
    timed += [
        Timed("statistics", replace(slow, group=8), "large", times_gemm=0.9),
        Timed("statistics", replace(slow, group=8), "small", failed="out of resources"),
    ]
    tile, ratio = best(timed)
    assert tile == fast
    assert ratio == pytest.approx(1.1)
    line = frozen_line("statistics", (9, 0), 2, tile)
    assert eval(f"{{{line}}}", {"GemmTile": GemmTile}) == {("statistics", (9, 0), 2): fast}
