"""Where architecture and tokenizer come from; in a dry run, also what stands in for a model that is not there yet."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from hypo_train.config import Config, ConfigError, load_config
from hypo_train.dry_run import DryRun
from hypo_train.model.source import (
    check_architecture,
    check_source,
    eos_token_ids,
    generation_config,
    load_tokenizer,
    looks_local,
    read_architecture,
)
from hypo_train.model.tree_model import ModelError
from hypo_train.model.weight_files import check_weight_files, has_weights
from hypo_train.preflight.architectures import known_architecture
from hypo_train.preflight.findings import Findings

RECIPES = Path(__file__).parents[1] / "recipes"
LONGEST = "as long as they may be"


@dataclass(frozen=True)
class Source:
    """Where architecture and tokenizer come from."""

    config: Config  # with the model that stands in, where one does
    architecture: Any
    tokenizer: Any  # None: it could not be had
    line: str

    @cached_property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Every token that ends a completion."""
        return eos_token_ids(generation_config(self.config), self.tokenizer)

    @classmethod
    def of_run(cls, config: Config) -> Source:
        """What a run reads itself, with nothing in its place. Raises ModelError."""
        name = config.model_name_or_path
        check_source(name)
        check_weights(name)
        architecture = read_architecture(config)
        line = f"config of {name}: {_origin(name)}"
        return cls(config, architecture, load_tokenizer(config, architecture), line)

    @classmethod
    def of_dry_run(cls, config: Config, dry_run: DryRun, found: Findings) -> Source:
        """The same, or what stands in for it. Raises ModelError where there is no architecture to go by."""
        wanted = config.model_name_or_path
        stand_in = "--dry_run_model NAME says what stands in for it in a dry run"
        makers = list(_makers(wanted, dry_run.recipe))
        made = f" ({makers[0].file} makes it)" if makers else ""
        name = dry_run.model or (makers[-1].start if makers else wanted)
        if is_missing(name):
            what = "--dry_run_model" if dry_run.model is not None else "model_name_or_path"
            raise ModelError(f"{what}: there is no folder {name!r}" + ("" if dry_run.model else f": {stand_in}"))
        at = config.model_copy(update={"model_name_or_path": name})
        try:
            architecture, origin = _architecture(at)
        except ModelError as error:
            raise (ModelError(f"{error}{made}: {stand_in}") if dry_run.model is None else error) from None
        check_architecture(architecture, at)
        if name == wanted and has_weights(Path(name).expanduser()):
            check_weights(name)
        line = f"config of {name}: {origin}"
        if name != wanted:
            there = "is there and not looked at" if Path(wanted).expanduser().is_dir() else "is no folder here"
            line = f"{wanted} {there}{made}: {name} stands in for it\n{line}"
        return cls(at, architecture, _tokenizer(at, architecture, origin, name != wanted, found), line)


def _architecture(config: Config) -> tuple[Any, str]:
    """The transformers config, and where it is from."""
    name = config.model_name_or_path
    try:
        found = read_architecture(config)
    except ModelError:
        known = None if Path(name).is_dir() else known_architecture(name)
        if known is None:
            raise
        return known, "built in, the Hub was not reached"
    return found, _origin(name)


def _origin(name: str) -> str:
    return "local folder" if Path(name).expanduser().is_dir() else "the Hub, or its cache"


def _tokenizer(config: Config, architecture: Any, origin: str, stands_in: bool, found: Findings) -> Any:
    """None, and a warning, where there is none because of where the dry run is, and not of what the run would load."""
    if origin.startswith("built in"):
        found.warnings.append(
            f"no tokenizer of {config.model_name_or_path}, as the Hub was not reached: lengths are unknown, and rows "
            f"are taken to be {LONGEST}"
        )
        return None
    try:
        return load_tokenizer(config, architecture)
    except ModelError as error:
        if not stands_in:
            raise
        found.warnings.append(f"{error}: lengths are unknown, and rows are taken to be {LONGEST}")
        return None


def check_weights(name: str, field: str = "model_name_or_path") -> None:
    """Raise ModelError for a local folder whose files of weights are not there, or not whole."""
    if (folder := Path(name).expanduser()).is_dir():
        check_weight_files(folder, field)


def is_missing(name: str) -> bool:
    """Whether it is the path of a folder, and there is none."""
    return looks_local(name) and not Path(name).expanduser().is_dir()


@dataclass(frozen=True)
class _Maker:
    """A recipe whose run makes a model."""

    file: Path
    start: str  # the model that it starts from


def _makers(path: str, recipe: str | None) -> Iterator[_Maker]:
    """The recipes to be run before there is a model at ``path``, the last to be run first: those beside the recipe at
    hand, and our own."""
    beside = sorted(Path(recipe).parent.glob("*.yaml")) if recipe is not None else []
    runs = [(file, config) for file in [*beside, *sorted(RECIPES.rglob("*.yaml"))] if (config := _readable(file))]
    seen: set[str] = set()
    while is_missing(path) and path not in seen:
        seen.add(path)
        maker = next((run for run in runs if Path(run[1].output_dir) in Path(path).parents), None)
        if maker is None:
            return
        path = maker[1].model_name_or_path
        yield _Maker(maker[0], path)


def _readable(file: Path) -> Config | None:
    """None: no recipe, or one that is only the base of others."""
    try:
        return load_config(["--config", str(file)])
    except ConfigError:
        return None
