"""Find and load the weights to export: a run's final model, or one of its checkpoints."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from pydantic import ValidationError

from hypo_train.checkpoint.files import latest_checkpoint, load_checkpoint
from hypo_train.config import Config, ConfigError
from hypo_train.model.load import load_policy, load_reward_model
from hypo_train.model.policy import Policy
from hypo_train.model.reward_model import RewardModel
from hypo_train.model.trained_weights import put_saved, put_trained_weights, whole_model_config

_RECIPE, _CHECKPOINT = "config.yaml", "checkpoint.json"


@dataclass(frozen=True)
class Source:
    """The folder of the weights to export, and the run that they belong to."""

    folder: Path
    config: Config  # configuration of the run
    run: Path  # the run's folder, for its metrics
    is_checkpoint: bool

    @classmethod
    def find(cls, path: Path) -> Source:
        """Return the source that ``path`` names: a run, its final folder or a checkpoint.

        Raises:
            ConfigError: ``path`` is none of these, or the run has no weights yet.
        """
        if (path / _CHECKPOINT).is_file():
            return cls(path, _config_of_checkpoint(path), path.resolve().parent, True)
        if (path / _RECIPE).is_file():
            if (path / "final").is_dir():
                return cls(path / "final", _config_of_run(path), path, False)
            newest = latest_checkpoint(path)
            if newest is None:
                raise ConfigError(
                    f"{str(path)!r} has neither a final model nor a complete checkpoint: nothing to export"
                )
            return cls(newest, _config_of_checkpoint(newest), path, True)
        run = path.resolve().parent
        if path.resolve().name == "final" and (run / _RECIPE).is_file():
            return cls(path, _config_of_run(run), run, False)
        raise ConfigError(
            f"{str(path)!r} is no run (it has no {_RECIPE}) and no checkpoint (it has no {_CHECKPOINT}): name a run's "
            "output_dir, or a checkpoint-<step> in it"
        )

    def load(self, *, pad_token_id: int) -> Policy | RewardModel:
        """Return the trained model, on the CPU. Raises ModelError or CheckpointError if it cannot be loaded."""
        config = self.config.model_copy(update={"gradient_checkpointing": False, "use_liger_kernel": False})
        if not self.is_checkpoint and (config.spec.trains_reward_model or not config.use_peft):
            return _load(whole_model_config(config, self.folder), pad_token_id)
        trained = _load(config, pad_token_id)
        if self.is_checkpoint:
            put_saved(trained, load_checkpoint(self.folder).model_state, self.folder)
        elif isinstance(trained, Policy):
            put_trained_weights(trained, self.folder, trust_remote_code=config.trust_remote_code)
        return trained


def _load(config: Config, pad_token_id: int) -> Policy | RewardModel:
    torch.manual_seed(config.seed)  # about new weights, which the checkpoint then replaces
    autocast = config.dtype == "bfloat16"  # from the check that the loss is exact on these weights
    if config.spec.trains_reward_model:
        return load_reward_model(config, pad_token_id=pad_token_id, autocast=autocast)
    return load_policy(config, autocast=autocast)


def _config_of_run(run: Path) -> Config:
    return _config(yaml.safe_load((run / _RECIPE).read_text(encoding="utf-8")), run / _RECIPE)


def _config_of_checkpoint(folder: Path) -> Config:
    trainer: Any = json.loads((folder / "trainer.json").read_text(encoding="utf-8"))
    return _config(trainer["extra"]["config"], folder / "trainer.json")


def _config(values: Any, path: Path) -> Config:
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        raise ConfigError(
            f"{path} is not of a run of this version: {'.'.join(map(str, first['loc']))}: {first['msg']}"
        ) from None
