"""Send a run's metrics to TensorBoard, W&B, trackio or MLflow, through accelerate's trackers.

`metrics.jsonl` is the record of a run. A tracker that fails receives no more metrics; the run continues. A resumed run
continues its curves in TensorBoard. In the other trackers it starts a new run in the same group, because they cannot
drop logged steps.
"""

from __future__ import annotations

import netrc
import os
import sys
import warnings
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import yaml

from hypo_train.config import Config, ConfigError
from hypo_train.utils.redact import redacted

PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb", "trackio": "trackio", "mlflow": "mlflow"}
# Keeps the packages from sending usage, crashes, the host's name or the command line. Values that the user set win.
QUIET = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "WANDB_ERROR_REPORTING": "false",
    "WANDB_HOST": "not told",
    "WANDB_X_DISABLE_META": "true",
    "WANDB_X_DISABLE_MACHINE_INFO": "true",
}


def require_trackers(config: Config) -> None:
    """Raise ConfigError if a tracker of ``report_to`` is not installed, or if W&B has no login."""
    missing = [PACKAGES[name] for name in config.report_to if not _is_installed(PACKAGES[name])]
    if missing:
        raise ConfigError(
            f"report_to={list(config.report_to)}: {', '.join(missing)} is not installed: pip install "
            f"{' '.join(missing)}, or leave it out (report_to: none logs to metrics.jsonl only)"
        )
    if "wandb" in config.report_to and not _has_wandb_login():
        raise ConfigError(
            "report_to=wandb: there is no login for W&B: run wandb login, set WANDB_API_KEY, or set "
            "WANDB_MODE=offline to keep the run on this machine"
        )


class Trackers:
    """The trackers of one run: either all of them start, or none.

    Args:
        first_step: the step of the checkpoint that the run resumes from, or 0.

    Raises:
        ConfigError: a tracker does not start.
    """

    def __init__(self, config: Config, first_step: int = 0) -> None:
        self._open: dict[str, Any] = {}
        for name in config.report_to:
            try:
                self._open[name] = _started(name, config, first_step)
            except Exception as error:
                self.close()
                raise ConfigError(
                    f"report_to={name}: the tracker does not start: {type(error).__name__}: {redacted(str(error))}"
                ) from error

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Send a step's metrics to each tracker. A tracker that fails is dropped with a warning."""
        for name, tracker in list(self._open.items()):
            try:
                tracker.log(dict(metrics), step=step)
            except Exception as error:
                self._drop(name, error, f"has only the steps before {step}")

    def close(self) -> None:
        """Close all trackers; a second call does nothing."""
        for name, tracker in list(self._open.items()):
            try:
                tracker.finish()
            except Exception as error:
                self._drop(name, error, "may lack the last steps")
        self._open = {}

    def _drop(self, name: str, error: Exception, consequence: str) -> None:
        """Stop using a tracker that failed, with a warning."""
        del self._open[name]
        cause = f"{type(error).__name__}: {redacted(str(error))}"
        warnings.warn(f"{name} failed ({cause}): it {consequence}; metrics.jsonl has all steps", stacklevel=3)


def settings_to_show(config: Config) -> dict[str, str | int | float | bool]:
    """Return each setting as a flat value without credentials: lists as YAML, None as "none"."""
    return {name: _flat(redacted(value)) for name, value in config.model_dump().items()}


def _started(name: str, config: Config, first_step: int) -> Any:
    """Start one of accelerate's trackers."""
    from accelerate.state import PartialState
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    PartialState()  # accelerate's loggers need it
    for variable, value in QUIET.items():
        os.environ.setdefault(variable, value)
    output_dir = Path(config.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    run_name = config.run_name or output_dir.resolve().name
    attempt = f"{run_name}, from step {first_step}" if first_step else run_name
    if name == "tensorboard":
        # purge_step hides the steps that an earlier attempt logged after the checkpoint.
        options: dict[str, Any] = {"purge_step": first_step + 1 if first_step else 0, "logging_dir": str(output_dir)}
        tracker = LOGGER_TYPE_TO_CLASS[name]("tensorboard", **options)
    elif name == "mlflow":
        tracker = LOGGER_TYPE_TO_CLASS[name](config.project, run_name=attempt, tags={"group": run_name})
    else:
        options = {"name": attempt, "group": run_name, "config": settings_to_show(config)}
        if name == "wandb":
            options["dir"] = str(output_dir)
        tracker = LOGGER_TYPE_TO_CLASS[name](config.project, **options)
    tracker.start()
    if name == "mlflow":
        tracker.store_init_configuration(settings_to_show(config))
    return tracker


def _is_installed(package: str) -> bool:
    """Return whether ``package`` is installed; W&B leaves ``wandb`` folders, which import as empty packages."""
    spec = find_spec(package)
    return spec is not None and spec.origin is not None


def _flat(value: Any) -> str | int | float | bool:
    if value is None:
        return "none"
    if isinstance(value, (str, int, float)):
        return value
    return yaml.safe_dump(value, default_flow_style=True, width=10**6).strip()


def _has_wandb_login() -> bool:
    """Return True if W&B is offline, has a login, or can ask for one on a terminal."""
    if os.environ.get("WANDB_MODE", "online") != "online" or sys.stdin.isatty():
        return True
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False
