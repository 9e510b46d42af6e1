"""``python -m hypo_train judge``: whose samples are compared with what, and who judges.

Nothing heavy is imported here, so that a mistake is reported at once.
"""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hypo_train.arguments import OneLineParser
from hypo_train.config import ConfigError
from hypo_train.judges.template import Template, load_template

API_KEY_VARIABLE = "JUDGE_API_KEY"


@dataclass(frozen=True)
class ChatSettings:
    """How a chat endpoint is asked, and what that costs."""

    url: str
    model: str
    template: Template
    api_key_variable: str | None  # None: no key is sent
    temperature: float | None
    max_tokens: int | None
    workers: int
    retries: int
    timeout: float  # seconds
    prices: tuple[float, float] | None  # USD per million tokens in, out
    cache: Path


@dataclass(frozen=True)
class Settings:
    """One judging. Exactly one of ``function``, ``reward_model`` and ``chat`` is set."""

    samples: Path
    against: Path | None  # None: the reference responses
    limit: int | None  # samples; None: all
    output_dir: Path
    function: str | None
    reward_model: str | None
    batch_size: int  # of the reward model
    chat: ChatSettings | None


def load_settings(argv: Sequence[str]) -> Settings:
    """What the command line asks for. Raises ConfigError."""
    given = _parser().parse_args(argv)
    judges = [name for name in ("judge", "judge_model", "judge_url") if getattr(given, name) is not None]
    if len(judges) != 1:
        listed = " and ".join(f"--{name}" for name in judges) or "no judge"
        raise ConfigError(f"{listed} given: name one of --judge, --judge_model and --judge_url")
    if given.judge is not None and not re.fullmatch(r"[\w.]+:\w+", given.judge):
        raise ConfigError(f"judge={given.judge!r}: write it as package.module:function")
    output_dir = Path(given.output_dir or Path(given.samples).parent / "judge")
    return Settings(
        samples=Path(given.samples),
        against=None if given.against is None else Path(given.against),
        limit=given.num_comparisons,
        output_dir=output_dir,
        function=given.judge,
        reward_model=given.judge_model,
        batch_size=given.judge_batch_size,
        chat=None if given.judge_url is None else _chat(given, output_dir),
    )


def _chat(given: argparse.Namespace, output_dir: Path) -> ChatSettings:
    if not re.fullmatch(r"https?://[^/\s@?#]+(/[^\s@?#]*)?", given.judge_url):
        # Not shown: what does not belong into an address may be a key, and the address is written to disk.
        raise ConfigError("judge_url: write it as http://host:port/v1, without keys, passwords or a question mark")
    if given.judge_model_name is None:
        raise ConfigError("judge_model_name is missing: which model of the endpoint judges?")
    prices = (given.judge_price_input, given.judge_price_output)
    if (prices[0] is None) != (prices[1] is None):
        raise ConfigError("judge_price_input and judge_price_output: give both or none")
    return ChatSettings(
        url=given.judge_url,
        model=given.judge_model_name,
        template=load_template(given.judge_template),
        api_key_variable=_key_variable(given.judge_api_key_variable),
        temperature=given.judge_temperature,
        max_tokens=given.judge_max_tokens,
        workers=given.judge_workers,
        retries=given.judge_retries,
        timeout=given.judge_timeout,
        prices=None if None in prices else prices,
        cache=Path(given.judge_cache or output_dir / "answers.jsonl"),
    )


def _key_variable(name: str | None) -> str | None:
    """The environment variable that the key is read from. The key itself stays there until it is sent."""
    wanted = name or API_KEY_VARIABLE
    key = os.environ.get(wanted, "").strip()
    if not key:
        if name is not None:
            raise ConfigError(f"judge_api_key_variable={name!r}: there is no such environment variable, or it is empty")
        return None
    if not (key.isascii() and key.isprintable()):
        raise ConfigError(f"the environment variable {wanted} holds no API key: no header can carry it")
    return wanted


