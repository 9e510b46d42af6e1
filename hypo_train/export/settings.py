"""``python -m hypo_train export``: its flags. Nothing heavy is imported here, so that a mistake is reported at once."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import field_validator

from hypo_train.utils.errors import ConfigError
from hypo_train.utils.flags import Settings, Text, check_repository_name, help_page, parse


class ExportSettings(Settings):
    """Write the weights of a run as a folder of safetensors and JSON: a model that
    AutoModelForCausalLM.from_pretrained and vLLM load (a reward model:
    AutoModelForSequenceClassification), or, for a LoRA run, the adapter that
    PeftModel.from_pretrained loads. The folder also holds the tokenizer, the chat template, the
    generation config and a model card."""

    usage: ClassVar[str] = (
        "python -m hypo_train export RUN_OR_CHECKPOINT --output_dir FOLDER [--merge] [--dtype bfloat16]\n"
        "[--push_to_hub ORGANISATION/NAME]"
    )
    positional: ClassVar[str] = "run_or_checkpoint"
    how_to_set: ClassVar[str] = "write python -m hypo_train export RUN_OR_CHECKPOINT --output_dir FOLDER"

    run_or_checkpoint: Path
    """A run's folder (its final model, or the newest checkpoint of one that has not ended), or a checkpoint."""
    output_dir: Path
    """The folder to write; it must not exist."""
    merge: bool = False
    """Add the adapter to the weights, in fp32, and write the full model."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Dtype of the weights of a full model; none means that of the model that the run started from."""
    push_to_hub: Text | None = None
    """Also upload the folder to this repository of the Hugging Face Hub, organisation/name, with the login of
    hf auth login or HF_TOKEN."""
    hub_private_repo: bool | None = None
    """Create that repository as a private one; none means as the account's settings say."""
    trust_remote_code: bool = False
    """Run the Python code of the model that the run started from, if the run itself ran it."""

    @field_validator("push_to_hub")
    @classmethod
    def _is_a_repository(cls, value: str | None) -> str | None:
        check_repository_name(value)
        return value


def load_settings(argv: Sequence[str]) -> ExportSettings:
    """Return the settings from the arguments ``argv``. Raises ConfigError without the run, or if output_dir exists."""
    settings = parse(ExportSettings, argv)
    if not settings.run_or_checkpoint.is_dir():
        missing = str(settings.run_or_checkpoint)
        raise ConfigError(f"there is no folder {missing!r}: name a run's output_dir, or one of its checkpoints")
    if settings.output_dir.exists():
        raise ConfigError(f"output_dir={str(settings.output_dir)!r} exists already: choose a new folder")
    return settings


def help_text() -> str:
    """Return the ``--help`` page."""
    return help_page(ExportSettings)
