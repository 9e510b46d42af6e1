"""Compile every Triton kernel of the package for each architecture, without a GPU, and record its resources.

    python -m benchmarks.compiled                # all of them, into benchmarks/COMPILED.md
    python -m benchmarks.compiled --json 90      # one of them, as JSON for the tests

Run it without ``TRITON_INTERPRET``, which replaces the compiler by an interpreter.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

# Triton 3.9 fuses by default and 3.10 does not; set it, so that both compile the same kernel.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from hypo_kernels.kernels import divergence as divergence_kernels
from hypo_kernels.kernels import exponentials as exponentials_kernels
from hypo_kernels.kernels import statistics as statistics_kernels
from hypo_kernels.kernels.rows import SCALE_BLOCK, _row_kernel, _scale_kernel
from hypo_kernels.kernels.tiles import (
    EPILOGUE_PARTS,
    FP32_TILE,
    POINTER_TILE,
    ROW_TILES,
    UNALIGNED_TILE,
    GemmTile,
    gemm_tile,
    row_tile,
)

TABLE = Path(__file__).with_name("COMPILED.md")
CAPABILITIES = [10 * major + minor for major, minor in ROW_TILES]
WIDEST, NARROWEST = 128_256, 7  # vocabularies for the row kernel's widest and narrowest tile
TENSOR_CORES = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}
HEADER = """# What the kernels compile to

