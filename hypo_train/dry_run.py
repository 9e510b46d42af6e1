"""``--dry_run`` and the flags that belong to it: they are about one call, and no settings of a run."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Literal

from pydantic import Field

from hypo_train.metrics.devices import Assumed
from hypo_train.utils.errors import ConfigError
from hypo_train.utils.flags import PathText, PositiveFloat, Settings, parse, split_argv


class DryRunFlags(Settings):
    """The flags of a dry run."""

    dry_run: bool = False
    """Check everything but weights, write nothing, print what would be trained and the memory it takes; the exit
    status is 2 where the run would be refused."""
    dry_run_model: PathText | None = None
    """A model (folder or Hub name) to check in place of one that is not available here."""
    dry_run_device: Literal["cuda", "cpu", "A100", "H100", "H200", "B200", "L40S"] | None = None
    """Estimate memory for this device, wherever the dry run is; for one that is named, predict a step's time as
    well."""
    num_devices: Annotated[int, Field(gt=0, lt=10**6)] = 1
    """Processes of the run, one a device; the page shows what they exchange."""
    devices_per_node: Annotated[int, Field(gt=0, lt=10**6)] = Assumed.devices_per_node
    """Devices of one machine, for the predicted times."""
    mfu: Annotated[float, Field(gt=0, le=1)] = Assumed.mfu
    """Part of a device's peak FLOP/s that forward and backward passes reach, for the predicted times."""
    link_gb_s: PositiveFloat | None = None
    """GB that a device sends to others of its machine in a second; none means the data sheet's figure."""
    network_gb_s: PositiveFloat | None = None
    """GB that a device sends to other machines in a second; none means the data sheet's figure."""


@dataclass(frozen=True)
class DryRun:
    """The values of the dry run's flags."""

    recipe: str | None = None  # the file of --config
    model: str | None = None
    device: str | None = None  # "cuda", "cpu", or one of metrics.devices.DEVICES
    num_devices: int = 1
    assumed: Assumed = field(default_factory=Assumed)


def take_dry_run(argv: Sequence[str]) -> tuple[DryRun | None, list[str]]:
    """Return the dry run that ``argv`` asks for, if any, and the other arguments. Raises ``ConfigError``."""
    chosen, rest = split_argv(argv, DryRunFlags)
    flags = parse(DryRunFlags, chosen)
    if not flags.dry_run:
        if given := sorted(flags.model_fields_set - {"dry_run"}):
            raise ConfigError(f"--{given[0]} is for dry runs alone: add --dry_run")
        return None, rest
    assumed = Assumed(flags.mfu, flags.devices_per_node, _bytes(flags.link_gb_s), _bytes(flags.network_gb_s))
    return DryRun(_recipe(rest), flags.dry_run_model, flags.dry_run_device, flags.num_devices, assumed), rest


def _bytes(gigabytes: float | None) -> float | None:
    return None if gigabytes is None else gigabytes * 1e9


def _recipe(argv: Sequence[str]) -> str | None:
    for i, token in enumerate(argv):
        if token.startswith("--config="):
            return os.path.expanduser(token.partition("=")[2])
        if token == "--config" and i + 1 < len(argv):
            return os.path.expanduser(argv[i + 1])
    return None
