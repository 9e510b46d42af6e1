"""``python -m hypo_train evaluate``: what is evaluated, against what and on which rows.

Nothing heavy is imported here, so that a mistake is reported at once.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from hypo_train.arguments import OneLineParser
from hypo_train.config import Config, ConfigError, field_help, load_config, require_trust

# The fields of a run that an evaluation can have otherwise; all others are about training.
FIELDS = (
    "model_name_or_path",
    "trust_remote_code",
    "attn_implementation",
    "dtype",
    "bf16",
    "impl",
    "max_chunk_bytes",
    "dataset_name",
    "dataset_config",
    "dataset_format",
    "dataset_train_split",
    "dataset_test_split",
    "num_eval_rows",
    "max_prompt_length",
    "max_completion_length",
    "beta",
    "label_smoothing",
    "reward",
    "reward_model_path",
    "missing_eos_penalty",
    "sampler",
    "temperature",
    "top_k",
    "top_p",
    "max_new_tokens",
    "num_eval_prompts",
    "num_eval_samples",
    "per_device_eval_batch_size",
)
# A flag for one of two takes the place of what the run has for the other.
_INSTEAD = {
    "dataset_test_split": ("num_eval_rows", "0"),
    "num_eval_rows": ("dataset_test_split", "none"),
    "reward": ("reward_model_path", "none"),
    "reward_model_path": ("reward", "none"),
}


@dataclass(frozen=True)
class Settings:
    """One evaluation."""

    config: Config  # the run's, flags applied; a model alone has one of its own
    model_dir: Path  # the weights to evaluate
    reference: str | None  # a Hub name or folder; None: no reverse KL
    training_temperature: float  # of the log-probs of the rows, as in training
    kl_temperature: float
    kl_mask: Literal["eos", "all"]
    output_dir: Path

    def warnings(self) -> list[str]:
        """Settings that are allowed, and make the KL another thing than it seems; one line each."""
        c = self.config
        lines: list[str] = []
        if self.reference is None:
            return lines
        if self.kl_temperature != c.temperature:
            lines.append(
                f"kl_temperature={self.kl_temperature:g} on samples at temperature={c.temperature:g}: the mean "
                "log-ratio of these samples, which is no KL"
            )
        if (c.top_k, c.top_p) != (0, 1.0):
            lines.append(f"top_k={c.top_k}, top_p={c.top_p:g}: samples are truncated, so the KL is biased (use 0, 1)")
        return lines

    @property
    def reference_is_start(self) -> bool:
        """Whether the reference is the model that the run started from."""
        return self.reference is None or self.reference == self.config.model_name_or_path


def load_settings(argv: Sequence[str]) -> Settings:
    """What the command line asks for.

    Raises:
        ConfigError: no such run or an unfinished one, flags that training alone has, a used output_dir.
    """
    run, flags = (argv[0], argv[1:]) if argv and not argv[0].startswith("-") else (None, argv)
    own, rest = _parser().parse_known_args(flags)
    given = _field_names(rest)
    if run is None:
        config, start = _config_of_model(rest, given, has_reference=own.reference_model_path is not None), None
        model_dir, output_dir = Path(config.model_name_or_path).expanduser(), own.output_dir
        if output_dir is None:
            raise ConfigError("output_dir is missing: a model without a run needs --output_dir")
        trained_with = 1.0
    else:
        trained_with, config = _config_of_run(Path(run), rest, given)
        start = config.model_name_or_path if config.has_reference else None
        model_dir, output_dir = Path(run) / "final", own.output_dir or Path(run) / "evaluation"
    if config.spec.trains_reward_model and own.reference_model_path is not None:
        raise ConfigError("reference_model_path: a reward model has no reference, leave it out")
    output_dir = Path(output_dir)
    if (output_dir / "metrics.json").exists():
        raise ConfigError(f"output_dir={str(output_dir)!r} already holds an evaluation: choose another --output_dir")
    return Settings(
        config=config,
        model_dir=model_dir,
        reference=own.reference_model_path or start,
        training_temperature=trained_with,
        kl_temperature=config.temperature if own.kl_temperature is None else own.kl_temperature,
        kl_mask=own.kl_mask,
        output_dir=output_dir,
    )


def _field_names(flags: Sequence[str]) -> set[str]:
    """The fields that the flags set. Raises ConfigError for one that an evaluation does not have."""
    names = {flag[2:].partition("=")[0].replace("-", "_") for flag in flags if flag.startswith("--")}
    if refused := sorted((names & set(Config.model_fields)) - set(FIELDS)):
        listed = ", ".join(f"--{name}" for name in refused)
        raise ConfigError(f"{listed}: about training, which is over (evaluate --help lists what can be given)")
    return names


def _config_of_run(run: Path, flags: Sequence[str], given: set[str]) -> tuple[float, Config]:
    """The temperature that the run was trained with, and its configuration with the flags applied."""
    recipe = run / "config.yaml"
    if not recipe.is_file():
        raise ConfigError(
            f"{str(run)!r} is no run: it has no config.yaml (a model alone is evaluated with --model_name_or_path)"
        )
    if not (run / "final").is_dir():
        raise ConfigError(f"{str(run)!r} has no final model: let the run end first (resume_from_checkpoint: auto)")
    saved = load_config(["--config", str(recipe)])
    require_trust(saved, given="trust_remote_code" in given, where=run)
    if "dataset_name" in given and not given & {"dataset_test_split", "num_eval_rows"}:
        raise ConfigError(
            "--dataset_name without its rows to evaluate on: name a split with --dataset_test_split (a single file is "
            'the split "train")'
        )
    instead = [
        token
        for name, (other, value) in _INSTEAD.items()
        if name in given and other not in given
        for token in (f"--{other}", value)
    ]
    return saved.temperature, load_config(["--config", str(recipe), *flags, *instead])


def _config_of_model(flags: Sequence[str], given: set[str], *, has_reference: bool) -> Config:
    """Of a model that no run of ours made."""
    if "model_name_or_path" not in given:
        raise ConfigError("nothing to evaluate: name a run's folder first, or a model with --model_name_or_path")
    return load_config([*flags, "--algorithm", "dpo" if has_reference else "sft"])


def _parser() -> OneLineParser:
    parser = OneLineParser(
        prog="python -m hypo_train evaluate",
        usage="python -m hypo_train evaluate RUN [--field value ...]\n"
        "       python -m hypo_train evaluate --model_name_or_path MODEL [--reference_model_path MODEL]\n"
        "                                     --dataset_name DATA --dataset_test_split SPLIT --output_dir FOLDER",
        description="Evaluate the final model of the run in the folder RUN, or any model: the reverse KL to its\n"
        "reference on samples, their reward, lengths and texts, and what the held-out rows say of it.",
        epilog=_fields_help(),
    )
    parser.add_argument(
        "--output_dir", metavar="FOLDER", help="folder for metrics.json and the samples (default: RUN/evaluation)"
    )
    parser.add_argument(
        "--reference_model_path",
        metavar="MODEL",
        help="model to measure the KL against (default: the one that the run started from; SFT has none)",
    )
    parser.add_argument(
        "--kl_temperature",
        metavar="T",
        type=temperature,
        help="temperature of both log-probs in the KL (default: that of the samples)",
    )
    parser.add_argument(
        "--kl_mask",
        choices=("eos", "all"),
        default="eos",
        help="which positions of a sample count in the KL: those up to its EOS, or all max_new_tokens of one drawn on "
        "past its EOS (default: eos)",
    )
    return parser


def _fields_help() -> str:
    lines = ["fields, which override the run's config.yaml (a model without a run has these defaults):"]
    for name in FIELDS:
        lines += field_help(name)
    return "\n".join(lines)


def temperature(text: str) -> float:
    """argparse names this function in its messages."""
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is no temperature: it must be above 0")
    return value
