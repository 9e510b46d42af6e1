"""Stand-ins for the models and data sets that TRL's tests load from the Hub: ``trl-internal-testing/...``.

They are folders, so tests that run beside them load them by the same names. The models have the architectures of TRL's
and random weights. One tokenizer, trained here on the data, has a chat template of the ChatML kind. The data sets are
made by the scripts in TRL's checkout that made the real ones.
"""

from __future__ import annotations

import importlib
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import Dataset, DatasetDict
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

ORGANIZATION = "trl-internal-testing"
DATASETS = {
    "zen": "generate_zen_dataset",
    "zen-image": "generate_zen_image_dataset",
    "toolcall": "generate_toolcall_dataset",
    "harmony": "generate_harmony_dataset",
}

_TEMPLATE = """\
{%- if tools %}<|im_start|>system
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}<|im_end|>
{% endif %}
{%- for message in messages %}<|im_start|>{{ message.role }}
{{ message.content or "" }}
{%- for call in message.tool_calls or [] %}{{ call | tojson }}{% endfor %}<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""

_SMALL = {
    "hidden_size": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "intermediate_size": 32,
}
_MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "Qwen2ForCausalLM-2.5": ("Qwen2", {}),
    "Cohere2ForCausalLM": ("Cohere2", {"logit_scale": 1.0, "rope_theta": 50000}),
    "Glm4MoeForCausalLM": (
        "Glm4Moe",
        {
            "moe_intermediate_size": 32,
            "head_dim": 2,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "attention_bias": True,
            "routed_scaling_factor": 2.5,
            "use_qk_norm": True,
        },
    ),
    "GptOssForCausalLM": ("GptOss", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "Qwen3MoeForCausalLM": (
        "Qwen3Moe",
        {"num_experts": 4, "num_experts_per_tok": 2, "norm_topk_prob": True, "head_dim": 128},
    ),
    "NemotronHForCausalLM-nano": (
        "NemotronH",
        {
            "hidden_size": 16,
            "layers_block_type": ["mamba", "attention", "moe"],
            "mamba_num_heads": 8,
            "mamba_head_dim": 4,
            "mamba_n_groups": 1,
            "ssm_state_size": 16,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "moe_shared_expert_intermediate_size": 32,
            "use_mamba_kernels": False,
        },
    ),
    "Olmo3ForCausalLM": ("Olmo3", {"rope_theta": 500000}),
    "Lfm2ForCausalLM": ("Lfm2", {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False}),
    "Lfm2ForCausalLM-2.5": ("Lfm2", {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False}),
}


def build(checkout: Path, folder: Path) -> None:
    """Write all stand-ins into ``folder``; a folder that has them is left as it is."""
    done = folder / "done"
    if done.exists():
        return
    shutil.rmtree(folder, ignore_errors=True)
    sys.path.insert(0, str(checkout))
    try:
        for name, script in DATASETS.items():
            _save_dataset(f"scripts.{script}", folder / ORGANIZATION / name)
        tokenizer = _new_tokenizer(_texts(folder / ORGANIZATION))
        for name, (architecture, changes) in _MODELS.items():
            _save_model(architecture, changes, tokenizer, folder / ORGANIZATION / f"tiny-{name}")
        _save_remote_model(tokenizer, folder / ORGANIZATION / "tiny-RemoteForCausalLM")
    finally:
        sys.path.remove(str(checkout))
    done.touch()


def _save_dataset(script: str, folder: Path) -> None:
    """Run a script of TRL that publishes a data set; save what it would push."""
    configs: dict[str, list[str]] = {}

    def save(splits: Any, repo_id: str, config_name: str = "default", **_: Any) -> None:
        for split, rows in (splits if isinstance(splits, dict) else {"train": splits}).items():
            file = folder / config_name / f"{split}.parquet"
            file.parent.mkdir(parents=True, exist_ok=True)
            rows.to_parquet(file)
            configs.setdefault(config_name, []).append(split)

    pushes = {kind: kind.push_to_hub for kind in (Dataset, DatasetDict)}
    try:
        for kind in pushes:
            kind.push_to_hub = save
        importlib.import_module(script).main(test_size=0.1, push_to_hub=True, repo_id="")
    finally:
        for kind, push in pushes.items():
            kind.push_to_hub = push
    lines = ["---", "configs:"]
    for name, splits in configs.items():
        lines += [f"- config_name: {name}", "  data_files:"]
        lines += [line for s in splits for line in (f"  - split: {s}", f"    path: {name}/{s}.parquet")]
    (folder / "README.md").write_text("\n".join([*lines, "---", ""]), encoding="utf-8")


def _texts(folder: Path) -> Iterator[str]:
    for file in sorted(folder.glob("zen/*/train.parquet")):
        for row in Dataset.from_parquet(str(file)):
            yield from (str(value) for value in row.values())


def _new_tokenizer(texts: Iterator[str]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=_TEMPLATE
    )


def _special_ids(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    return {
        "vocab_size": len(tokenizer),
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def _save_model(architecture: str, changes: dict[str, Any], tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    torch.manual_seed(0)
    settings = _SMALL | changes | _special_ids(tokenizer)
    if "layers_block_type" in settings:
        del settings["num_hidden_layers"]
    config = getattr(transformers, f"{architecture}Config")(**settings)
    _save(getattr(transformers, f"{architecture}ForCausalLM")(config), tokenizer, folder)


def _save_remote_model(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Save the model whose code is in its folder, as a script of TRL defines it."""
    package = "scripts.generate_tiny_models.for_causal_lm._remote_code"
    config_class: Callable[..., Any] = importlib.import_module(f"{package}.configuration_remote").RemoteConfig
    model_class: Any = importlib.import_module(f"{package}.modeling_remote").RemoteForCausalLM
    config_class.register_for_auto_class()  # type: ignore[attr-defined]
    model_class.register_for_auto_class("AutoModelForCausalLM")
    torch.manual_seed(0)
    _save(model_class(config_class(**_SMALL, **_special_ids(tokenizer))), tokenizer, folder)


def _save(model: Any, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
