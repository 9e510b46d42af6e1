"""A folder in which the commands of README.md can run: with its paths, and a small model."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

ROOT = Path(__file__).parents[1]
MODEL = "models/SmolLM2-135M-Instruct"
DATA = "hypo_train/recipes/summaries.jsonl"
SPECIAL = ["<|endoftext|>", "<unk>", "<|im_start|>", "<|im_end|>"]
CHATML = (
    "{% for message in messages %}<|im_start|> {{ message['role'] }}\n{{ message['content'] }} <|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|> assistant\n{% endif %}"
)


def make_workplace(folder: Path) -> Path:
    """Put the package and a small model into ``folder``, under the paths that README uses."""
    (folder / "hypo_train").symlink_to(ROOT / "hypo_train")
    _save_model(folder / MODEL)
    return folder


def _save_model(folder: Path) -> None:
    """Save a Llama of 16 dimensions with the words of the data."""
    text = (ROOT / DATA).read_text(encoding="utf-8")
    words = {word for line in text.splitlines() for turn in json.loads(line).values() for word in _words(turn)}
    vocabulary = {word: i for i, word in enumerate([*SPECIAL, *sorted(words)[:2000]])}
    by_word = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    by_word.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    by_word.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=by_word, pad_token=SPECIAL[0], unk_token=SPECIAL[1], eos_token=SPECIAL[3]
    )
    tokenizer.chat_template = CHATML
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=3,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _words(turn: object) -> list[str]:
    if isinstance(turn, list):
        return [word for message in turn for word in message["content"].split()]
    return str(turn).split()
