"""``HyPOConfig``: TRL's ``DPOConfig`` with the settings of HyPO."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import trl

from hypo_train.config import Config, ConfigError, checked
from hypo_train.loss_names import LOSS_NAMES, NOT_FUSED, OWN_SETTINGS, settings_of
from hypo_train.sampling.registry import AUTO
from hypo_train.trl.step_choice import check_step, options_of_trls_step

_SMOOTHED = {"exo_pair", "robust", "aot", "aot_unpaired"}  # the losses of TRL that read label_smoothing


@dataclass
class HyPOConfig(trl.DPOConfig):
    """``DPOConfig`` with the settings of HyPO.

    Raises:
        ConfigError: a value is out of range, would have no effect, or is not served together with a KL.
    """

    kl_coef: float = field(
        default=1e-4,
        metadata={"help": "Weight of the reverse KL to the reference model, a sum over completion tokens; 0 is DPO."},
    )
    num_generations: int = field(
        default=2, metadata={"help": "Samples for each prompt; each is a baseline for the others, so at least 2."}
    )
    online_fraction: float = field(
        default=1.0,
        metadata={"help": "Share of a batch's prompts that get samples, chosen at random; the KL stays unbiased."},
    )
    max_new_tokens: int = field(default=64, metadata={"help": "Maximum number of tokens of a sample, with EOS."})
    temperature: float = field(
        default=1.0,
        metadata={"help": "Temperature of policy and reference model, in sampling and in every log-prob of the loss."},
    )
    length_penalty: float = field(
        default=0.0, metadata={"help": "Added to a sample's log-ratio for each of its tokens."}
    )
    sampler: str = field(
        default=AUTO,
        metadata={"help": "Draws the samples: 'auto', 'decode', 'generate', 'vllm' or 'package.module:object'."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.label_smoothing and not _SMOOTHED.intersection(self.loss_type):
            raise ConfigError(
                f"HyPOConfig: label_smoothing={self.label_smoothing!r}: the {self.loss_type[0]} loss of TRL has none, "
                "use 0"
            )
        self.loss_settings()
        check_step(self, options_of_trls_step(self))

    def _loss_options(self) -> dict[str, Any]:
        """Return the settings of the preference loss, if the fused step computes it."""
        if NOT_FUSED.intersection(self.loss_type):
            return {}
        read = settings_of([name for name in self.loss_type if name in LOSS_NAMES])
        return {
            "loss_type": self.loss_type,
            "loss_weights": self.loss_weights,
            **{name: getattr(self, name) for name in OWN_SETTINGS if name in read and hasattr(self, name)},
        }

    def loss_settings(self) -> Config:
        """Return these settings as a ``Config`` of ``hypo_train``."""
        return checked(
            {
                "algorithm": "hypo" if self.kl_coef else "dpo",
                "model_name_or_path": "the trainer's",
                "dataset_name": "the trainer's",
                "beta": self.beta,
                **self._loss_options(),
                "kl_coef": self.kl_coef,
                "num_generations": self.num_generations,
                "online_fraction": self.online_fraction,
                "max_new_tokens": self.max_new_tokens,
                "temperature": self.temperature,
                "length_penalty": self.length_penalty,
                "sampler": self.sampler,
            }
        )
