"""Tiny random models of many architectures are trained exactly, or refused in one line."""

from __future__ import annotations

import policies
import pytest
import tiny
import torch
import transformers
from short_runs import slow_unless
from transformers import AutoModelForCausalLM

from hypo_train.model.source import check_architecture, read_architecture
from hypo_train.model.tree_model import ModelError
from hypo_train.preflight.tiny_model import look_at_structure

_SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "initializer_range": 0.25,
    "max_position_embeddings": 128,
}
_GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}
_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
_QWEN_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8}
_MAMBA = {"state_size": 4}
_DEEPSEEK = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
}
_JAMBA = {"attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False, "mamba_d_state": 4}
_QWEN_NEXT = {
    **_QWEN_EXPERTS,
    "shared_expert_intermediate_size": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
}

# The config's name in transformers, and what its sizes are called where the name is another.
EXACT = {
    "GPT2": _GPT,
    "GPTNeoX": {},
    "GPTJ": {**_GPT, "rotary_dim": 4},
    "GPTBigCode": _GPT,
    "CodeGen": {**_GPT, "rotary_dim": 4},
    "OPT": {"word_embed_proj_dim": 16, "ffn_dim": 48, "init_std": 0.25},  # projections behind the layers
    "Bloom": {"n_layer": 2, "n_head": 4},  # ALiBi
    "Falcon": {"alibi": True},
    "Mpt": {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 128},
    "StableLm": {},  # attention of its own, under a common name
    "Nemotron": {},
    "Persimmon": {},
    "Starcoder2": {},
    "Phi": {},
    "Gemma": {"head_dim": 8},
    "Cohere2": {},
    "Granite": {},
    "Glm4": {"head_dim": 8},
    "SmolLM3": {},
    "Apertus": {},
    "Bart": {"d_model": 32, "encoder_layers": 1, "decoder_layers": 2},  # its decoder alone
    "XGLM": {"d_model": 32, "num_layers": 2, "attention_heads": 4, "ffn_dim": 48},
    "OpenAIGPT": _GPT,
    "RecurrentGemma": {"lru_width": 32, "head_dim": 8},  # a softcap with another name
    "Mamba": _MAMBA,
    "Rwkv": {"attention_hidden_size": 32},
    "Jamba": {**_EXPERTS, **_JAMBA, "num_experts": 4},
    "Lfm2": {"layer_types": ["conv", "full_attention"]},
    "Mixtral": _EXPERTS,
    "Phimoe": {**_EXPERTS, "router_jitter_noise": 0.01},
    "Qwen3Moe": _QWEN_EXPERTS,
    "Qwen3Next": _QWEN_NEXT,
    "DeepseekV3": _DEEPSEEK,
    "GptOss": {**_EXPERTS, "head_dim": 8},
    # get_decoder returns the whole model.
    "Llama4Text": {
        **_EXPERTS,
        "head_dim": 8,
        "intermediate_size_mlp": 48,
        "attention_chunk_size": 4,
    },
    "Doge": {},  # attention learns biases, which are zero at first
}
REFUSED = {
    "Bert": ({"is_decoder": True}, "BertLMHeadModel computes its logits in a way the kernels do not serve"),
    # Its head is called decoder, and layers stand before it.
    "ModernBertDecoder": ({"bos_token_id": 2}, "ModernBertDecoderForCausalLM computes its logits in a way the kernels"),
    "T5": ({"d_model": 32, "d_kv": 8, "num_layers": 2}, "is a t5 model .* not a causal language model"),
}


def saved(name, changes, folder):
    """Save a tiny random model of the architecture, and return its folder."""
    tokens = {"vocab_size": len(tiny.WORDS), "bos_token_id": None, "eos_token_id": tiny.EOS, "pad_token_id": tiny.PAD}
    config = getattr(transformers, f"{name}Config")(**{**tokens, **_SIZES, **changes})
    kind = transformers.AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    if name == "Bart":
        kind = AutoModelForCausalLM
    torch.manual_seed(0)
    return tiny.save(kind.from_config(config).eval(), folder)


def loaded(folder):
    """Load a policy as a run does, after the checks that need no weights."""
    config = policies.model_config(folder)
    architecture = read_architecture(config)
    check_architecture(architecture, config)
    structure = look_at_structure(config, architecture)
    policy = policies.policy_of(folder)
    assert structure.shares_prompts in (policy.shares_prompts, None)
    return policy


@pytest.mark.parametrize("name", slow_unless({"Llama4Text", "Doge", "OPT"}, EXACT))
def test_log_probs_and_gradients_are_those_of_plain_rows(name, tmp_path):
    folder = saved(name, EXACT[name], tmp_path)
    policy = loaded(folder).train()
    # Separate rows have transformers' default, which is not always equal to eager attention (Falcon's ALiBi).
    attention = "eager" if policy.shares_prompts else policy.base.config._attn_implementation
    own = AutoModelForCausalLM.from_pretrained(folder, attn_implementation=attention)
    tree = policies.tree(shares_prompts=policy.shares_prompts)
    found, expected = policy(tree, policies.logprobs()), policies.own_logprobs(own.eval())
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)
    for logps in (found, expected):
        logps.square().mean().backward()
    largest = max(p.grad.abs().max() for p in own.parameters() if p.grad is not None)
    for (part, ours), theirs in zip(policy.model.named_parameters(), own.parameters(), strict=True):
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in (ours, theirs)]
        torch.testing.assert_close(*gradients, rtol=1e-3, atol=float(1e-5 * largest), msg=part)


@pytest.mark.parametrize("name", slow_unless({"Bert"}, REFUSED))
def test_what_is_not_served_is_refused_in_one_line(name, tmp_path):
    changes, message = REFUSED[name]
    with pytest.raises(ModelError, match=message) as refusal:
        loaded(saved(name, changes, tmp_path))
    assert "\n" not in str(refusal.value)
