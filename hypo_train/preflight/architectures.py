"""Built-in copies of the config.json of some models: those that the paper fine-tunes, and larger ones.

A dry run uses them if it cannot reach the Hub. Training never uses them.
"""

from __future__ import annotations

from typing import Any

from transformers import GPTNeoXConfig, LlamaConfig, PretrainedConfig

_PYTHIA: dict[str, Any] = {
    "architectures": ["GPTNeoXForCausalLM"],
    "vocab_size": 50304,
    "max_position_embeddings": 2048,
    "rotary_pct": 0.25,
    "use_parallel_residual": True,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 0,
}

_LLAMA_3: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 128256,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128009],
}
_8B = {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "intermediate_size": 14336}
_70B = {"hidden_size": 8192, "num_hidden_layers": 80, "num_attention_heads": 64, "intermediate_size": 28672}
_31: dict[str, Any] = {
    "max_position_embeddings": 131072,
    "eos_token_id": [128001, 128008, 128009],
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}

_KNOWN: dict[str, tuple[type[PretrainedConfig], dict[str, Any]]] = {
    "EleutherAI/pythia-1.4b-deduped": (
        GPTNeoXConfig,
        {
            **_PYTHIA,
            "hidden_size": 2048,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "intermediate_size": 8192,
        },
    ),
    "EleutherAI/pythia-2.8b-deduped": (
        GPTNeoXConfig,
        {
            **_PYTHIA,
            "hidden_size": 2560,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "intermediate_size": 10240,
        },
    ),
    "meta-llama/Meta-Llama-3-8B-Instruct": (LlamaConfig, {**_LLAMA_3, **_8B}),
    "meta-llama/Llama-3.1-8B-Instruct": (LlamaConfig, {**_LLAMA_3, **_8B, **_31}),
    "meta-llama/Llama-3.1-70B-Instruct": (LlamaConfig, {**_LLAMA_3, **_70B, **_31}),
}


def known_architecture(name: str) -> PretrainedConfig | None:
    """Return the transformers config of the Hub model ``name``, or None if it is not built in."""
    if name not in _KNOWN:
        return None
    kind, settings = _KNOWN[name]
    return kind(**settings)