Written by `python -m benchmarks.compiled`; `tests/kernels/test_compile.py` compares. Registers a thread, bytes of
stack (what spills would need) and of shared memory a program, and the instructions that the products run on.
Tiles are rows x vocabulary x features, warps, stages; "tma": operands and result through tensor descriptors;
"ws": warp-specialised. A list is a list of rows to repair; "unaligned" operands are at any address.
"""


@dataclass(frozen=True)
class Variant:
    """One kernel with one set of constants, as a launch passes them."""

    kernel: Any
    name: str
    dtype: str  # dtype of the operands, and of the result if it is no statistic
    constants: dict[str, Any]
    num_warps: int
    num_stages: int = 1
    tile: GemmTile | None = None
    aligned: bool = True


@dataclass(frozen=True)
class Compiled:
    """The result of compiling one variant."""

    name: str
    threads: int
    registers: int
    stack: int
    local: int
    shared: int
    tensor_cores: str  # the matrix instruction, or nothing
    tma: bool
    target: str


def variants(capability: int) -> Iterator[Variant]:
    """Yield every kernel, with plain logits and with every option of the LM head."""
    yield from _row_variants(capability)
    yield from _divergence_variants(capability)
    yield Variant(_scale_kernel, "scale", "bf16", {"BLOCK": SCALE_BLOCK}, 8)
    arch = (capability // 10, capability % 10)
    statistics, exponentials = statistics_kernels._statistics_kernel, exponentials_kernels._exponentials_kernel
    for bias, softcap in itertools.product((False, True), (False, True)):
        head: dict[str, Any] = {"HAS_BIAS": bias, "HAS_SOFTCAP": softcap}
        tiles = [
            gemm_tile(kernel, arch, 2, shaped=bias or softcap, aligned=True)
            for kernel in ("statistics", "exponentials")
        ]
        for dtype, moment in [("bf16", False), ("bf16", True), ("fp16", False)]:
            yield _gemm(statistics, tiles[0], dtype=dtype, **head, WITH_MOMENT=moment)
        yield _gemm(exponentials, tiles[1], **head)
    everything: dict[str, Any] = {"HAS_BIAS": True, "HAS_SOFTCAP": True}
    for tile, listed, aligned, dtype in [
        (POINTER_TILE, True, True, "bf16"),
        (UNALIGNED_TILE, False, False, "bf16"),
        (UNALIGNED_TILE, True, False, "bf16"),
        (FP32_TILE, False, True, "fp32"),
    ]:
        options: dict[str, Any] = {"listed": listed, "aligned": aligned, "dtype": dtype, **everything}
        yield _gemm(statistics, tile, **options, WITH_MOMENT=not listed)
        yield _gemm(exponentials, tile, **options)
    rows, partials = statistics_kernels.MERGE_ROWS, statistics_kernels.MERGE_PARTIALS
    for moment, listed in [(False, False), (True, False), (False, True)]:
        constants = {"WITH_MOMENT": moment, "LISTED": listed, "BLOCK_C": rows, "BLOCK_P": partials}
        yield Variant(statistics_kernels._merge_kernel, "merge", "fp32", constants, 4)
    blocks = {"BLOCK_C": exponentials_kernels.SUM_ROWS, "BLOCK_P": exponentials_kernels.SUM_PARTIALS}
    yield Variant(exponentials_kernels._sum_kernel, "sum", "fp32", blocks, 4)
    yield Variant(exponentials_kernels._list_kernel, "list", "fp32", {"BLOCK_C": exponentials_kernels.LIST_BLOCK}, 4)
    for with_offset in (False, True):
        constants = {**everything, "WITH_OFFSET": with_offset, "BLOCK_D": statistics_kernels.TARGET_BLOCK}
        yield Variant(statistics_kernels._target_logit_kernel, "target logit", "bf16", constants, 4)
    yield Variant(
        exponentials_kernels._target_kernel,
        "target",
        "bf16",
        {"HAS_SOFTCAP": True, "BLOCK_C": exponentials_kernels.TARGET_BLOCK},
        4,
    )


def _row_variants(capability: int) -> Iterator[Variant]:
    # (vocabulary, gradients wanted, their dtype, whether an earlier pass left the statistics)
    outputs = [
        (WIDEST, False, "fp32", False),
        *((WIDEST, True, dtype, known) for dtype in ("fp32", "bf16", "fp16") for known in (False, True)),
        (NARROWEST, False, "fp32", False),
        (NARROWEST, True, "bf16", False),
    ]
    heads = itertools.product((False, True), (False, True))
    for (vocab, gradients, dtype, known), (bias, softcap) in itertools.product(outputs, heads):
        tile = row_tile(vocab, (capability // 10, capability % 10))
        constants = {
            "NORMS_ARE_KNOWN": known,
            "WITH_GRADIENTS": gradients,
            "HAS_BIAS": bias,
            "HAS_SOFTCAP": softcap,
            "BLOCK_V": tile.BLOCK_V,
        }
        yield Variant(_row_kernel, f"rows {tile.BLOCK_V}", dtype, constants, tile.num_warps)


def _divergence_variants(capability: int) -> Iterator[Variant]:
    """Yield the divergence kernels: against a reference, and the entropy."""
    tile = row_tile(WIDEST, (capability // 10, capability % 10))
    kernels = (
        (divergence_kernels._statistics_kernel, "divergence"),
        (divergence_kernels._gradient_kernel, "mixed gradients"),
    )
    for (kernel, name), ref, shaped in itertools.product(kernels, (False, True), (False, True)):
        constants = {
            "HAS_REF": ref,
            "HAS_BIAS": shaped,
            "HAS_SOFTCAP": shaped,
            "REF_HAS_BIAS": shaped and ref,
            "REF_HAS_SOFTCAP": shaped and ref,
            "BLOCK_V": tile.BLOCK_V // 2,
        }
        yield Variant(kernel, f"{name} {tile.BLOCK_V // 2}", "bf16", constants, tile.num_warps)


def _gemm(
    kernel: Any, tile: GemmTile, *, dtype: str = "bf16", listed: bool = False, aligned: bool = True, **flags: bool
) -> Variant:
    name = kernel.__name__.strip("_").removesuffix("_kernel")
    shape = f"{tile.BLOCK_M}x{tile.BLOCK_N}x{tile.BLOCK_K} {tile.num_warps}w {tile.num_stages}s"
    extras = "tma" * tile.descriptors + " ws" * tile.warp_specialize + "unaligned" * (not aligned)
    constants = {**tile.constants(), **flags, "LISTED": listed, "WIDEN": False}
    label = f"{name} {shape} {extras}".strip()
    return Variant(kernel, label, dtype, constants, tile.num_warps, tile.num_stages, tile, aligned)


def compile_variant(variant: Variant, capability: int) -> Compiled:
    """Compile a variant as for a launch on CUDA: addresses and strides divisible by 16, the vocabulary not."""
    names = variant.kernel.arg_names
    constants = dict(variant.constants)
    signature = {name: "constexpr" if name in constants else _type(name, variant) for name in names}
    constants |= {name: None for name, kind in signature.items() if kind == "constexpr" and name not in constants}
    if variant.aligned:
        ones = [name for name in ("x_stride", "weight_stride") if name in names]
        constants |= dict.fromkeys(ones, 1)
        signature |= dict.fromkeys(ones, "constexpr")
    attrs = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(names)
        if name not in constants and _is_divisible(name, variant)
    }
    source = ASTSource(fn=variant.kernel, signature=signature, constexprs=constants, attrs=attrs)
    options = {"num_warps": variant.num_warps, "num_stages": variant.num_stages}
    done = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    ptx = done.asm["ptx"]
    on = [name for name, value in variant.constants.items() if value is True]
    shown = [name.lower() for name in on if name not in ("DESCRIPTORS", "WARP_SPECIALIZE", "FLATTEN")]
    found = re.search(r"^\.target\s+(\w+)", ptx, re.MULTILINE)
    threads = re.search(r"^\s*\.(?:reqntid|maxntid)\s+(\d+)", ptx, re.MULTILINE)
    return Compiled(
        name=" ".join([variant.name, variant.dtype, *shown]),
        threads=int(threads[1]) if threads else 32 * variant.num_warps,
        shared=done.metadata.shared,
        tensor_cores=TENSOR_CORES[capability] if TENSOR_CORES[capability] in ptx else "",
        tma="cp.async.bulk.tensor" in ptx,
        target=found[1] if found else "",
        **resources(done.asm["cubin"]),
    )


def _type(name: str, variant: Variant) -> str:
    """Return the type of an argument; "constexpr" for a pointer that this variant does not use."""
    tile = variant.tile
    blocks = {}
    if tile is not None and tile.descriptors:
        blocks = {
            "x": (tile.BLOCK_M, tile.BLOCK_K),
            "weight": (tile.BLOCK_N, tile.BLOCK_K),
            "out": (tile.BLOCK_M, tile.BLOCK_N // EPILOGUE_PARTS),
        }
    if name in blocks:
        return f"tensordesc<{variant.dtype}[{blocks[name][0]}, {blocks[name][1]}]>"
    if name == "bias_ptr":
        return f"*{variant.dtype}" if variant.constants["HAS_BIAS"] else "constexpr"
    if name == "ref_bias_ptr":
        return f"*{variant.dtype}" if variant.constants["REF_HAS_BIAS"] else "constexpr"
    if name.startswith("ref_") and name.endswith("_ptr") and not variant.constants["HAS_REF"]:
        return "constexpr"
    if name == "norms_ptr" and not variant.constants.get("WITH_OFFSET", True):
        return "constexpr"
    if name == "moment_ptr" and not variant.constants.get("WITH_MOMENT", True):
        return "constexpr"
    if name in ("row_ptr", "count_ptr") and not variant.constants.get("LISTED", True):
        return "constexpr"
    if name in ("x", "weight", "out", "x_ptr", "weight_ptr", "out_ptr", "grad_ptr"):
        return f"*{variant.dtype}"
    if name in ("row_ptr", "count_ptr", "repair_ptr"):
        return "*i32"
    if name == "target_ptr":
        return "*i64"
    if name.endswith("_ptr"):
        return "*fp32"
    if name in ("C", "V", "D", "num_partials", "count") or name.endswith(("_pitch", "_stride")):
        return "i32"
    return "fp32"


def _is_divisible(name: str, variant: Variant) -> bool:
    parameter = variant.kernel.params[variant.kernel.arg_names.index(name)]
    if parameter.do_not_specialize or parameter.do_not_specialize_on_alignment:
        return False
    if not variant.aligned and name in ("x", "weight", "out", "D", "x_row_stride", "weight_row_stride"):
        return False
    return name in ("x", "weight", "out", "D") or name.endswith(("_ptr", "_pitch", "row_stride"))


def resources(cubin: bytes) -> dict[str, int]:
    """Return the registers per thread and the bytes of stack and local memory, which register spills would use."""
    dump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [dump, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    found = {name.lower(): int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}
    return {"registers": found["reg"], "stack": found["stack"], "local": found["local"]}


def section(capability: int, rows: list[Compiled]) -> str:
    """Return the table of one architecture."""
    lines = [
        f"## sm_{capability}, Triton {triton.__version__}",
        "",
        "| kernel | threads | registers | stack | shared | products | TMA |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        tma = "yes" if row.tma else ""
        numbers = f"{row.threads} | {row.registers} | {row.stack + row.local} | {row.shared}"
        lines.append(f"| {row.name} | {numbers} | {row.tensor_cores} | {tma} |")
    return "\n".join(lines) + "\n"


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=int, choices=CAPABILITIES, metavar="CAPABILITY")
    wanted = parser.parse_args(argv).json
    if triton.knobs.runtime.interpret:
        parser.error("TRITON_INTERPRET is set: unset it, an interpreter compiles nothing")
    sections = []
    for capability in CAPABILITIES if wanted is None else [wanted]:
        rows = [compile_variant(variant, capability) for variant in variants(capability)]
        sections.append(section(capability, rows))
        if wanted is not None:
            record = {"triton": triton.__version__, "rows": [asdict(row) for row in rows], "section": sections[0]}
            print(json.dumps(record))
            return
        print(f"sm_{capability}: {len(rows)} kernels")
    TABLE.write_text("\n".join([HEADER, *sections]), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
