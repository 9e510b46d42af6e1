"""The Triton kernels compile for every listed architecture, on a machine without a GPU, and fit on it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from contract import NO_TRITON

from hypo_kernels.tiles import ROW_TILES

KB = 1024
SHARED_MEMORY = {80: 163 * KB, 90: 227 * KB, 100: 227 * KB}  # the most that one program may take
REGISTERS = 65_536  # of a multiprocessor, on all three
TARGETS = {80: "sm_80", 90: "sm_90a", 100: "sm_100a"}
SCRIPT = Path(__file__).with_name("compiled_row_kernel.py")


@pytest.mark.slow
@NO_TRITON
@pytest.mark.skipif(sys.platform != "linux", reason="Triton's wheel carries its assembler on Linux")
@pytest.mark.parametrize("capability", SHARED_MEMORY)
def test_every_variant_of_the_row_kernel_compiles_without_spills_and_fits(capability: int, tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    # Triton 3.9 fuses by default and 3.10 does not: said, so that both compile the same kernel.
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "TRITON_DEFAULT_FP_FUSION": "1"}
    done = subprocess.run(
        [sys.executable, SCRIPT, str(capability)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    variants = json.loads(done.stdout)
    # 9 outputs (statistics; gradients of 3 dtypes, with statistics known or not; a narrow row) × bias × softcap
    assert len({variant["variant"] for variant in variants}) == 9 * 4
    for variant in variants:
        assert variant["target"] == [TARGETS[capability]], variant
        assert variant["stack"] == variant["local"] == 0, f"spills: {variant}"
        assert variant["shared"] <= SHARED_MEMORY[capability], variant
        # tiles.py promises that two programs are resident at a time.
        assert variant["registers"] * variant["threads"] * 2 <= REGISTERS, variant


def test_every_listed_architecture_is_compiled_for() -> None:
    assert {10 * major + minor for major, minor in ROW_TILES} == set(SHARED_MEMORY)
