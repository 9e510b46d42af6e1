"""The arguments of ``python -m hypo_train judge``: samples, what to compare them with, and the judge.

Nothing heavy is imported here, so that a mistake is reported at once.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, ClassVar

from pydantic import Field, model_validator

from hypo_train.utils.errors import ConfigError
from hypo_train.utils.flags import (
    NonNegativeFloat,
    NonNegativeInt,
    PathText,
    PositiveInt,
    Settings,
    Text,
    help_page,
    parse,
)

API_KEY_VARIABLE = "JUDGE_API_KEY"


class JudgeSettings(Settings):
    """Compute the win-rate of samples (as an evaluation writes them) against the reference responses of
    their rows or against other samples of the same rows. A tie counts one half. The exit status is
    1 if comparisons failed; the same command tries them again.

    A chat model (--judge_url) judges every comparison in both orders; a verdict that changes with
    the order is a tie. Its API key is read from the environment variable JUDGE_API_KEY; if that is not
    set, no key is sent."""

    usage: ClassVar[str] = (
        "python -m hypo_train judge SAMPLES.jsonl [--against OTHER.jsonl] --judge package.module:function\n"
        "python -m hypo_train judge SAMPLES.jsonl [--against OTHER.jsonl] --judge_model PATH\n"
        "python -m hypo_train judge SAMPLES.jsonl [--against OTHER.jsonl] --judge_url http://host:port/v1\n"
        "                           --judge_model_name NAME [--judge_price_input USD --judge_price_output USD]"
    )
    positional: ClassVar[str] = "samples"
    groups: ClassVar[dict[str, str]] = {"judge": "judging by a score", "judge_url": "judging by a chat model"}
    how_to_set: ClassVar[str] = "name a file of samples first, as in python -m hypo_train judge SAMPLES.jsonl"

    samples: Path
    """JSON lines with prompt, completion and reference."""
    against: Path | None = None
    """Samples of the same rows to compare with; none means the reference responses."""
    num_comparisons: PositiveInt | None = None
    """Judge this many of the first samples; none means all."""
    output_dir: Path | None = None
    """Folder for the verdicts; none means judge, beside the samples."""

    judge: Text | None = None
    """Function of the texts (prompt, completion), as package.module:function; the higher score wins."""
    judge_model: PathText | None = None
    """Reward model: a sequence classifier with one label."""
    judge_batch_size: PositiveInt = 16
    """Texts in one batch of judge_model."""

    judge_url: Text | None = None
    """OpenAI-compatible endpoint, without /chat/completions."""
    judge_model_name: Text | None = None
    """The model's name at the endpoint."""
    judge_template: PathText = "tldr"
    """The question: tldr, tldr-concise, or a text file with {prompt}, {response0} and {response1}."""
    judge_api_key_variable: Text | None = None
    """Environment variable that holds the API key; none means JUDGE_API_KEY, if it is set."""
    judge_temperature: NonNegativeFloat | None = 0.0
    """Sampling temperature; none sends no temperature."""
    judge_max_tokens: PositiveInt | None = 300
    """Tokens of an answer; none sends no limit."""
    judge_workers: PositiveInt = 8
    """Requests at once."""
    judge_retries: NonNegativeInt = 5
    """Attempts after the first one."""
    judge_timeout: Annotated[float, Field(ge=0.1)] = 60.0
    """Seconds for an answer."""
    judge_cache: Path | None = None
    """File of the answers so far; none means answers.jsonl in output_dir."""
    judge_price_input: NonNegativeFloat | None = None
    """USD per million tokens of the question."""
    judge_price_output: NonNegativeFloat | None = None
    """USD per million tokens of the answer."""

    @model_validator(mode="after")
    def _check_together(self) -> JudgeSettings:
        judges = [f"--{name}" for name in ("judge", "judge_model", "judge_url") if getattr(self, name) is not None]
        prices = (self.judge_price_input, self.judge_price_output)
        rules = [
            (
                len(judges) != 1,
                f"{' and '.join(judges) or 'no judge'} given: name one of --judge, --judge_model and --judge_url",
            ),
            (
                self.judge is not None and not re.fullmatch(r"[\w.]+:\w+", self.judge),
                f"judge={self.judge!r}: write it as package.module:function",
            ),
            (
                # The message does not show the value, which may contain a key.
                self.judge_url is not None and not re.fullmatch(r"https?://[^/\s@?#]+(/[^\s@?#]*)?", self.judge_url),
                "judge_url: write it as http://host:port/v1, without keys, passwords or a question mark",
            ),
            (
                self.judge_url is not None and self.judge_model_name is None,
                "judge_model_name is missing: which model of the endpoint judges?",
            ),
            ((prices[0] is None) != (prices[1] is None), "judge_price_input and judge_price_output: give both or none"),
        ]
        if problems := [problem for broken, problem in rules if broken]:
            raise ValueError("\n".join(problems))
        return self

    @property
    def folder(self) -> Path:
        """Return the folder for the verdicts."""
        return self.output_dir or self.samples.parent / "judge"

    @property
    def cache(self) -> Path:
        """Return the file of the answers so far."""
        return self.judge_cache or self.folder / "answers.jsonl"

    @property
    def prices(self) -> tuple[float, float] | None:
        """Return USD per million prompt tokens and per million completion tokens, or None if not given."""
        if self.judge_price_input is None or self.judge_price_output is None:
            return None
        return self.judge_price_input, self.judge_price_output

    def api_key(self) -> str | None:
        """Return the API key from the environment. Raises ConfigError if a named variable is missing or unusable."""
        name = self.judge_api_key_variable or API_KEY_VARIABLE
        key = os.environ.get(name, "").strip()
        if not key and self.judge_api_key_variable is not None:
            raise ConfigError(f"judge_api_key_variable={name!r}: there is no such environment variable, or it is empty")
        if not (key.isascii() and key.isprintable()):
            raise ConfigError(f"the environment variable {name} is not an API key: an HTTP header cannot hold it")
        return key or None


def load_settings(argv: Sequence[str]) -> JudgeSettings:
    """Return the settings from the arguments ``argv``. Raises ConfigError."""
    return parse(JudgeSettings, argv)


def help_text() -> str:
    """Return the ``--help`` page."""
    return help_page(JudgeSettings)
