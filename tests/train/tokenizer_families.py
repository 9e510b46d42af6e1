"""Small tokenizers of the kinds that models have, trained on a few sentences."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

BOS, EOS, UNKNOWN, USER = "<s>", "</s>", "<unk>", "<|user|>"
SPECIAL = [BOS, EOS, UNKNOWN, USER, "<|im_start|>", "<|im_end|>"]
CORPUS = [
    f"{start} {topic}? {answer} {topic}, and it's good.\nQuestion: what is {topic}\nAnswer: don't ask the cat."
    for topic in ("soup", "bread", "rain", "trains", "tea", "日本語", "café")
    for start in ("Can you tell me about", "What do you think of")
    for answer in ("I think that it is", "Sure, here is a line on", "12 345\tand:\n\n- \n\nno  more")
]
BYTES = [f"<0x{i:02X}>" for i in range(256)]


def fast(backend: Tokenizer, single: str = "$A") -> PreTrainedTokenizerFast:
    """The tokenizer of transformers; ``single`` is the post-processor's pattern, as in "<s> $A </s>"."""
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    ids = [(token, backend.token_to_id(token)) for token in SPECIAL]
    backend.post_processor = processors.TemplateProcessing(single=single, special_tokens=ids)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNKNOWN,
        clean_up_tokenization_spaces=False,
    )


def byte_level(*steps: Any, prefix_space: bool = False, regex: bool = True, normalizer: Any = None) -> Tokenizer:
    backend = Tokenizer(models.BPE())
    if normalizer is not None:
        backend.normalizer = normalizer
    last = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space, use_regex=regex)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*steps, last])
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet, show_progress=False)
    )
    return backend


def metaspace_bpe(scheme: str, *, split: bool = True) -> Tokenizer:
    """Bytes for unknown characters, a metaspace for a space; ``scheme``: where one is put before a text."""
    backend = Tokenizer(models.BPE(unk_token=UNKNOWN, byte_fallback=True, fuse_unk=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=split)
    back = decoders.Metaspace(prepend_scheme=scheme)
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), back])
    special = [UNKNOWN, *BYTES]
    backend.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=700, special_tokens=special, show_progress=False)
    )
    return without_special_bytes(backend)


def llama_2() -> Tokenizer:
    """A normalizer puts a metaspace before each text; merges were learned in words, but nothing splits texts now."""
    backend = metaspace_bpe("never")
    backend.pre_tokenizer = None  # type: ignore[assignment]
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)
    return backend


def without_special_bytes(backend: Tokenizer) -> Tokenizer:
    """The tokens of bytes are in the vocabulary, and their names in a text are no bytes."""
    state = json.loads(backend.to_str())
    state["added_tokens"] = []
    return Tokenizer.from_str(json.dumps(state))


def unigram(*, byte_fallback: bool = False) -> Tokenizer:
    backend = Tokenizer(models.Unigram())
    backend.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")])
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    special = [UNKNOWN, *BYTES] if byte_fallback else [UNKNOWN]
    trainer = trainers.UnigramTrainer(vocab_size=700, special_tokens=special, unk_token=UNKNOWN, show_progress=False)
    backend.train_from_iterator(CORPUS, trainer)
    if not byte_fallback:
        return backend
    state = json.loads(without_special_bytes(backend).to_str())
    state["model"]["byte_fallback"] = True
    return Tokenizer.from_str(json.dumps(state))


def word_piece() -> Tokenizer:
    backend = Tokenizer(models.WordPiece(unk_token=UNKNOWN))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece(cleanup=False)
    letters = [chr(i) for i in range(33, 127)]
    trainer = trainers.WordPieceTrainer(
        vocab_size=500, special_tokens=[UNKNOWN], initial_alphabet=letters, show_progress=False
    )
    backend.train_from_iterator([*CORPUS, "".join(letters).lower()], trainer)  # every letter inside a word too
    return backend


def characters() -> Tokenizer:
    vocabulary = {letter: i for i, letter in enumerate(sorted(set("".join(CORPUS))))}
    backend = Tokenizer(models.WordLevel({**vocabulary, UNKNOWN: len(vocabulary)}, unk_token=UNKNOWN))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    backend.decoder = decoders.Fuse()
    return backend


def words() -> Tokenizer:
    found = sorted({word for text in CORPUS for word in text.split()})
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate([UNKNOWN, *found])}, unk_token=UNKNOWN))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return backend


def with_added_tokens(backend: Tokenizer) -> Tokenizer:
    """Added tokens that take the white space beside them, or are no part of a longer word."""
    backend.add_tokens(
        [
            AddedToken("<left>", lstrip=True, normalized=False),
            AddedToken("<right>", rstrip=True, normalized=False),
            AddedToken("soup", single_word=True),
        ]
    )
    return backend


# The tokens of these decode to the text that they were made of.
LOSSLESS: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "byte level": lambda: fast(byte_level()),
    "byte level, no words": lambda: fast(byte_level(regex=False)),
    "byte level, BOS": lambda: fast(byte_level(), f"{BOS} $A"),
    "byte level, EOS": lambda: fast(byte_level(), f"$A {EOS}"),
    "byte level, groups of digits": lambda: fast(byte_level(pre_tokenizers.Split(Regex(r"\p{N}{1,3}"), "isolated"))),
    "metaspace never": lambda: fast(metaspace_bpe("never"), f"{BOS} $A"),
    "metaspace never, no words": lambda: fast(metaspace_bpe("never", split=False), f"{BOS} $A {EOS}"),
}
# These put a space before the text, and some of them one behind each special token.
PREPENDING: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "byte level, prefix space": lambda: fast(byte_level(prefix_space=True)),
    "metaspace of a normalizer": lambda: fast(llama_2(), f"{BOS} $A"),
    "metaspace always": lambda: fast(metaspace_bpe("always"), f"{BOS} $A"),
    "metaspace first": lambda: fast(metaspace_bpe("first"), f"{BOS} $A"),
}
# These lower the case, compose accents, lose white space or do not know all characters.
LOSSY: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "byte level, NFC": lambda: fast(byte_level(normalizer=normalizers.NFC())),
    "byte level, added tokens": lambda: fast(with_added_tokens(byte_level())),
    "unigram": lambda: fast(unigram(), f"$A {EOS}"),
    "unigram, bytes": lambda: fast(unigram(byte_fallback=True), f"{BOS} $A"),
    "word pieces": lambda: fast(word_piece(), f"{USER} $A {EOS}"),
    "characters": lambda: fast(characters()),
    "words": lambda: fast(words()),
}
FAMILIES = {**LOSSLESS, **PREPENDING, **LOSSY}


@cache
def family(name: str) -> PreTrainedTokenizerFast:
    """The tokenizer of this name; it is trained once."""
    return FAMILIES[name]()
