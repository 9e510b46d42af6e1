"""HyPO for users of TRL: ``HyPOTrainer`` is a ``DPOTrainer`` with this project's loss and sampler.

    from hypo_train.trl import HyPOConfig, HyPOTrainer

    trainer = HyPOTrainer("Qwen/Qwen2.5-0.5B-Instruct", args=HyPOConfig("out", kl_coef=1e-3), train_dataset=dataset)
    trainer.train()

Data sets, models, adapters, checkpoints, callbacks and loggers are TRL's. The trainer replaces the part of a step
between the batch and its loss: it samples from the live weights, computes each prompt once for its pair and samples
where the model's attention supports that, and computes loss and gradients from hidden states.

The metrics are TRL's without the four that need logits (entropy, logits/chosen, logits/rejected, mean_token_accuracy).
Three are new: ``kl``, the reverse KL of a whole sample to the reference model, ``completions/mean_length`` and
``completions/clipped_ratio``.

With ``kl_coef=0``, an option that this step does not serve, such as another loss, is served by TRL's own step, with all
of TRL's metrics (:mod:`hypo_train.trl.step_choice`).

TRL's trainers send a telemetry message to Hugging Face when they are created; this one does not.
"""

from __future__ import annotations

from packaging.version import Version

_NEEDS = "hypo_train.trl needs TRL: pip install 'trl>=1.16'"
try:
    import trl
except ImportError as error:
    raise ImportError(_NEEDS) from error
if Version(trl.__version__) < Version("1.16"):
    raise ImportError(f"{_NEEDS} (found {trl.__version__})")

from hypo_train.trl.config import HyPOConfig  # noqa: E402  # needs the trl checked above
from hypo_train.trl.trainer import HyPOTrainer  # noqa: E402

__all__ = ["HyPOConfig", "HyPOTrainer"]
