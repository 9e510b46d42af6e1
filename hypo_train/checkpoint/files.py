"""Checkpoints that are whole or not there: safetensors and JSON, never pickle.

    output_dir/checkpoint-<step>/
        model.safetensors      the tensors the caller gave
        optimizer.safetensors  state/<parameter index>/<name>, e.g. state/0/exp_avg
        trainer.json           param groups, schedule, the caller's own JSON
        checkpoint.json        step, format version, size and SHA-256 of the three above

A save writes `checkpoint-<step>.tmp` beside the final folder, flushes every file to the disk and renames it, so
that a killed run leaves either a whole checkpoint or a folder that no one reads.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from hypo_train.distributed.fsdp import local, sharded_as, whole
from hypo_train.distributed.processes import Processes

FORMAT_VERSION = 2
_MANIFEST = "checkpoint.json"
_MODEL, _OPTIMIZER, _TRAINER = "model.safetensors", "optimizer.safetensors", "trainer.json"
_FILES = (_MODEL, _OPTIMIZER, _TRAINER)
_FOLDER = re.compile(r"checkpoint-\d+")
_TEMPORARY = ".tmp"
_MACHINE_SETTINGS = ("fused", "foreach", "capturable")  # of this machine's optimizer, not of the run


class CheckpointError(ValueError):
    """A checkpoint that cannot be loaded or saved; the message says why."""


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint holds beside the optimizer's and the scheduler's state."""

    step: int
    model_state: dict[str, Tensor]  # on the CPU, bit for bit as saved; tied names share one tensor
    extra: dict[str, Any]


def checkpoint_folder(output_dir: Path, step: int) -> Path:
    """`output_dir/checkpoint-<step>`"""
    return Path(output_dir) / f"checkpoint-{step}"


def save_checkpoint(
    folder: Path,
    *,
    step: int,
    model_state: Mapping[str, Tensor],
    optimizer: Optimizer,
    scheduler: LRScheduler,
    extra: Mapping[str, Any],
    processes: Processes | None = None,
) -> None:
    """Write one checkpoint, atomically, in place of whatever `folder` held.

    Args:
        folder: `checkpoint_folder(output_dir, step)`.
        model_state: what cannot be rebuilt otherwise, in general the trained parameters.
        extra: the caller's own state, as JSON (data cursor, random states).
        processes: all of them call this, to put sharded weights together; the main one's are written. None = alone.

    Raises:
        ValueError: `folder` is not named after `step`.
        TypeError: `extra` or a state holds something that JSON cannot.
        CheckpointError: it cannot be written, as on a full disk. Whatever was saved before is as it was.
    """
    folder = Path(folder)
    if folder.name != checkpoint_folder(folder.parent, step).name:
        raise ValueError(f"the checkpoint of step {step} cannot be saved as {folder}: name it checkpoint-{step}")
    is_main = processes is None or processes.is_main
    tensors, aliases = _unaliased(model_state, keep=is_main)
    optimizer_tensors, optimizer_json = _optimizer_state(optimizer, keep=is_main)
    trainer = {
        "aliases": aliases,
        "optimizer": optimizer_json,
        "scheduler": scheduler.state_dict(),
        "extra": dict(extra),
    }
    text = json.dumps(trainer)

    def write() -> None:
        _put(folder, step, tensors, optimizer_tensors, text)

    write() if processes is None else processes.on_main(write)


def _put(folder: Path, step: int, model: dict[str, Tensor], optimizer: dict[str, Tensor], trainer: str) -> None:
    """A whole checkpoint in the place of what `folder` held. Raises CheckpointError."""
    temporary = folder.with_name(folder.name + _TEMPORARY)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        remove_temporaries(folder.parent)
        _write(temporary, step, model, optimizer, trainer)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise CheckpointError(f"cannot save {folder}: {error}; what was saved before is kept") from error
    replaced = set_aside(folder) if folder.exists() else None
    temporary.rename(folder)
    flush(folder.parent)
    if replaced:
        shutil.rmtree(replaced)


