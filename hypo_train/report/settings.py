"""The flags of ``python -m hypo_train report``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from hypo_train.utils.flags import Settings, help_page, parse


class ReportSettings(Settings):
    """Write one HTML file about a run, or about several side by side: curves, the last evaluation, samples,
    settings, environment. A run may be still running, killed or failed. The file loads nothing from the
    network."""

    usage: ClassVar[str] = "python -m hypo_train report RUN [RUN ...] [--output FILE]"
    positional: ClassVar[str] = "run"
    how_to_set: ClassVar[str] = "name a run's folder, as in python -m hypo_train report runs/hypo"

    run: list[Path]
    """output_dir of a training run, or several."""
    output: Path | None = None
    """The file to write; none means report.html in the run's folder, or in the current folder for several runs."""


def load_settings(argv: Sequence[str]) -> ReportSettings:
    """Return the settings from the arguments ``argv``. Raises ConfigError."""
    return parse(ReportSettings, argv)


def help_text() -> str:
    """Return the ``--help`` page."""
    return help_page(ReportSettings)
