"""Compile every variant of the Triton row kernel for one architecture, without a GPU, and print what it takes.

Run as ``python compiled_row_kernel.py 90``, in a process that does not have ``TRITON_INTERPRET`` set: with it,
the kernel is an interpreter's. Prints a JSON list, one object a variant.
"""

import itertools
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from hypo_kernels.rows_triton import _row_kernel
from hypo_kernels.tiles import row_tile

WIDEST, NARROWEST = 128_256, 7  # vocabularies that take the widest tile and the narrowest
# (vocabulary, gradients wanted, their dtype, whether an earlier pass left the statistics)
OUTPUTS = [
    (WIDEST, False, "fp32", False),
    *((WIDEST, True, dtype, known) for dtype in ("fp32", "bf16", "fp16") for known in (False, True)),
    (NARROWEST, False, "fp32", False),
    (NARROWEST, True, "bf16", False),
]


def compile_variant(capability: int, vocab: int, dtype: str, flags: dict[str, bool]) -> dict[str, Any]:
    tile = row_tile(vocab, (capability // 10, capability % 10))
    signature, constants = {}, {}
    for name in _row_kernel.arg_names:
        if name in flags:
            constants[name] = flags[name]
        elif name == "BLOCK_V":
            constants[name] = tile.BLOCK_V
        elif name == "bias_ptr":
            if flags["HAS_BIAS"]:
                signature[name] = f"*{dtype}"
            else:
                constants[name] = None
        elif name == "grad_ptr":
            signature[name] = f"*{dtype}"
        elif name == "target_ptr":
            signature[name] = "*i64"
        elif name.endswith("_ptr"):
            signature[name] = "*fp32"
        else:
            signature[name] = "i32" if name in ("V", "raw_pitch", "grad_pitch") else "fp32"
    signature = {name: signature.get(name, "constexpr") for name in _row_kernel.arg_names}
    # What a launch finds on CUDA: pointers and row pitches divisible by 16, a vocabulary that need not be.
    aligned = [name for name in signature if name.endswith(("_ptr", "_pitch")) and name not in constants]
    attrs = {(_row_kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    source = ASTSource(fn=_row_kernel, signature=signature, constexprs=constants, attrs=attrs)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": tile.num_warps})
    return {
        "variant": f"V={vocab} {dtype} " + " ".join(name for name, on in flags.items() if on),
        "threads": 32 * tile.num_warps,
        "shared": compiled.metadata.shared,
        "target": re.findall(r"^\.target\s+(\w+)", compiled.asm["ptx"], re.MULTILINE),
        **_resources(compiled.asm["cubin"]),
    }


def _resources(cubin: bytes) -> dict[str, int]:
    """Registers a thread, and bytes of stack and local memory: what spills would need."""
    dump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [dump, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    found = {name.lower(): int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL|SHARED):(\d+)", text)}
    return {"registers": found["reg"], "stack": found["stack"], "local": found["local"]}


def main(capability: int) -> None:
    known = next(name for name in _row_kernel.arg_names if name.endswith("_KNOWN"))
    rows = []
    for (vocab, gradients, dtype, known_before), bias, softcap in itertools.product(
        OUTPUTS, (False, True), (False, True)
    ):
        flags = {known: known_before, "WITH_GRADIENTS": gradients, "HAS_BIAS": bias, "HAS_SOFTCAP": softcap}
        rows.append(compile_variant(capability, vocab, dtype, flags))
    print(json.dumps(rows))


if __name__ == "__main__":
    main(int(sys.argv[1]))
