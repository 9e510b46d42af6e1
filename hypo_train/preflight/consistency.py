"""Check that all processes of a run have the same settings, packages, code, rows, model and reward.

Otherwise gradients of different losses or models would be averaged without an error. Paths are not compared, because
machines may keep the same files in different places.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import hypo_kernels
import hypo_train
from hypo_train.build import Models
from hypo_train.config import Config, ConfigError
from hypo_train.distributed.processes import Processes
from hypo_train.inputs import Inputs
from hypo_train.metrics.environment import versions
from hypo_train.model.reference_cache import settings_computed_with
from hypo_train.model.reward_model import RewardModel
from hypo_train.model.text_parts import decoder_of
from hypo_train.model.weight_digest import weight_hashes
from hypo_train.rewards import EndedReward

_PATHS = {"output_dir", "model_name_or_path", "dataset_name", "reward_model_path", "ref_logps_cache_dir"}
_MAX_SHOWN = 60  # characters of a value in a message


def require_same_settings(processes: Processes, config: Config, *, device_type: str) -> None:
    """Require the same settings, packages, code and kind of device in all processes.

    Raises:
        ConfigError: on the main process, if a process has different ones;
            ``OtherProcessError`` on the other processes.
    """
    settings = {name: value for name, value in config.model_dump().items() if name not in _PATHS}
    require_equal(processes, settings, "start all processes with the same settings")
    require_equal(processes, versions(), "install the same packages on all machines")
    _require_equal_hashes(processes, {"code": _source_code()}, "hypo_train and hypo_kernels")
    require_equal(processes, {"the device": device_type}, "every process needs a device of the same kind")


def require_same_inputs(processes: Processes, inputs: Inputs, models: Models) -> None:
    """Require the same rows, tokens, model and reward in all processes.

    Raises:
        ConfigError: on the main process, if a process has different ones; ``OtherProcessError`` on the others.
    """
    if processes.world_size == 1:
        return
    config, source = inputs.config, inputs.source
    assert source is not None
    data: dict[str, Any] = {f"{split} rows": digest for split, digest in inputs.plan.rows_hashes.items()}
    data |= {"tokens that end": source.eos_token_ids, "padding": source.tokenizer.pad_token_id}
    _require_equal_hashes(processes, data, f"dataset_name={config.dataset_name!r} and the model's tokenizer")
    model: dict[str, Any] = {"model settings": settings_computed_with(models.trained.base)}
    if not config.fsdp:  # with FSDP only the main process reads the weights
        model["weights"] = _read_weights(models)
    _require_equal_hashes(processes, model, f"model_name_or_path={config.model_name_or_path!r}")
    _require_equal_hashes(processes, {"reward": _reward(inputs, models)}, "the reward function or model")


def require_equal(processes: Processes, values: Mapping[str, Any], fix: str) -> None:
    """Raise ConfigError, with both values, if ``values`` differ between a process and the main process."""
    main, *others = processes.gather(dict(values))
    for rank, other in enumerate(others, 1):
        different = [name for name in {**main, **other} if other.get(name) != main.get(name)]
        if different:
            shown = [f"{name} is {_shown(other.get(name))} and not {_shown(main.get(name))}" for name in different]
            _refuse(processes, f"process {rank} differs from process 0: {', '.join(shown)}; {fix}")


def _require_equal_hashes(processes: Processes, values: Mapping[str, Any], where: str) -> None:
    """Raise ConfigError if ``values`` differ. Only hashes are exchanged, and the message shows only names."""
    hashes = {name: hashlib.sha256(json.dumps(value, default=str).encode()).digest() for name, value in values.items()}
    main, *others = processes.gather(hashes)
    for rank, other in enumerate(others, 1):
        different = " and ".join(name for name in hashes if other[name] != main[name])
        if different:
            text = f"process {rank} does not have process 0's {different}: {where} must be the same everywhere"
            _refuse(processes, text)


def _refuse(processes: Processes, text: str) -> None:
    def refuse() -> None:
        raise ConfigError(text)

    processes.run_on_all(refuse)  # so that the message is printed once, by the main process


def _shown(value: Any) -> str:
    text = "missing" if value is None else str(value)
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}..."


def _source_code() -> list[list[str]]:
    """Return the source files of both packages. Their version does not show changes in a checkout."""
    folders = [Path(package.__path__[0]) for package in (hypo_train, hypo_kernels)]
    files = [(folder, file) for folder in folders for file in sorted(folder.rglob("*.py"))]
    return [[str(file.relative_to(folder)), file.read_text(encoding="utf-8")] for folder, file in files]


def _read_weights(models: Models) -> dict[str, list[Any]]:
    """Return digests of the decoder's weights, without a new adapter, which DDP broadcasts from the main process."""
    trained = models.trained
    weights = decoder_of(trained.base).state_dict(keep_vars=True)
    return weight_hashes({name: x for name, x in weights.items() if not (trained.is_peft and x.requires_grad)})


def _reward(inputs: Inputs, models: Models) -> Any:
    """Return the source code of the reward function, or digests of the reward model's weights."""
    if inputs.reward_function is not None:
        try:
            file = inspect.getfile(inspect.unwrap(inputs.reward_function))
            return Path(file).read_text(encoding="utf-8", errors="replace")
        except (TypeError, OSError):  # a function without a file
            return None
    reward = models.reward.reward if isinstance(models.reward, EndedReward) else None
    model = getattr(reward, "model", None)
    model = model.base if isinstance(model, RewardModel) else model
    return None if model is None else weight_hashes(model.state_dict())
