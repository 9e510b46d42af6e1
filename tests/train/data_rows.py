"""Rows, tokenizers and calls that several tests of the data use."""

from __future__ import annotations

from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from hypo_train.config import Config
from hypo_train.data.rows import Example, Pair
from hypo_train.data.tokens import tokenize

SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]


def make_tokenizer(
    single: str = "$A", *, eos_token: str = "</s>", chat_template: str | None = None
) -> PreTrainedTokenizerFast:
    """Bytes and four special tokens; `single` is the post-processor's pattern, as in "<s> $A </s>"."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    ids = [(token, backend.token_to_id(token)) for token in SPECIAL]
    backend.post_processor = processors.TemplateProcessing(single=single, special_tokens=ids)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token=eos_token)
    tokenizer.chat_template = chat_template
    return tokenizer


def row(prompt="Q: hi", chosen=" yes", rejected=" no"):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


CHAT_FORMS = {
    "explicit messages": {"prompt": [user("hi")], "chosen": [assistant("yes")], "rejected": [assistant("no")]},
    "implicit messages": {"chosen": [user("hi"), assistant("yes")], "rejected": [user("hi"), assistant("no")]},
    "prompt as text, repeated in the messages": {
        "prompt": "hi",
        "chosen": [user("hi"), assistant("yes")],
        "rejected": [user("hi"), assistant("no")],
    },
    "prompt as messages, repeated in the messages": {
        "prompt": [user("hi")],
        "chosen": [user("hi"), assistant("yes")],
        "rejected": [user("hi"), assistant("no")],
    },
    "prompt as text": {"prompt": "hi", "chosen": [assistant("yes")], "rejected": [assistant("no")]},
    "completions as text": {"prompt": [user("hi")], "chosen": "yes", "rejected": "no"},
}


def pairs_of(rows, tokenizer, *, max_prompt_length=100, max_completion_length=100, eos_token_ids=None, **options):
    return tokenize(
        Pair,
        rows,
        tokenizer,
        max_prompt_length=max_prompt_length,
        max_completion_length=max_completion_length,
        eos_token_ids=eos_token_ids or [tokenizer.eos_token_id],
        **options,
    )


def examples_of(rows, tokenizer, **options):
    limits = {"max_prompt_length": 100, "max_completion_length": 100, "eos_token_ids": [tokenizer.eos_token_id]}
    return tokenize(Example, rows, tokenizer, **{**limits, **options})


def config_for(path: Path | str, **fields: object) -> Config:
    return Config.model_validate({"model_name_or_path": "m", "dataset_name": str(path), **fields})
