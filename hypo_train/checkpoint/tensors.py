"""Convert model and optimizer state to plain CPU tensors and JSON, and restore the optimizer from them."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from hypo_train.distributed.fsdp import full_tensor, local, shard_like
from hypo_train.utils.errors import CheckpointError

# Settings of the optimizer's kernel depend on the machine, so they are not restored from a checkpoint.
_MACHINE_SETTINGS = ("fused", "foreach", "capturable")


def without_aliases(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return ``state`` with each tied tensor once, and {removed name: remaining name}."""
    unique: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    names: dict[Any, str] = {}
    for name, tensor in state.items():
        memory = (tensor.device, tensor.dtype, local(tensor).data_ptr(), tensor.shape, tensor.stride())
        if local(tensor).numel() and memory in names:
            aliases[name] = names[memory]
        else:
            names[memory] = name
            unique[name] = tensor
    return unique, aliases


def full_tensors(tensors: Mapping[str, Tensor], *, keep: bool) -> dict[str, Tensor]:
    """Return contiguous CPU copies that share no memory, as safetensors requires.

    Sharded tensors are gathered, so every process must call this. With ``keep=False`` the result is empty.
    """
    result: dict[str, Tensor] = {}
    storages = set()
    for name, tensor in tensors.items():
        full = full_tensor(tensor.detach())
        if not keep:
            continue
        full = full.cpu().contiguous()
        if full.untyped_storage().data_ptr() in storages:
            full = full.clone()
        storages.add(full.untyped_storage().data_ptr())
        result[name] = full
    return result


def optimizer_state(optimizer: Optimizer, *, keep: bool) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors of the optimizer's state by key (see ``full_tensors``), and everything else as JSON."""
    state = optimizer.state_dict()
    tensors: dict[str, Tensor] = {}
    values: dict[str, dict[str, Any]] = {}
    for index, parameter_state in state["state"].items():
        entries = _flatten(parameter_state)
        values[str(index)] = {name: value for name, value in entries.items() if not torch.is_tensor(value)}
        tensors |= {f"state/{index}/{name}": value for name, value in entries.items() if torch.is_tensor(value)}
    return full_tensors(tensors, keep=keep), {
        "param_groups": state["param_groups"],
        "shapes": _shapes(optimizer),
        "values": values,
    }


def load_optimizer_state(optimizer: Optimizer, tensors: Mapping[str, Tensor], saved: Mapping[str, Any]) -> None:
    """Restore what ``optimizer_state`` returned.

    Raises:
        CheckpointError: the optimizer has other parameters. Nothing is loaded then.
    """
    _check_same_parameters(saved["shapes"], _shapes(optimizer))
    state = {int(index): dict(values) for index, values in saved["values"].items()}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for key, tensor in tensors.items():
        _, index, name = key.split("/", 2)
        like = parameters[int(index)]
        state[int(index)][name] = shard_like(tensor, like) if tensor.shape == like.shape else tensor
    groups = [_restored_group(*pair) for pair in zip(saved["param_groups"], optimizer.param_groups, strict=True)]
    optimizer.load_state_dict({"state": state, "param_groups": groups})
    # load_state_dict casts each state to its parameter's dtype, which would round the fp32 state of a bf16 weight.
    for number, parameter in enumerate(parameters):
        loaded = optimizer.state.get(parameter, {})  # empty under ZeRO-2, where state belongs to fp32 partitions
        for name, tensor in state.get(number, {}).items():
            if torch.is_tensor(tensor) and name in loaded and loaded[name].dtype != tensor.dtype:
                optimizer.state[parameter][name] = tensor.to(parameter.device)


def _flatten(entries: Mapping[str, Any]) -> dict[str, Any]:
    """Merge inner dicts: bitsandbytes puts its 8-bit tensors in one for FSDP, but also loads them from a flat dict."""
    inner = [value for value in entries.values() if isinstance(value, dict)]
    outer = {name: value for name, value in entries.items() if not isinstance(value, dict)}
    return {name: value for part in (outer, *inner) for name, value in part.items()}


def _restored_group(saved: dict[str, Any], current: dict[str, Any]) -> dict[str, Any]:
    """Return a param group read from JSON, with its tuples restored and the settings of this machine."""
    group = {name: tuple(value) if isinstance(current.get(name), tuple) else value for name, value in saved.items()}
    return group | {name: current[name] for name in _MACHINE_SETTINGS if name in current}


def _shapes(optimizer: Optimizer) -> list[list[list[int]]]:
    return [[list(parameter.shape) for parameter in group["params"]] for group in optimizer.param_groups]


def _check_same_parameters(saved: list[list[list[int]]], current: list[list[list[int]]]) -> None:
    counts = [" + ".join(str(len(group)) for group in groups) for groups in (saved, current)]  # "5 + 2"
    if counts[0] != counts[1]:
        raise CheckpointError(
            f"the checkpoint's optimizer has {counts[0]} parameters and this one {counts[1]}: "
            "resume with the settings of the saved run"
        )
    shapes = zip(chain.from_iterable(saved), chain.from_iterable(current), strict=True)
    for index, (before, now) in enumerate(shapes):
        if before != now:
            raise CheckpointError(
                f"parameter {index} of the optimizer has shape {tuple(before)} in the checkpoint and "
                f"{tuple(now)} in the model: resume with the settings of the saved run"
            )
