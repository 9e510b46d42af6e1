"""Flags that are about one call of the command line, and no setting of a run: a dry run and what stands in for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hypo_train.config import ConfigError


@dataclass(frozen=True)
class DryRun:
    """What ``--dry-run`` was called with."""

    recipe: str | None = None  # the file of --config
    model: str | None = None
    device: str | None = None
    num_devices: int = 1


def take_dry_run(argv: Sequence[str]) -> tuple[DryRun | None, list[str]]:
    """The dry run that is asked for, if any, and the other arguments. Raises ``ConfigError``."""
    values: dict[str, str] = {}
    rest: list[str] = []
    name = None
    for token in argv:
        flag, _, value = token.removeprefix("--").partition("=")
        flag = flag.replace("-", "_")
        if token.startswith("--"):
            name = None
            if flag in ("dry_run", "dry_run_model", "dry_run_device", "num_devices"):
                if flag in values:
                    raise ConfigError(f"--{flag} is given more than once")
                name, values[flag] = flag, value
                continue
        elif name is not None:
            if values[name]:
                raise ConfigError(f"--{name} is given more than one value: {values[name]!r}, {token!r}")
            values[name] = token
            continue
        rest.append(token)
    if values.get("dry_run"):
        raise ConfigError(f"--dry_run takes no value, and is given {values['dry_run']!r}")
    for flag in values.keys() - {"dry_run"}:
        if "dry_run" not in values:
            raise ConfigError(f"--{flag} is for dry runs alone: add --dry_run")
        if not values[flag]:
            raise ConfigError(f"--{flag} needs a value")
    if "dry_run" not in values:
        return None, rest
    if values.get("dry_run_device", "cpu") not in ("cuda", "cpu"):
        raise ConfigError(f"--dry_run_device={values['dry_run_device']}: it is cuda or cpu")
    count = values.get("num_devices", "1")
    if not (count.isascii() and count.isdigit() and int(count[:6]) > 0 and len(count) <= 6):
        raise ConfigError(f"--num_devices={count[:20]}: it is how many processes the run will have, 1 or more")
    return DryRun(_recipe(rest), values.get("dry_run_model"), values.get("dry_run_device"), int(count)), rest


def _recipe(argv: Sequence[str]) -> str | None:
    for i, token in enumerate(argv):
        if token.startswith("--config="):
            return token.partition("=")[2]
        if token == "--config" and i + 1 < len(argv):
            return argv[i + 1]
    return None
