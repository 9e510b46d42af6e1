"""``python -m hypo_train export``: what is exported, in which form and where to.

Nothing heavy is imported here, so that a mistake is reported at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from hypo_train.arguments import OneLineParser
from hypo_train.config import ConfigError

Dtype = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class Settings:
    """One export."""

    source: Path  # a run's folder, its final model, or one of its checkpoints
    output_dir: Path
    merge: bool
    dtype: Dtype | None  # None: of the model that the run started from; an adapter keeps its own
    trust_remote_code: bool  # of who reads the source, whatever that says itself


def load_settings(argv: Sequence[str]) -> Settings:
    """What the command line asks for. Raises ConfigError: there is no such source, or output_dir is taken."""
    given = _parser().parse_args(argv)
    source, output_dir = Path(given.source).expanduser(), Path(given.output_dir).expanduser()
    if not source.is_dir():
        raise ConfigError(f"there is no folder {given.source!r}: name a run's output_dir, or one of its checkpoints")
    if output_dir.exists():
        raise ConfigError(f"output_dir={given.output_dir!r} is there already: choose a folder that is not")
    return Settings(source, output_dir, given.merge, given.dtype, given.trust_remote_code)


def _parser() -> OneLineParser:
    parser = OneLineParser(
        prog="python -m hypo_train export",
        usage="python -m hypo_train export RUN_OR_CHECKPOINT --output_dir FOLDER [--merge] [--dtype bfloat16]",
        description="Write what a run trained as a folder of safetensors and JSON: a model that\n"
        "AutoModelForCausalLM.from_pretrained and vLLM load (a reward model:\n"
        "AutoModelForSequenceClassification), or, of a LoRA run, the adapter that\n"
        "PeftModel.from_pretrained loads. With it go tokenizer, chat template, generation config\n"
        "and a model card.",
    )
    parser.add_argument(
        "source",
        metavar="RUN_OR_CHECKPOINT",
        help="a run's folder (its final model, or the newest checkpoint of one that has not ended), or a checkpoint",
    )
    parser.add_argument("--output_dir", metavar="FOLDER", required=True, help="a new folder for what is written")
    parser.add_argument(
        "--merge", action="store_true", help="add the adapter to the weights, in fp32, and write the whole model"
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="type of the weights of a whole model (default: of the model that the run started from)",
    )
    parser.add_argument(
        "--trust_remote_code",
        action="store_true",
        help="run the Python code of the model that the run started from, where the run did",
    )
    return parser
