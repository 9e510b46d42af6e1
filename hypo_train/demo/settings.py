"""``python -m hypo_train demo``: its flags. Nothing heavy is imported here, so that a mistake is reported at once."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from hypo_train.utils.flags import NonNegativeInt, PositiveInt, Settings, help_page, parse


class DemoSettings(Settings):
    """Train a small language model from scratch on reviews, sample preference pairs from it, and train
    DPO and HyPO side by side on them. The true reward of a review is known: a table and curves show
    the true reward and the KL of both. One seed takes three to six minutes on two CPU cores."""

    usage: ClassVar[str] = "python -m hypo_train demo [--output_dir FOLDER] [--seeds N] [--seed N]"

    output_dir: Path = Path("runs/demo")
    """Folder for everything."""
    seeds: PositiveInt = 1
    """Number of seeds to average over."""
    seed: NonNegativeInt = 0
    """The first of them."""


def load_settings(argv: Sequence[str]) -> DemoSettings:
    """Return the settings from the arguments ``argv``. Raises ConfigError."""
    return parse(DemoSettings, argv)


def help_text() -> str:
    """Return the ``--help`` page."""
    return help_page(DemoSettings)
