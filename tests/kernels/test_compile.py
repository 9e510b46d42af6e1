"""The Triton kernels compile for every listed architecture, on a machine without a GPU, and fit on it.

``benchmarks/COMPILED.md`` says what each takes. Written by the same Triton, it has to be what comes out here.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from contract import NO_TRITON

from hypo_kernels.kernels.tiles import GEMM_TILES, ROW_TILES, SHARED_MEMORY

ROOT = Path(__file__).parents[2]
TABLE = ROOT / "benchmarks" / "COMPILED.md"
CAPABILITIES = [80, 90, 100]
REGISTERS = 65_536  # of a multiprocessor, on all three
TARGETS = {80: "sm_80", 90: "sm_90a", 100: "sm_100a"}
TENSOR_CORES = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}


@pytest.mark.slow
@NO_TRITON
@pytest.mark.skipif(sys.platform != "linux", reason="Triton's wheel carries its assembler on Linux")
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_every_kernel_compiles_without_spills_and_fits(capability: int, tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "TRITON_DEFAULT_FP_FUSION": "1"}
    command = [sys.executable, "-m", "benchmarks.compiled", "--json", str(capability)]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)
    rows = record["rows"]
    assert len({row["name"] for row in rows}) == len(rows)
    for row in rows:
        assert row["target"] == TARGETS[capability], row
        assert row["stack"] == row["local"] == 0, f"spills: {row}"
        assert row["shared"] <= SHARED_MEMORY[capability // 10, capability % 10], row
        assert row["registers"] * row["threads"] <= REGISTERS, row
        if row["name"].startswith("rows"):
            # tiles.py promises that two programs are resident at a time.
            assert row["registers"] * row["threads"] * 2 <= REGISTERS, row
        if re.match("statistics|exponentials", row["name"]):
            products = "" if "fp32" in row["name"] else TENSOR_CORES[capability]
            assert row["tensor_cores"] == products, row
            assert row["tma"] == ("tma" in row["name"]), row
    # A row kernel of 9 outputs (statistics; gradients of 3 dtypes, with statistics known or not; a narrow row) and
    # two kernels with a GEMM, each by bias and softcap.
    assert sum(row["name"].startswith("rows") for row in rows) == 9 * 4
    assert sum(bool(re.match("statistics|exponentials", row["name"])) for row in rows) >= 2 * 4
    if f"sm_{capability}, Triton {record['triton']}\n" in TABLE.read_text(encoding="utf-8"):
        assert record["section"] in TABLE.read_text(encoding="utf-8"), "run python -m benchmarks.compiled"


def test_every_listed_architecture_is_in_the_table() -> None:
    listed = {10 * major + minor for major, minor in ROW_TILES}
    assert listed == {10 * major + minor for _, (major, minor), _ in GEMM_TILES} == set(CAPABILITIES)
    assert [
        int(found) for found in re.findall(r"^## sm_(\d+), Triton", TABLE.read_text(), re.MULTILINE)
    ] == CAPABILITIES
