"""Values that other trainers take for a field of the same name, and what to write here instead."""

from __future__ import annotations

from typing import Any

from hypo_train.other_trainers.advice import key

_EIGHT_BITS = "use adamw_8bit, whose state stays on the GPU"
_SHARDS = "use true or false: all weights are sharded, layer by layer"
_TRACKERS = "name the trackers: tensorboard, wandb, trackio, mlflow, or none"

VALUES: dict[str, dict[str, str]] = {
    "dtype": {
        "auto": "use float32 or bfloat16 for frozen weights (trained weights are float32), or leave it out",
        "float16": "use bfloat16, fp16 is not served",
    },
    "bf16": {
        "auto": "leave it out: CUDA computes under bfloat16",
        "full": "use true: evaluations compute as training does",
    },
    "gradient_checkpointing": {
        "offload": "use true: activations stay on the device",
        "offload_disk": "use true: activations stay on the device",
        "unsloth": "use true",
    },
    "optim": {
        "adamw": "use adamw_torch",
        "adamw_hf": "use adamw_torch",
        "adamw_apex_fused": "use adamw_torch_fused",
        "paged_adamw_32bit": "use adamw_torch, or adamw_8bit for less memory: no state is paged",
        "paged_adamw_8bit": _EIGHT_BITS,
        "paged_adamw": "use adamw_torch, or adamw_8bit for less memory: no state is paged",
        "adamw_bnb_8bit": "use adamw_8bit, which is the same optimizer",
        "adamw_torch_8bit": _EIGHT_BITS,
    },
    "fsdp": dict.fromkeys(
        (
            "full_shard auto_wrap",
            "full_shard",
            "auto_wrap",
            "shard_grad_op",
            "['full_shard', 'auto_wrap']",
            "['full_shard']",
        ),
        _SHARDS,
    ),
    "report_to": {"all": _TRACKERS, "comet_ml": _TRACKERS, "swanlab": _TRACKERS, "clearml": _TRACKERS},
    "lora_target_modules": {"all": "use all-linear"},
    "top_k": {"-1": "use 0 for all tokens"},
    "algorithm": {
        "sigmoid": "use dpo",
        "grpo": "GRPO is not served, use rloo, or hypo for pairs and samples",
        "kto": "KTO is not served, use dpo on pairs",
        "orpo": "ORPO is not served, use dpo",
        "simpo": "SimPO is not served, use dpo",
        "rm": "use reward",
        "ppo": "PPO is not served, use rloo",
    },
}
_STEPS = ("eval_steps", "save_steps", "logging_steps")


def advice_on_value(name: str, value: Any) -> str | None:
    """Return what to write in the place of a field's value that another trainer takes, or None."""
    if name in _STEPS and _is_share(value):
        return "a share of the steps is not served, use a number of steps"
    return VALUES.get(name, {}).get(key(value))


def _is_share(value: Any) -> bool:
    try:
        return 0 < float(value) < 1
    except (TypeError, ValueError, OverflowError):
        return False
