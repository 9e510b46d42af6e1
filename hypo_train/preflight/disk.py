"""Compare the disk space that a run needs with the free space at its output_dir."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from hypo_train.checkpoint.files import checkpoint_folder
from hypo_train.config import Config, ConfigError
from hypo_train.data.plan import Plan
from hypo_train.metrics.memory import readable
from hypo_train.model.meta_pass import num_bytes
from hypo_train.model.policy import Policy
from hypo_train.model.reward_model import RewardModel
from hypo_train.optim import footprint
from hypo_train.preflight.findings import Findings


def check_output_dir(config: Config) -> None:
    """Raise ConfigError if output_dir cannot be created or written. Nothing is created."""
    parent = _existing_parent(config)
    if not parent.is_dir():
        raise ConfigError(f"output_dir={config.output_dir!r}: {str(parent)!r} is a file, choose another folder")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise ConfigError(f"output_dir={config.output_dir!r}: {str(parent)!r} cannot be written, choose another folder")


def check_disk(config: Config, plan: Plan, trained: Policy | RewardModel, findings: Findings) -> None:
    """Compare the disk space for checkpoints and the final model with the free space.

    While a checkpoint is saved, the old ones are still there, so one more than ``save_total_limit`` needs space.

    Raises:
        ConfigError: there is not enough space for one checkpoint.
    """
    one, final = checkpoint_bytes(config, trained), final_bytes(trained)
    limit = max(config.save_total_limit, 2 if config.compares_evaluations else 1)  # the best and the newest
    kept = min(limit, _num_saves(config, plan))
    peak = max(min(kept + 1, _num_saves(config, plan)) * one, kept * one + final)
    free = shutil.disk_usage(_existing_parent(config)).free
    replaced = _bytes_of_checkpoints(Path(config.output_dir))
    findings.disk.append(
        f"{readable(peak)} for {kept} checkpoint{'s' * (kept > 1)} of {readable(one)} and the final model of "
        f"{readable(final)}; {readable(free)} are free at output_dir"
    )
    # After the last checkpoint, only the final model is left to save.
    is_finished = checkpoint_folder(Path(config.output_dir), plan.total_steps).is_dir()
    if one > free + _bytes_of_leftovers(Path(config.output_dir)) and not is_finished:
        raise ConfigError(
            f"output_dir={config.output_dir!r}: a checkpoint takes {readable(one)}, and {readable(free)} are free: "
            "choose a folder on another disk, free some space, or train fewer parameters (use_peft: true or "
            "num_layers_unfrozen)"
        )
    if peak > free + replaced:
        findings.warnings.append(
            f"disk: {readable(peak)} for checkpoints and the final model, and {readable(free)} are free at output_dir: "
            "lower save_total_limit, or choose a folder on another disk"
        )


def checkpoint_bytes(config: Config, trained: Policy | RewardModel) -> int:
    """Return the bytes of a checkpoint: the trained weights in fp32 and the optimizer's state."""
    own = trained.trained_parameters()
    state = footprint(config.optim, own.items(), roles=trained.parameter_roles, device_type="cpu").state
    return 4 * sum(p.numel() for p in own.values()) + state


def final_bytes(trained: Policy | RewardModel) -> int:
    """Return the bytes of the final model, or of its adapter alone if a policy has one."""
    if trained.is_peft and isinstance(trained, Policy):
        return num_bytes(trained.trained_parameters().values())
    return num_bytes(trained.parameters())


def _num_saves(config: Config, plan: Plan) -> int:
    """Return how many checkpoints the run writes, including that of the last step."""
    return -(-plan.total_steps // config.save_steps) if config.save_steps else 1


def _bytes_of_checkpoints(output_dir: Path) -> int:
    """Return the bytes of earlier checkpoints of a resumed run, which new ones will replace."""
    return sum(file.stat().st_size for file in output_dir.glob("checkpoint-*/*") if file.is_file())


def _bytes_of_leftovers(output_dir: Path) -> int:
    """Return the bytes of interrupted saves, which the next save removes before it writes."""
    return sum(file.stat().st_size for file in output_dir.glob("checkpoint-*.tmp/*") if file.is_file())


def _existing_parent(config: Config) -> Path:
    path = Path(config.output_dir).absolute()
    return next(folder for folder in (path, *path.parents) if folder.exists())
