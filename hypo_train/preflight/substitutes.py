"""Read the inputs of a dry run, with substitutes for a model that is not available."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from hypo_train.checkpoint.resume import date_of_run
from hypo_train.config import Config, ConfigError, load_config
from hypo_train.data.load import ROW_TYPES, check_texts
from hypo_train.data.plan import Plan, Rows
from hypo_train.data.report import DataReport
from hypo_train.data.rows import Example, Pair, Prompt
from hypo_train.dry_run import DryRun
from hypo_train.inputs import Inputs, Source, check_weights, origin
from hypo_train.model.source import check_architecture, load_tokenizer, looks_local, read_architecture
from hypo_train.model.tree_model import ModelError
from hypo_train.model.weight_files import has_weights
from hypo_train.preflight.architectures import known_architecture
from hypo_train.preflight.findings import Findings
from hypo_train.utils.rank_share import RankShare

RECIPES = Path(__file__).parents[1] / "recipes"
LONGEST = "of the maximal length"


class DryRunInputs(Inputs):
    """Inputs of a dry run. What cannot be read is replaced by a substitute or noted in ``findings``."""

    def __init__(self, config: Config, dry_run: DryRun, findings: Findings) -> None:
        super().__init__(config, RankShare(0, dry_run.num_devices), template_date=date_of_run(config))
        self._dry_run = dry_run
        self._findings = findings

    @cached_property
    def source(self) -> Source | None:
        """The model's config and tokenizer, or those of a substitute; None, with a problem, if there is neither."""
        with self._findings.collected():
            source = _source(self.config, self._dry_run, self._findings)
            self._fix_date(source.tokenizer)
            return source
        return None

    @cached_property
    def rows(self) -> tuple[Plan, dict[str, DataReport]]:
        """The rows, and a report on each split; without a tokenizer, rows of the maximal lengths."""
        if self.source is not None and self.source.tokenizer is not None:
            return super().rows
        reports = check_texts(self.config)
        counts = {split: report.used for split, report in reports.items()}
        train_rows, eval_rows = (_longest_rows(self.config, counts.get(split, 0)) for split in ("train", "eval"))
        self._findings.unchecked.append("tokens of the data, their lengths and what is cut: there is no tokenizer")
        return Plan(self.config, train_rows, eval_rows, rank_share=self.rank_share), reports


def assumed_plan(config: Config, rank_share: RankShare) -> Plan:
    """Return a plan of one step of rows of the maximal lengths, for data that cannot be read."""
    batch_size = config.per_device_train_batch_size * config.gradient_accumulation_steps * rank_share.world_size
    one_step = config.model_copy(update={"max_steps": 1})
    return Plan(one_step, _longest_rows(config, batch_size), [], rank_share=rank_share)


def _longest_rows(config: Config, count: int) -> Rows:
    prompt, completion = (0,) * config.max_prompt_length, (0,) * config.max_completion_length
    row_type = ROW_TYPES[config.spec.row_type]
    if row_type is Pair:
        return [Pair(0, prompt, completion, completion)] * count
    if row_type is Example:
        return [Example(0, prompt, completion)] * count
    return [Prompt(0, prompt)] * count


def _source(config: Config, dry_run: DryRun, findings: Findings) -> Source:
    """Return the config and tokenizer of the model, or of a substitute if the model does not exist yet.

    Raises:
        ModelError: neither has a config that can be read.
    """
    wanted = config.model_name_or_path
    advice = "--dry_run_model NAME names a model that stands in for it in a dry run"
    makers = list(_makers(wanted, dry_run.recipe))
    maker = f" ({makers[0].file} makes it)" if makers else ""
    name = dry_run.model or (makers[-1].start if makers else wanted)
    if is_missing(name):
        what = "--dry_run_model" if dry_run.model is not None else "model_name_or_path"
        raise ModelError(f"{what}: there is no folder {name!r}" + ("" if dry_run.model else f": {advice}"))
    config = config.model_copy(update={"model_name_or_path": name})
    try:
        architecture, where = _architecture(config)
    except ModelError as error:
        raise (ModelError(f"{error}{maker}: {advice}") if dry_run.model is None else error) from None
    check_architecture(architecture, config)
    if name == wanted and has_weights(Path(name).expanduser()):
        check_weights(name)
    description = f"config of {name}: {where}"
    if name != wanted:
        state = "exists but is not read" if Path(wanted).expanduser().is_dir() else "is no folder here"
        description = f"{wanted} {state}{maker}: {name} stands in for it\n{description}"
    tokenizer = _tokenizer(config, architecture, findings, is_substitute=name != wanted, is_built_in=where == _BUILT_IN)
    return Source(config, architecture, tokenizer, description, is_of_run=dry_run.model is None)


_BUILT_IN = "built in, the Hub was not reached"


def _architecture(config: Config) -> tuple[Any, str]:
    """Return the transformers config, and a description of its origin."""
    name = config.model_name_or_path
    try:
        return read_architecture(config), origin(name)
    except ModelError:
        architecture = None if Path(name).is_dir() else known_architecture(name)
        if architecture is None:
            raise
        return architecture, _BUILT_IN


def _tokenizer(config: Config, architecture: Any, findings: Findings, *, is_substitute: bool, is_built_in: bool) -> Any:
    """Return the tokenizer; None, with a warning, if a substitute has none or it is on an unreachable Hub."""
    unknown = f"lengths are unknown, and rows are assumed to be {LONGEST}"
    if is_built_in:
        name = config.model_name_or_path
        findings.warnings.append(f"no tokenizer of {name}, as the Hub was not reached: {unknown}")
        return None
    try:
        return load_tokenizer(config, architecture)
    except ModelError as error:
        if not is_substitute:
            raise
        findings.warnings.append(f"{error}: {unknown}")
        return None


def is_missing(name: str) -> bool:
    """Return whether ``name`` is the path of a folder that does not exist."""
    return looks_local(name) and not Path(name).expanduser().is_dir()


@dataclass(frozen=True)
class _Maker:
    """A recipe that trains a model which another run starts from."""

    file: Path
    start: str  # the model that the run starts from


def _makers(path: str, recipe: str | None) -> Iterator[_Maker]:
    """Yield the recipes that have to run before the model at ``path`` exists, the last one first.

    They are searched in the folder of ``recipe`` and among the recipes of this package.
    """
    neighbours = sorted(Path(recipe).parent.glob("*.yaml")) if recipe is not None else []
    runs = [(file, config) for file in [*neighbours, *sorted(RECIPES.rglob("*.yaml"))] if (config := _readable(file))]
    seen: set[str] = set()
    while is_missing(path) and path not in seen:
        seen.add(path)
        maker = next((run for run in runs if Path(run[1].output_dir) in Path(path).parents), None)
        if maker is None:
            return
        path = maker[1].model_name_or_path
        yield _Maker(maker[0], path)


def _readable(file: Path) -> Config | None:
    """Return the recipe's configuration, or None if the file is not a complete recipe."""
    try:
        return load_config(["--config", str(file)])
    except ConfigError:
        return None