def _write(folder: Path, step: int, model: dict[str, Tensor], optimizer: dict[str, Tensor], trainer: str) -> None:
    """A new folder with the files of a checkpoint, all of them on the disk."""
    folder.mkdir()
    (folder / _TRAINER).write_text(trainer, encoding="utf-8")
    save_file(model, folder / _MODEL)
    save_file(optimizer, folder / _OPTIMIZER)
    files = {name: _fingerprint(folder / name) for name in _FILES}
    manifest = {"format_version": FORMAT_VERSION, "step": step, "files": files}
    (folder / _MANIFEST).write_text(json.dumps(manifest, indent=2), encoding="utf-8")
    for name in (*_FILES, _MANIFEST):
        open_as_its_folder(folder / name)
        flush(folder / name)
    flush(folder)


def load_checkpoint(
    folder: Path,
    *,
    optimizer: Optimizer | None = None,
    scheduler: LRScheduler | None = None,
    verify: bool = True,
    accept: Callable[[dict[str, Any]], None] | None = None,
) -> Checkpoint:
    """Read a checkpoint, and put the optimizer and the scheduler back to where they were.

    Args:
        optimizer, scheduler: built as for the saved run; None = their state is not read.
        verify: compare tensors with their checksums first; False right after `latest_checkpoint`, which did.
        accept: called with the caller's own `extra` before anything is loaded; raises if it is of another run.

    Raises:
        CheckpointError: the checkpoint is damaged, or of an optimizer with other parameters. Nothing has been
            loaded then.
    """
    folder = Path(folder)
    damage = _damage(folder, tensors=verify)
    if damage:
        raise CheckpointError(f"{folder} cannot be loaded: {damage}")
    trainer = json.loads((folder / _TRAINER).read_text(encoding="utf-8"))
    if accept is not None:
        accept(trainer["extra"])
    if optimizer is not None:
        _load_optimizer(folder, trainer["optimizer"], optimizer)
    if scheduler is not None:
        scheduler.load_state_dict(trainer["scheduler"])
    model_state = load_file(folder / _MODEL)
    model_state.update({name: model_state[kept] for name, kept in trainer["aliases"].items()})
    step = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))["step"]
    return Checkpoint(step=step, model_state=model_state, extra=trainer["extra"])


def latest_checkpoint(output_dir: Path, *, tensors: bool = True) -> Path | None:
    """The newest checkpoint that is whole, or None; a warning names each newer one that is not, and why.

    ``tensors``: read them to compare their checksums; False goes by their presence and size.
    """
    for folder in _newest_first(Path(output_dir)):
        damage = _damage(folder, tensors=tensors)
        if not damage:
            return folder
        warnings.warn(f"skipping the checkpoint {folder}: {damage}", stacklevel=2)
    return None


def damaged_checkpoints(output_dir: Path, *, tensors: bool) -> list[str]:
    """What is wrong with each one that is not whole, the newest first."""
    found = {folder.name: _damage(folder, tensors=tensors) for folder in _newest_first(Path(output_dir))}
    return [f"{name}: {damage}" for name, damage in found.items() if damage]


def is_checkpoint(folder: Path) -> bool:
    """Whether it is called as one, or holds what one does."""
    return folder.is_dir() and bool(_FOLDER.fullmatch(folder.name) or (folder / _MANIFEST).exists())


def read_extra(folder: Path) -> dict[str, Any]:
    """The caller's own part of a checkpoint, whose tensors are not read. Raises CheckpointError."""
    damage = _damage(folder, tensors=False)
    if damage:
        raise CheckpointError(f"{folder} cannot be loaded: {damage}")
    extra: dict[str, Any] = json.loads((folder / _TRAINER).read_text(encoding="utf-8"))["extra"]
    return extra


def prune(output_dir: Path, keep: int) -> None:
    """Remove all checkpoints older than the newest `keep` whole ones.

    Only presence and size of the tensors' files are looked at: reading them all at each save would cost more.

    Raises:
        ValueError: `keep` is below 1.
    """
    if keep < 1:
        raise ValueError(f"keep is {keep}: at least 1 checkpoint must stay")
    whole = 0
    for folder in _newest_first(Path(output_dir)):
        if whole >= keep:
            shutil.rmtree(set_aside(folder))
        elif not _damage(folder, tensors=False):
            whole += 1


