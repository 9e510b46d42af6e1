"""``python -m hypo_train demo``: over which seeds, and where to.

Nothing heavy is imported here, so that a mistake is reported at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hypo_train.arguments import OneLineParser
from hypo_train.config import ConfigError


@dataclass(frozen=True)
class Settings:
    """One demo."""

    output_dir: Path
    seeds: range


def load_settings(argv: Sequence[str]) -> Settings:
    """What the command line asks for. Raises ConfigError."""
    given = _parser().parse_args(argv)
    if given.seeds < 1:
        raise ConfigError(f"--seeds {given.seeds}: at least 1")
    if given.seed < 0:
        raise ConfigError(f"--seed {given.seed}: at least 0")
    return Settings(Path(given.output_dir).expanduser(), range(given.seed, given.seed + given.seeds))


def _parser() -> OneLineParser:
    parser = OneLineParser(
        prog="python -m hypo_train demo",
        description="Train a small language model from scratch on reviews, sample preference pairs from\n"
        "it, and train DPO and HyPO side by side on them. What a review is worth is known:\n"
        "a table and curves show the true reward and the KL of both. One seed takes three and\n"
        "a half minutes on two CPU cores.",
    )
    parser.add_argument("--output_dir", metavar="FOLDER", default="runs/demo", help="for everything (%(default)s)")
    parser.add_argument("--seeds", type=int, default=1, help="how many seeds to average over (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="the first of them (default: %(default)s)")
    return parser
