"""Flags that are about one call of the command line, and no setting of a run: a dry run and what stands in for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import inf

from hypo_train.config import ConfigError
from hypo_train.metrics.devices import DEVICES, Assumed

_FLAGS = (
    "dry_run",
    "dry_run_model",
    "dry_run_device",
    "num_devices",
    "devices_per_node",
    "mfu",
    "link_gb_s",
    "network_gb_s",
)


@dataclass(frozen=True)
class DryRun:
    """What ``--dry-run`` was called with."""

    recipe: str | None = None  # the file of --config
    model: str | None = None
    device: str | None = None  # "cuda", "cpu", or one of costs.devices.DEVICES
    num_devices: int = 1
    assumed: Assumed = field(default_factory=Assumed)


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
            if flag in _FLAGS:
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
    device = values.get("dry_run_device")
    if device not in (None, "cuda", "cpu", *DEVICES):
        raise ConfigError(f"--dry_run_device={device}: it is cuda, cpu or one of {', '.join(DEVICES)}")
    count = _count(values, "num_devices", 1, "how many processes the run will have")
    return DryRun(_recipe(rest), values.get("dry_run_model"), device, count, _assumed(values)), rest


def _assumed(values: Mapping[str, str]) -> Assumed:
    return Assumed(
        mfu=_number(values, "mfu", 1, "the share of a device's peak that passes reach") or Assumed.mfu,
        devices_per_node=_count(values, "devices_per_node", Assumed.devices_per_node, "how many devices a machine has"),
        link=_bytes_a_second(values, "link_gb_s", "what a device sends to others of its machine, in GB a second"),
        network=_bytes_a_second(values, "network_gb_s", "what a device sends to other machines, in GB a second"),
    )


def _bytes_a_second(values: Mapping[str, str], name: str, meaning: str) -> float | None:
    number = _number(values, name, inf, meaning)
    return None if number is None else number * 1e9


def _count(values: Mapping[str, str], name: str, default: int, meaning: str) -> int:
    text = values.get(name, str(default))
    if not (text.isascii() and text.isdigit() and int(text[:6]) > 0 and len(text) <= 6):
        raise ConfigError(f"--{name}={text[:20]}: it is {meaning}, 1 or more")
    return int(text)


def _number(values: Mapping[str, str], name: str, most: float, meaning: str) -> float | None:
    text = values.get(name)
    if text is None:
        return None
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number <= most or number == inf:
        up_to = "" if most == inf else f" and up to {most:g}"
        raise ConfigError(f"--{name}={text[:20]}: it is {meaning}, above 0{up_to}")
    return number


def _recipe(argv: Sequence[str]) -> str | None:
    for i, token in enumerate(argv):
        if token.startswith("--config="):
            return token.partition("=")[2]
        if token == "--config" and i + 1 < len(argv):
            return argv[i + 1]
    return None
