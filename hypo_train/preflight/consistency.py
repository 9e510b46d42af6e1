"""What every process of a run must have as the main one has it, compared before they train together.

Nothing else would tell: gradients of other rows, of another loss or of another model can be added up just as well.
Paths are no part of it: machines may keep the same files in different places.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import hypo_kernels
import hypo_train
from hypo_train.config import Config, ConfigError
from hypo_train.data.plan import Plan
from hypo_train.distributed.processes import Processes
from hypo_train.metrics.environment import versions
from hypo_train.model.reference_cache import settings_computed_with
from hypo_train.model.reward_model import RewardModel
from hypo_train.model.tree_model import TreeModel
from hypo_train.model.weight_digest import weight_hashes
from hypo_train.rewards import EndedReward, Reward, RewardFunction

# Where things lie; the main process's count for what is written, and the contents of what is read are compared.
_PLACES = {"output_dir", "model_name_or_path", "dataset_name", "reward_model_path", "ref_logps_cache_dir"}
_LONGEST = 60  # characters of a value that is shown


def require_same_settings(processes: Processes, config: Config, *, device_type: str) -> None:
    """Before anything is read.

    Raises:
        ConfigError: on the main process, where a process has other settings, packages or another kind of device;
            ``OtherProcessError`` on the others.
    """
    settings = {name: value for name, value in config.model_dump().items() if name not in _PLACES}
    _require(processes, settings, "start all processes with the same settings")
    _require(processes, versions(), "install the same packages on all machines")
    _require_same(processes, {"code": _hash_of_code()}, "hypo_train and hypo_kernels")
    _require(processes, {"the device": device_type}, "every process needs a device of the same kind")


def require_same_contents(
    processes: Processes,
    plan: Plan,
    trained: TreeModel[Any],
    *,
    tokens: Mapping[str, Sequence[int]],
    reward: Reward | None,
    reward_function: RewardFunction | None,
) -> None:
    """When it is read.

    Args:
        tokens: those with a meaning of their own, by what they are.

    Raises:
        ConfigError: on the main process, where a process has read something else; ``OtherProcessError`` on the others.
    """
    if processes.world_size == 1:
        return
    config = plan.config
    rows = {f"{split} rows": digest for split, digest in plan.rows_hashes.items()}
    _require_same(processes, {**rows, **tokens}, f"dataset_name={config.dataset_name!r} and the model's tokenizer")
    model: dict[str, Any] = {"model settings": settings_computed_with(trained.base)}
    if not config.fsdp:  # which the main process reads alone
        model["weights"] = _weights(trained)
    _require_same(processes, model, f"model_name_or_path={config.model_name_or_path!r}")
    _require_same(processes, {"reward": _reward(reward, reward_function)}, "the reward function or model")


def _require(processes: Processes, facts: Mapping[str, Any], fix: str) -> None:
    """Refuse what differs, with both values."""
    main, *others = processes.gather(dict(facts))
    for rank, own in enumerate(others, 1):
        different = [name for name in {**main, **own} if own.get(name) != main.get(name)]
        if different:
            shown = [f"{name} is {_shown(own.get(name))} and not {_shown(main.get(name))}" for name in different]
            _refuse(processes, f"process {rank} is not as process 0: {', '.join(shown)}; {fix}")


def _require_same(processes: Processes, facts: Mapping[str, Any], where: str) -> None:
    """Refuse what differs, by its name."""
    digests = {name: hashlib.sha256(json.dumps(fact, default=str).encode()).hexdigest() for name, fact in facts.items()}
    main, *others = processes.gather(digests)
    for rank, own in enumerate(others, 1):
        different = [name for name in digests if own[name] != main[name]]
        if different:
            what = " and ".join(different)
            _refuse(processes, f"process {rank} does not have process 0's {what}: {where} must be the same everywhere")


def _refuse(processes: Processes, text: str) -> None:
    def refuse() -> None:
        raise ConfigError(text)

    processes.run_on_all(refuse)  # said by the main process, once


def _shown(value: Any) -> str:
    text = "not there" if value is None else str(value)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def _hash_of_code() -> str:
    """Of this project's own: a checkout changes without its version."""
    digest = hashlib.sha256()
    for package in (hypo_train, hypo_kernels):
        folder = Path(package.__path__[0])
        for file in sorted(folder.rglob("*.py")):
            digest.update(str(file.relative_to(folder)).encode() + b"\n" + file.read_bytes())
    return digest.hexdigest()


def _weights(trained: TreeModel[Any]) -> dict[str, list[Any]]:
    """What was read of the layers; what is new, as an adapter, DDP takes from the main process."""
    decoder = trained.base.get_decoder()
    kept = decoder.state_dict(keep_vars=True)
    return weight_hashes({name: x for name, x in kept.items() if not (trained.is_peft and x.requires_grad)})


def _reward(reward: Reward | None, function: RewardFunction | None) -> Any:
    if function is not None:
        try:
            return Path(inspect.getfile(inspect.unwrap(function))).read_text(encoding="utf-8", errors="replace")
        except (TypeError, OSError):  # a function that no file holds
            return None
    model = getattr(reward.reward, "model", None) if isinstance(reward, EndedReward) else None
    if isinstance(model, RewardModel):
        model = model.base
    return None if model is None else weight_hashes(model.state_dict())
