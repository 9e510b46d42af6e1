"""The inputs of a run without weights: the model's config, the tokenizer, the rows and the reward function."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from hypo_train.config import Config
from hypo_train.data.plan import Plan, load_plan
from hypo_train.data.report import DataReport
from hypo_train.data.template_date import fix_date, today, writes_date
from hypo_train.model.source import check_source, eos_token_ids, generation_config, load_tokenizer, read_architecture
from hypo_train.model.weight_files import check_weight_files
from hypo_train.rewards import RewardFunction, load_function
from hypo_train.utils.rank_share import SINGLE_PROCESS, RankShare


@dataclass(frozen=True)
class Source:
    """The model's transformers config and its tokenizer."""

    config: Config  # in a dry run, it may name a substitute model
    architecture: Any
    tokenizer: Any  # None in a dry run without a readable tokenizer
    description: str  # lines for the overview that is printed at the start
    is_of_run: bool = True  # False if a dry run uses a substitute

    @cached_property
    def eos_token_ids(self) -> tuple[int, ...]:
        """All tokens that end a completion."""
        return eos_token_ids(generation_config(self.config), self.tokenizer)


class Inputs:
    """Load the inputs of a run. Each is loaded once, on first use."""

    def __init__(
        self, config: Config, rank_share: RankShare = SINGLE_PROCESS, *, template_date: str | None = None
    ) -> None:
        """Args:
        config: its ``template_date`` is set when a tokenizer was loaded whose chat template writes the date.
        template_date: the day the run began; None means today.
        """
        self.config = config
        self.rank_share = rank_share
        self._template_date = template_date

    @cached_property
    def reward_function(self) -> RewardFunction | None:
        """The function that the setting ``reward`` names. Raises ConfigError if it cannot be imported."""
        return None if self.config.reward is None else load_function(self.config.reward)

    @cached_property
    def source(self) -> Source | None:
        """The model's config and tokenizer, None only in a dry run. Raises ModelError if they cannot be read."""
        name = self.config.model_name_or_path
        check_source(name)
        check_weights(name)
        architecture = read_architecture(self.config)
        tokenizer = load_tokenizer(self.config, architecture)
        self._fix_date(tokenizer)
        return Source(self.config, architecture, tokenizer, f"config of {name}: {origin(name)}")

    def _fix_date(self, tokenizer: Any) -> None:
        """Give the run a date if the chat template writes one, and none is configured."""
        if self.config.template_date is None and writes_date(tokenizer):
            day = self._template_date or today()
            fix_date(tokenizer, day)
            self.config = self.config.model_copy(update={"template_date": day})

    @cached_property
    def rows(self) -> tuple[Plan, dict[str, DataReport]]:
        """The plan (rows and steps), and a report on each split. Raises DataError if the rows cannot be read."""
        assert self.source is not None
        return load_plan(self.config, self.source.tokenizer, self.source.eos_token_ids, self.rank_share)

    @property
    def plan(self) -> Plan:
        return self.rows[0]

    @property
    def data_report(self) -> dict[str, list[str]]:
        """Lines about the rows of each split: numbers of used and cut rows, and lengths."""
        return {split: report.lines() + self._on_date(report) for split, report in self.rows[1].items()}

    def _on_date(self, report: DataReport) -> list[str]:
        assert self.source is not None
        if not (report.rendered and writes_date(self.source.tokenizer)):
            return []
        return [f"the chat template writes the date: this run uses {self.config.template_date} (template_date)"]


def check_weights(name: str, field: str = "model_name_or_path") -> None:
    """Raise ModelError if ``name`` is a local folder whose weight files are missing or incomplete."""
    if (folder := Path(name).expanduser()).is_dir():
        check_weight_files(folder, field)


def origin(name: str) -> str:
    """Return a text that says where the model ``name`` is read from."""
    return "local folder" if Path(name).expanduser().is_dir() else "the Hub, or its cache"