def _newest_first(output_dir: Path) -> list[Path]:
    if not output_dir.is_dir():
        return []
    folders = [path for path in output_dir.iterdir() if path.is_dir() and _FOLDER.fullmatch(path.name)]
    return sorted(folders, key=lambda path: int(path.name.split("-")[1]), reverse=True)


def _damage(folder: Path, *, tensors: bool) -> str | None:
    """Why a folder is not a whole checkpoint; None if it is."""
    try:
        manifest = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
        version, step, files = manifest["format_version"], manifest["step"], manifest["files"]
        expected = {name: (files[name]["bytes"], files[name]["sha256"]) for name in _FILES}
    except FileNotFoundError:
        return f"{_MANIFEST} is missing"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{_MANIFEST} cannot be read ({type(error).__name__}: {error})"
    if version != FORMAT_VERSION:
        return f"its format version is {version!r}, and this version reads {FORMAT_VERSION}"
    if folder.name != f"checkpoint-{step}":
        return f"{_MANIFEST} is of step {step!r}"
    for name, (size, digest) in expected.items():
        path = folder / name
        try:
            found = path.stat().st_size
            matches = found == size and (_sha256(path) == digest if tensors or name == _TRAINER else True)
        except FileNotFoundError:
            return f"{name} is missing"
        except OSError as error:
            return f"{name} cannot be read ({type(error).__name__}: {error})"
        if found != size:
            return f"{name} has {found} bytes instead of {size}"
        if not matches:
            return f"{name} does not match its checksum"
    return None


def _unaliased(state: Mapping[str, Tensor], *, keep: bool) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors, a tied one once, and {its other name: the name it is kept under}."""
    kept: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    names: dict[Any, str] = {}
    for name, tensor in state.items():
        place = (tensor.device, tensor.dtype, local(tensor).data_ptr(), tensor.shape, tensor.stride())
        if local(tensor).numel() and place in names:
            aliases[name] = names[place]
        else:
            names[place] = name
            kept[name] = tensor
    return _standalone(kept, keep=keep), aliases


def _standalone(tensors: Mapping[str, Tensor], *, keep: bool) -> dict[str, Tensor]:
    """Contiguous on the CPU, each alone in its memory, as safetensors asks: a view is copied out.

    What is sharded is put together, which all processes take part in; one that does not ``keep`` it gets nothing.
    """
    result: dict[str, Tensor] = {}
    taken = set()
    for name, tensor in tensors.items():
        together = whole(tensor.detach())
        if not keep:
            continue
        tensor = together.cpu().contiguous()
        if tensor.untyped_storage().data_ptr() in taken:
            tensor = tensor.clone()
        taken.add(tensor.untyped_storage().data_ptr())
        result[name] = tensor
    return result


def _optimizer_state(optimizer: Optimizer, *, keep: bool) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The state's tensors by key, and all the rest of it as JSON."""
    state = optimizer.state_dict()
    tensors: dict[str, Tensor] = {}
    values: dict[str, dict[str, Any]] = {}
    for index, found in state["state"].items():
        entries = _flat(found)
        values[str(index)] = {name: value for name, value in entries.items() if not torch.is_tensor(value)}
        for name, value in entries.items():
            if torch.is_tensor(value):
                tensors[f"state/{index}/{name}"] = value
    return _standalone(tensors, keep=keep), {
        "param_groups": state["param_groups"],
        "shapes": [[list(p.shape) for p in group["params"]] for group in optimizer.param_groups],
        "values": values,
    }


def _flat(entries: Mapping[str, Any]) -> dict[str, Any]:
    """A parameter's state without inner dicts: bitsandbytes hides its 8-bit tensors in one from FSDP, and loads them
    without it as well."""
    inner = [value for value in entries.values() if isinstance(value, dict)]
    outer = {name: value for name, value in entries.items() if not isinstance(value, dict)}
    return {name: value for of in (outer, *inner) for name, value in of.items()}


