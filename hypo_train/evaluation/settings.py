"""The arguments of ``python -m hypo_train evaluate``: the model, its reference and the rows.

Nothing heavy is imported here, so that a mistake is reported at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from hypo_train.config import Config, load_config, require_trust, require_usable
from hypo_train.loss_names import OWN_SETTINGS
from hypo_train.utils.errors import ConfigError
from hypo_train.utils.flags import (
    PathText,
    PositiveFloat,
    Settings,
    flag_lines,
    flag_name,
    help_page,
    parse,
    shown,
    split_argv,
)

# The fields of a run that an evaluation may change; all others affect only training.
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
    "column_mapping",
    "dataset_train_split",
    "dataset_test_split",
    "num_eval_rows",
    "max_prompt_length",
    "max_completion_length",
    "beta",
    "loss_type",
    "loss_weights",
    *OWN_SETTINGS,
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
# flag -> (the field that contradicts it, the value of that field if only the flag is given)
_INSTEAD = {
    "dataset_test_split": ("num_eval_rows", "0"),
    "num_eval_rows": ("dataset_test_split", "none"),
    "reward": ("reward_model_path", "none"),
    "reward_model_path": ("reward", "none"),
}


class EvaluateFlags(Settings):
    """Evaluate the final model of the run in the folder RUN, or any model: the reverse KL to its
    reference on samples, the samples' reward, lengths and texts, and loss and accuracy on the held-out
    rows."""

    usage: ClassVar[str] = (
        "python -m hypo_train evaluate RUN [--field value ...]\n"
        "python -m hypo_train evaluate --model_name_or_path MODEL [--reference_model_path MODEL]\n"
        "                              --dataset_name DATA --dataset_test_split SPLIT --output_dir FOLDER"
    )

    output_dir: Path | None = None
    """Folder for metrics.json and the samples; none means RUN/evaluation."""
    reference_model_path: PathText | None = None
    """Model to measure the KL against; none means the model that the run started from (SFT has none)."""
    kl_temperature: PositiveFloat | None = None
    """Temperature of both log-probs in the KL; none means that of the samples."""
    kl_mask: Literal["eos", "all"] = "eos"
    """Positions of a sample that the KL sums over: those up to its EOS, or all max_new_tokens, for which sampling
    continues after the EOS."""


@dataclass(frozen=True)
class EvaluateSettings:
    """One evaluation."""

    config: Config  # of the run with the flags applied; for a model without a run, the defaults with the flags
    model_dir: Path  # the weights to evaluate
    reference: str | None  # a Hub name or folder; None: no reverse KL
    training_temperature: float  # temperature of the rows' log-probs, as in training
    kl_temperature: float
    kl_mask: Literal["eos", "all"]
    output_dir: Path

    def warnings(self) -> list[str]:
        """Return one line for each allowed setting that changes the meaning of the KL."""
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
        """Return whether the reference is the model that the run started from."""
        return self.reference is None or self.reference == self.config.model_name_or_path


def load_settings(argv: Sequence[str]) -> EvaluateSettings:
    """Return the settings from the arguments ``argv``.

    Raises:
        ConfigError: the run does not exist or is not finished, a flag belongs to training, or output_dir is in use.
    """
    names_run = bool(argv) and not argv[0].startswith("-")
    run = Path(require_usable(argv[0], shown(argv[0]))) if names_run else None
    argv = argv[names_run:]
    chosen, fields = split_argv(argv, EvaluateFlags)
    given = _check_fields(fields)
    flags = parse(EvaluateFlags, chosen)
    if run is None:
        config = _config_of_model(fields, given, has_reference=flags.reference_model_path is not None)
        training_temperature, start = 1.0, None
        model_dir, output_dir = Path(config.model_name_or_path), flags.output_dir
    else:
        training_temperature, config = _config_of_run(run, fields, given)
        start = config.model_name_or_path if config.has_reference else None
        model_dir, output_dir = run / "final", flags.output_dir or run / "evaluation"
    if output_dir is None:
        raise ConfigError("output_dir is missing: a model without a run needs --output_dir")
    if config.spec.trains_reward_model and flags.reference_model_path is not None:
        raise ConfigError("reference_model_path: a reward model has no reference, leave it out")
    if (output_dir / "metrics.json").exists():
        raise ConfigError(f"output_dir={str(output_dir)!r} already holds an evaluation: choose another --output_dir")
    return EvaluateSettings(
        config=config,
        model_dir=model_dir,
        reference=flags.reference_model_path or start,
        training_temperature=training_temperature,
        kl_temperature=flags.kl_temperature or config.temperature,
        kl_mask=flags.kl_mask,
        output_dir=output_dir,
    )


def help_text() -> str:
    """Return the ``--help`` page."""
    title = "fields, which override the run's config.yaml (a model without a run has these defaults):"
    return help_page(EvaluateFlags, "", title, *flag_lines(Config, FIELDS))


def _check_fields(argv: Sequence[str]) -> set[str]:
    """Return the fields that ``argv`` sets. Raises ConfigError for a field that an evaluation does not have."""
    names = {flag_name(token) for token in argv if token.startswith("--")}
    if refused := sorted((names & set(Config.model_fields)) - set(FIELDS)):
        listed = ", ".join(f"--{name}" for name in refused)
        raise ConfigError(f"{listed}: about training, which is over (evaluate --help lists what can be given)")
    return names


def _config_of_run(run: Path, argv: Sequence[str], given: set[str]) -> tuple[float, Config]:
    """Return the temperature that the run was trained with, and its configuration with the flags applied."""
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
    return saved.temperature, load_config(["--config", str(recipe), *argv, *instead])


def _config_of_model(argv: Sequence[str], given: set[str], *, has_reference: bool) -> Config:
    """Return the configuration of a model that is not from a run of this project."""
    if "model_name_or_path" not in given:
        raise ConfigError("nothing to evaluate: name a run's folder first, or a model with --model_name_or_path")
    return load_config([*argv, "--algorithm", "dpo" if has_reference else "sft"])
