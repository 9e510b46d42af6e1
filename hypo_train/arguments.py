"""Command lines of the subcommands, read as the configuration is: a mistake is one line."""

from __future__ import annotations

import argparse
from typing import Any, NoReturn

from hypo_train.config import ConfigError


class OneLineParser(argparse.ArgumentParser):
    """Raises ConfigError where argparse would print its usage and exit; a help page of 100 columns."""

    def __init__(self, **options: Any) -> None:
        super().__init__(formatter_class=_Help, allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message} (--help lists the flags)")


class _Help(argparse.RawDescriptionHelpFormatter):
    """Descriptions keep their lines."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, width=100, max_help_position=32)