def _at_least(low: float, kind: Callable[[str], Any], *, none: bool = False) -> Callable[[str], Any]:
    """A type for argparse: a number from ``low`` on, or none."""

    def number(text: str) -> Any:
        if none and text.lower() in ("none", "null"):
            return None
        value = kind(text)
        if not low <= value < float("inf"):
            raise argparse.ArgumentTypeError(f"{text}: it must be at least {low:g}")
        return value

    return number


def _parser() -> OneLineParser:
    parser = OneLineParser(
        prog="python -m hypo_train judge",
        usage="python -m hypo_train judge SAMPLES.jsonl [--against OTHER.jsonl] --judge package.module:function\n"
        "       python -m hypo_train judge SAMPLES.jsonl [--against OTHER.jsonl] --judge_model PATH\n"
        "       python -m hypo_train judge SAMPLES.jsonl [--against OTHER.jsonl] --judge_url http://host:port/v1\n"
        "                                  --judge_model_name NAME [--judge_price_input USD --judge_price_output USD]",
        description="The win-rate of samples, as an evaluation writes them, against the reference responses of their\n"
        "rows or against other samples of the same rows. A tie counts one half. The exit status is 1 where\n"
        "comparisons failed; the same command tries these again.",
    )
    parser.add_argument("samples", metavar="SAMPLES.jsonl", help="lines with prompt, completion and reference")
    parser.add_argument("--against", metavar="OTHER.jsonl", help="samples of the same rows to compare with")
    parser.add_argument(
        "--num_comparisons", metavar="N", type=_at_least(1, int), help="judge the first so many (default: all)"
    )
    parser.add_argument(
        "--output_dir", metavar="FOLDER", help="folder for the verdicts (default: judge, beside the samples)"
    )

    score = parser.add_argument_group("judging by a score")
    score.add_argument(
        "--judge", metavar="MODULE:FUNCTION", help="function of the texts (prompt, completion); the higher score wins"
    )
    score.add_argument("--judge_model", metavar="PATH", help="reward model: a sequence classifier with one label")
    score.add_argument(
        "--judge_batch_size",
        metavar="N",
        type=_at_least(1, int),
        default=16,
        help="texts at once of --judge_model (default: 16)",
    )

    chat = parser.add_argument_group(
        "judging by a chat model",
        "Every comparison is asked in both orders; a verdict that changes with the order is a tie.\n"
        f"The API key is read from the environment variable {API_KEY_VARIABLE}; none is sent where it is not set.",
    )
    chat.add_argument("--judge_url", metavar="URL", help="OpenAI-compatible endpoint, without /chat/completions")
    chat.add_argument("--judge_model_name", metavar="NAME", help="the model's name at the endpoint")
    chat.add_argument(
        "--judge_template",
        metavar="FILE",
        default="tldr",
        help="the question: tldr, tldr-concise, or a text file with {prompt}, {response0}, {response1} (default: tldr)",
    )
    chat.add_argument("--judge_api_key_variable", metavar="NAME", help="another environment variable with the key")
    chat.add_argument(
        "--judge_temperature",
        metavar="T",
        type=_at_least(0, float, none=True),
        default=0.0,
        help="none sends none (default: 0)",
    )
    chat.add_argument(
        "--judge_max_tokens",
        metavar="N",
        type=_at_least(1, int, none=True),
        default=300,
        help="tokens of an answer; none sends no limit (default: 300)",
    )
    chat.add_argument(
        "--judge_workers", metavar="N", type=_at_least(1, int), default=8, help="requests at once (default: 8)"
    )
    chat.add_argument(
        "--judge_retries",
        metavar="N",
        type=_at_least(0, int),
        default=5,
        help="attempts after the first one (default: 5)",
    )
    chat.add_argument(
        "--judge_timeout",
        metavar="SECONDS",
        type=_at_least(0.1, float),
        default=60.0,
        help="seconds for an answer (default: 60)",
    )
    chat.add_argument("--judge_cache", metavar="FILE", help="answers so far (default: answers.jsonl in output_dir)")
    chat.add_argument(
        "--judge_price_input", metavar="USD", type=_at_least(0, float), help="USD per million tokens of the question"
    )
    chat.add_argument(
        "--judge_price_output", metavar="USD", type=_at_least(0, float), help="USD per million tokens of the answer"
    )
    return parser