def _load_optimizer(folder: Path, saved: dict[str, Any], optimizer: Optimizer) -> None:
    _check_same_parameters(saved["shapes"], optimizer)
    state = {int(index): dict(values) for index, values in saved["values"].items()}
    parameters = list(_parameters(optimizer))
    for key, tensor in load_file(folder / _OPTIMIZER).items():
        _, number, name = key.split("/", 2)
        like = parameters[int(number)]
        state[int(number)][name] = sharded_as(tensor, like) if tensor.shape == like.shape else tensor
    groups = [_restored_group(*pair) for pair in zip(saved["param_groups"], optimizer.param_groups, strict=True)]
    optimizer.load_state_dict({"state": state, "param_groups": groups})
    # load_state_dict casts a state to its parameter's dtype, which would round an fp32 state of a bf16 weight.
    for index, parameter in enumerate(_parameters(optimizer)):
        held = optimizer.state.get(parameter, {})  # nothing where it is held in parts, which are fp32
        for name, tensor in state.get(index, {}).items():
            if torch.is_tensor(tensor) and name in held and held[name].dtype != tensor.dtype:
                optimizer.state[parameter][name] = tensor.to(parameter.device)


def _restored_group(saved: dict[str, Any], current: dict[str, Any]) -> dict[str, Any]:
    """A param group from JSON: tuples are tuples again, and settings of the machine stay as built here."""
    group = {name: tuple(value) if isinstance(current.get(name), tuple) else value for name, value in saved.items()}
    return group | {name: current[name] for name in _MACHINE_SETTINGS if name in current}


def _check_same_parameters(saved: list[list[list[int]]], optimizer: Optimizer) -> None:
    found = [[list(p.shape) for p in group["params"]] for group in optimizer.param_groups]
    if [len(group) for group in saved] != [len(group) for group in found]:
        raise CheckpointError(
            f"the checkpoint's optimizer has {_counts(saved)} parameters and this one {_counts(found)}: "
            "resume with the settings of the saved run"
        )
    shapes = zip(_joined(saved), _joined(found), strict=True)
    for index, (before, now) in enumerate(shapes):
        if before != now:
            raise CheckpointError(
                f"parameter {index} of the optimizer has shape {tuple(before)} in the checkpoint and "
                f"{tuple(now)} in the model: resume with the settings of the saved run"
            )


def _counts(groups: list[list[list[int]]]) -> str:
    """`5 + 2` for two groups of five and two parameters."""
    return " + ".join(str(len(group)) for group in groups)


def _joined(groups: list[list[list[int]]]) -> list[list[int]]:
    return [shape for group in groups for shape in group]


def _parameters(optimizer: Optimizer) -> Iterator[Tensor]:
    """In the order of the indices of state_dict."""
    for group in optimizer.param_groups:
        yield from group["params"]


def _fingerprint(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": _sha256(path)}


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()


def open_as_its_folder(path: Path) -> None:
    """Let all those read a new file who may read its new folder: safetensors makes files for their owner alone, which
    an inference server of another user, or a colleague, could not load. A folder is left as it is."""
    if path.is_file():
        path.chmod(path.parent.stat().st_mode & 0o666)


def flush(path: Path) -> None:
    """Ask the system to put a file, or a folder's list of names, on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def put_text(path: Path, text: str) -> None:
    """All of a file, or what it held before, as a disk that is full leaves it."""
    temporary = path.with_name(path.name + _TEMPORARY)
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def set_aside(folder: Path) -> Path:
    """Under a name that no one reads, so that a removal killed midway leaves no half checkpoint.

    Of a link, as to a checkpoint that somebody has moved to another disk, the link alone goes: what is to be removed
    then is an empty folder.
    """
    aside = folder.with_name(f"{folder.name}.old{_TEMPORARY}")
    if not folder.is_symlink():
        return folder.rename(aside)
    aside.mkdir()
    folder.unlink()
    return aside


def remove_temporaries(output_dir: Path) -> None:
    """Remove what a killed save or removal left behind."""
    for path in output_dir.glob(f"checkpoint-*{_TEMPORARY}"):
        if path.is_dir():
            shutil.rmtree(path)
