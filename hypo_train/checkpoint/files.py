"""Checkpoint folders: safetensors and JSON, never pickle, written atomically.

output_dir/checkpoint-<step>/
    model.safetensors      the caller's tensors
    optimizer.safetensors  state/<parameter index>/<name>, e.g. state/0/exp_avg
    trainer.json           param groups, scheduler, the caller's JSON
    checkpoint.json        step, format version, size and SHA-256 of the three files above
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from hypo_train.checkpoint.tensors import full_tensors, load_optimizer_state, optimizer_state, without_aliases
from hypo_train.distributed.processes import Processes
from hypo_train.utils.atomic import TEMPORARY, remove_folder, write_folder
from hypo_train.utils.errors import CheckpointError

FORMAT_VERSION = 2
_MANIFEST = "checkpoint.json"
_MODEL, _OPTIMIZER, _TRAINER = "model.safetensors", "optimizer.safetensors", "trainer.json"
_FILES = (_MODEL, _OPTIMIZER, _TRAINER)
_FOLDER = re.compile(r"checkpoint-\d+")


@dataclass(frozen=True)
class Checkpoint:
    """The content of a checkpoint, without the optimizer's and the scheduler's state."""

    step: int
    model_state: dict[str, Tensor]  # on the CPU, bit for bit as saved; tied names share one tensor
    extra: dict[str, Any]


def checkpoint_folder(output_dir: Path, step: int) -> Path:
    """Return `output_dir/checkpoint-<step>`."""
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
    """Write one checkpoint atomically; it replaces ``folder``.

    Args:
        folder: ``checkpoint_folder(output_dir, step)``.
        model_state: the tensors that cannot be rebuilt otherwise, in general the trained parameters.
        extra: other state of the caller, as JSON.
        processes: every process of the run must call this, because gathering sharded tensors is collective; the main
            process writes. None for a single process.

    Raises:
        ValueError: ``folder`` is not named after ``step``.
        TypeError: ``extra`` or a state holds a value that is not JSON.
        CheckpointError: the checkpoint cannot be written, for example on a full disk. Older ones are unchanged.
    """
    folder = Path(folder)
    if folder.name != checkpoint_folder(folder.parent, step).name:
        raise ValueError(f"the checkpoint of step {step} cannot be saved as {folder}: name it checkpoint-{step}")
    is_main = processes is None or processes.is_main
    unique, aliases = without_aliases(model_state)
    model_tensors = full_tensors(unique, keep=is_main)
    optimizer_tensors, optimizer_json = optimizer_state(optimizer, keep=is_main)
    trainer = {
        "aliases": aliases,
        "optimizer": optimizer_json,
        "scheduler": scheduler.state_dict(),
        "extra": dict(extra),
    }
    text = json.dumps(trainer)

    def fill(unfinished: Path) -> None:
        (unfinished / _TRAINER).write_text(text, encoding="utf-8")
        save_file(model_tensors, unfinished / _MODEL)
        save_file(optimizer_tensors, unfinished / _OPTIMIZER)
        files = {name: _size_and_hash(unfinished / name) for name in _FILES}
        manifest = {"format_version": FORMAT_VERSION, "step": step, "files": files}
        (unfinished / _MANIFEST).write_text(json.dumps(manifest, indent=2), encoding="utf-8")

    def write() -> None:
        remove_temporaries(folder.parent)
        save_folder(folder, fill, advice="; earlier checkpoints are unchanged")

    write() if processes is None else processes.run_on_main(write)


def save_folder(folder: Path, fill: Callable[[Path], None], *, advice: str) -> None:
    """Replace ``folder`` atomically by a new folder that ``fill`` writes.

    Raises:
        CheckpointError: it cannot be written, for example on a full disk; the message ends with ``advice``.
    """
    try:
        write_folder(folder, fill)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot save {folder}: {error}{advice}") from error


def load_checkpoint(
    folder: Path,
    *,
    optimizer: Optimizer | None = None,
    scheduler: LRScheduler | None = None,
    verify: bool = True,
    accept: Callable[[dict[str, Any]], None] | None = None,
) -> Checkpoint:
    """Read a checkpoint and restore the state of the optimizer and the scheduler.

    Args:
        optimizer, scheduler: built as for the saved run. None: their state is not read.
        verify: compare the tensors with their checksums first. Not needed right after ``latest_checkpoint``, which
            does the same.
        accept: called with the saved ``extra`` before anything is loaded; raises if it belongs to another run.

    Raises:
        CheckpointError: the checkpoint is damaged, or its optimizer has other parameters. Nothing is loaded then.
    """
    folder = Path(folder)
    trainer = _read_trainer(folder, verify_tensors=verify)
    if accept is not None:
        accept(trainer["extra"])
    if optimizer is not None:
        load_optimizer_state(optimizer, load_file(folder / _OPTIMIZER), trainer["optimizer"])
    if scheduler is not None:
        scheduler.load_state_dict(trainer["scheduler"])
    model_state = load_file(folder / _MODEL)
    model_state.update({name: model_state[kept] for name, kept in trainer["aliases"].items()})
    return Checkpoint(_step(folder), model_state, trainer["extra"])


def latest_checkpoint(output_dir: Path, *, tensors: bool = True) -> Path | None:
    """Return the newest complete checkpoint, or None. Warn about each newer checkpoint that is damaged.

    ``tensors``: compare the checksums of the tensors; False checks only that the files exist and their sizes.
    """
    for folder in _newest_first(Path(output_dir)):
        damage = _damage(folder, tensors=tensors)
        if not damage:
            return folder
        warnings.warn(f"skipping the checkpoint {folder}: {damage}", stacklevel=2)
    return None


def damaged_checkpoints(output_dir: Path, *, tensors: bool) -> list[str]:
    """Return one line for each damaged checkpoint, newest first."""
    damages = {folder.name: _damage(folder, tensors=tensors) for folder in _newest_first(Path(output_dir))}
    return [f"{name}: {damage}" for name, damage in damages.items() if damage]


def is_complete(folder: Path) -> bool:
    """Return whether ``folder`` is a checkpoint with all its files, without reading its tensors."""
    return _damage(folder, tensors=False) is None


def is_checkpoint(folder: Path) -> bool:
    """Return whether ``folder`` has the name or the manifest of a checkpoint."""
    return folder.is_dir() and bool(_FOLDER.fullmatch(folder.name) or (folder / _MANIFEST).exists())


def read_extra(folder: Path) -> dict[str, Any]:
    """Return the ``extra`` of a checkpoint without reading tensors. Raises CheckpointError."""
    extra: dict[str, Any] = _read_trainer(folder, verify_tensors=False)["extra"]
    return extra


def prune(output_dir: Path, keep: int, *, best: int | None = None) -> None:
    """Remove all checkpoints older than the newest ``keep`` complete ones.

    That of step ``best`` is one of the ``keep``, or one more if ``keep`` is 1: the newest is always kept.

    Only the existence and size of the tensor files are checked: reading them at every save would take too long.

    Raises:
        ValueError: ``keep`` is below 1.
    """
    if keep < 1:
        raise ValueError(f"keep is {keep}: at least 1 checkpoint must stay")
    folders = _newest_first(Path(output_dir))
    complete = [folder for folder in folders if not _damage(folder, tensors=False)]
    if len(complete) < keep:
        return
    older_best = [folder for folder in complete[keep:] if _step(folder) == best]
    kept = complete[: max(1, keep - len(older_best))]
    for folder in folders[folders.index(kept[-1]) + 1 :]:
        if folder not in older_best:
            remove_folder(folder)


def remove_temporaries(output_dir: Path) -> None:
    """Remove the temporary folders that a killed save or removal left."""
    for path in output_dir.glob(f"checkpoint-*{TEMPORARY}"):
        shutil.rmtree(path, ignore_errors=True)


def _newest_first(output_dir: Path) -> list[Path]:
    if not output_dir.is_dir():
        return []
    folders = [path for path in output_dir.iterdir() if path.is_dir() and _FOLDER.fullmatch(path.name)]
    return sorted(folders, key=_step, reverse=True)


def _step(folder: Path) -> int:
    return int(folder.name.split("-")[1])


def _read_trainer(folder: Path, *, verify_tensors: bool) -> dict[str, Any]:
    damage = _damage(folder, tensors=verify_tensors)
    if damage:
        raise CheckpointError(f"{folder} cannot be loaded: {damage}")
    trainer: dict[str, Any] = json.loads((folder / _TRAINER).read_text(encoding="utf-8"))
    return trainer


def _damage(folder: Path, *, tensors: bool) -> str | None:
    """Return the reason why a folder is not a complete checkpoint, or None if it is complete."""
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
        return f"{_MANIFEST} belongs to step {step!r}"
    for name, (size, digest) in expected.items():
        try:
            actual = (folder / name).stat().st_size
            if actual != size:
                return f"{name} has {actual} bytes instead of {size}"
            if (tensors or name == _TRAINER) and _sha256(folder / name) != digest:
                return f"{name} does not match its checksum"
        except FileNotFoundError:
            return f"{name} is missing"
        except OSError as error:
            return f"{name} cannot be read ({type(error).__name__}: {error})"
    return None


def _size_and_hash(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": _sha256(path)}


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()
