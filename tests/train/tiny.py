"""Models of a few thousand weights, a word tokenizer and preference pairs, for every test of the training loop."""

from __future__ import annotations

import json
import random
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    GptOssConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Olmo3Config,
    OPTConfig,
    Phi3Config,
    PhiConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from hypo_train.config import Config
from hypo_train.model.policy import Policy

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PAD, EOS = 0, 1
SPECIAL = ["<pad>", "<eos>", "<unk>", "<|im_start|>", "<|im_end|>"]
NOUNS = ["film", "book", "meal", "song", "walk", "play"]
GOOD, BAD = ["good", "great", "warm", "fine"], ["bad", "awful", "cold", "dull"]
OTHER = ["tell", "me", "what", "you", "think", "about", "of", "the", "a", "was", "is", "very", "quite", "and", "it"]
ROLES = ["system", "user", "assistant"]
WORDS = [*SPECIAL, *NOUNS, *GOOD, *BAD, *OTHER, *ROLES]

# Weights are large, so that every next-token distribution is far from uniform and any wrong mask or scale shows.
_SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "initializer_range": 0.25,
    "max_position_embeddings": 128,
}
_GROUPED = {**_SMALL, "num_key_value_heads": 2}
_CONFIGS = {
    "llama": (LlamaConfig, _GROUPED),
    "mistral": (MistralConfig, _GROUPED),
    "mixtral": (MixtralConfig, {**_GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}),
    "gpt_neox": (GPTNeoXConfig, _SMALL),
    "qwen2": (Qwen2Config, _GROUPED),
    "qwen3": (Qwen3Config, {**_GROUPED, "head_dim": 8}),
    "gemma2": (Gemma2Config, {**_GROUPED, "head_dim": 8, "final_logit_softcapping": 3.0}),
    "gemma3_text": (Gemma3TextConfig, {**_GROUPED, "head_dim": 8}),
    "olmo3": (Olmo3Config, _GROUPED),
    "phi3": (Phi3Config, _GROUPED),
    "gpt_oss": (GptOssConfig, {**_GROUPED, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "cohere": (CohereConfig, {**_GROUPED, "logit_scale": 0.25}),
    "granite": (GraniteConfig, {**_GROUPED, "logits_scaling": 4.0}),
    "phi": (PhiConfig, _GROUPED),  # the head has a bias
    "gpt2": (GPT2Config, {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, "initializer_range": 0.25}),
    "opt": (
        OPTConfig,
        {
            **{name: _SMALL[name] for name in ("hidden_size", "num_hidden_layers", "num_attention_heads")},
            "word_embed_proj_dim": 32,
            "ffn_dim": 48,
            "max_position_embeddings": 128,
            "init_std": 0.25,
        },
    ),
}


def new_config(architecture, **changes):
    """The transformers config of a tiny model; ``changes`` override its settings."""
    kind, size = _CONFIGS[architecture]
    tokens = {"vocab_size": len(WORDS), "bos_token_id": None, "eos_token_id": EOS, "pad_token_id": PAD}
    return kind(**{**tokens, **size, **changes})


def new_model(architecture, *, seed=0, **changes):
    """Seeded random weights, biases included, in eval mode."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(new_config(architecture, **changes))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):  # new ones are zero, as if they were not there
                parameter.normal_(std=0.25)
    return model.eval()


def word_tokenizer(*, chat=False):
    """A token a word; ``chat`` gives it the ChatML template, whose <|im_end|> is then the EOS."""
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<pad>",
        unk_token="<unk>",
        eos_token="<|im_end|>" if chat else "<eos>",
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHATML if chat else None
    return tokenizer


def save(model, folder, *, chat=False):
    """``model`` and its tokenizer, as a checkpoint lies on a disk."""
    model.save_pretrained(folder)
    word_tokenizer(chat=chat).save_pretrained(folder)
    return Path(folder)


def pair_rows(count=24, *, chat=False, seed=0):
    """Prompts of several lengths; the kind answer is chosen, the unkind one rejected."""
    rng = random.Random(seed)
    rows = []
    for _ in range(count):
        noun, other = rng.sample(NOUNS, 2)
        prompt = rng.choice([f"tell me about the {noun}", f"what you think of the {noun} and the {other}", noun])
        degree = rng.choice(["", "very ", "quite "])
        chosen, rejected = (f"the {noun} was {degree}{rng.choice(words)}" for words in (GOOD, BAD))
        rows.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    if chat:
        return [
            {name: [{"role": "user" if name == "prompt" else "assistant", "content": row[name]}] for name in row}
            for row in rows
        ]
    return [{name: row[name] if name == "prompt" else f" {row[name]}" for name in row} for row in rows]


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def make_config(folder, model_folder, *, rows=None, **changes):
    """Three steps on ``rows`` (default: ``pair_rows()``), in fp32; everything lies in ``folder``."""
    data = write_rows(folder / "pairs.jsonl", pair_rows() if rows is None else rows)
    settings = {
        "output_dir": str(folder / "run"),
        "model_name_or_path": str(model_folder),
        "dataset_name": str(data),
        "bf16": False,
        "max_prompt_length": 16,
        "max_completion_length": 8,
        "kl_coef": 0.05,
        "learning_rate": 3e-3,
        "lr_scheduler_type": "constant",
        "max_steps": 3,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "logging_steps": 1,
        "report_to": [],
    }
    return Config(**{**settings, **changes})


@torch.no_grad()
def plain_logits(model, tokens):
    """(length, V) fp32 logits of one plain row by the model's own forward: no padding, no mask, no cache."""
    device = next(model.parameters()).device
    return model(input_ids=torch.tensor([tokens], device=device), use_cache=False).logits[0].float()


def plain_token_logprobs(model, prompt, completion):
    """(len(completion),) log-probs of a completion's tokens, from ``plain_logits``."""
    logps = plain_logits(model, [*prompt, *completion])[len(prompt) - 1 : -1].log_softmax(-1)
    return logps.gather(1, torch.tensor(list(completion), device=logps.device).unsqueeze(1)).squeeze(1)


def plain_logprob(model, prompt, completion):
    """() log-prob of a completion, summed over its tokens."""
    return plain_token_logprobs(model, prompt, completion).sum()


def perturb(parameters, *, seed=0, size=0.05):
    """Move every weight in place, far enough to change the log-probs, as an optimizer step does."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(size * torch.randn(parameter.shape, generator=generator).to(parameter))


def reward_of_length(prompt, completion):
    """A true reward that a config can name."""
    return float(len(completion.split()))


def weights(policy: Policy):
    """A copy of the trained parameters."""
    return {name: parameter.detach().clone() for name, parameter in policy.trained_parameters().items()}
