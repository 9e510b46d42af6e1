"""Command lines of the subcommands, read as the configuration is: a mistake is one line."""

from __future__ import annotations

import argparse
from typing import NoReturn

from hypo_train.config import ConfigError


class OneLineParser(argparse.ArgumentParser):
    """Raises ConfigError where argparse would print its usage and exit."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message} (--help lists the flags)")
