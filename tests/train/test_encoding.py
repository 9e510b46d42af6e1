"""Prompt and completion together are the tokens of the whole text, for every kind of tokenizer."""

from __future__ import annotations

import copy
import random
from unicodedata import normalize

import pytest
from data_rows import assistant, examples_of, pairs_of, row, user
from tiny import CHATML
from tokenizer_families import BOS, EOS, FAMILIES, LOSSLESS, LOSSY, PREPENDING, family
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hypo_train.data.encoding import CONTEXT, Encoder
from hypo_train.data.errors import DataError
from hypo_train.data.rows import Prompt
from hypo_train.data.tokens import tokenize

# Words, halves of words, white space of every kind, accents that compose, bytes, digits.
PIECES = [
    *("a", "the", " the", "ing", "think", " I think that", "soup", "So", "don't", "'s", "é", "e\u0301", "\u0301"),
    *("日本", "語", "🙂", "\ufb01", "12", "345", " ", " ", "  ", "\t", "\n", "\n\n", " \n", ".", ":", "?", "\nAnswer:"),
    "x" * 30,
]
TOKENS = [EOS, BOS, "<|user|>", "<unk>", "<left>", "<right>", "<|im_", "end|>"]


def draw_rows(draw: random.Random, count: int, pieces: list[str]) -> list[tuple[str, list[str]]]:
    """Prompts with two completions; half of the prompts are longer than what is tokenized again for a completion."""

    def text(most: int) -> str:
        return "".join(draw.choices(pieces, k=draw.randrange(1, most)))

    return [(text(draw.choice([4, 3 * CONTEXT // 4])), [text(6), text(6)]) for _ in range(count)]


def check_row(tokenizer, texts, found) -> None:
    """Compare with the tokens of the whole texts, or where a prompt ends inside a token with their text."""
    prompt, completions = texts

    def ids(text):
        return tokenizer(text, add_special_tokens=False).input_ids

    def decode(tokens):
        return normalize("NFC", tokenizer.decode(tokens, clean_up_tokenization_spaces=False))

    assert found.prompt == ids(prompt)
    num_split = num_altered = 0
    for completion, rest in zip(completions, found.completions, strict=True):
        both, text = found.prompt + rest, prompt + completion
        whole = ids(text)
        if whole[: len(found.prompt)] == found.prompt:
            assert both == whole, texts
        else:
            num_split += 1
            num_altered += decode(both) not in {decode(whole), normalize("NFC", text)}
    assert (found.num_split, found.num_altered) == (num_split, num_altered), texts


def check_family(name: str, count: int) -> None:
    tokenizer, draw = family(name), random.Random(name)
    rows = draw_rows(draw, count, PIECES + TOKENS)
    for texts, found in zip(rows, Encoder(tokenizer).encode(rows), strict=True):
        check_row(tokenizer, texts, found)
    rows = draw_rows(draw, count, PIECES + (TOKENS if name in LOSSLESS else []))
    if name in LOSSY:
        return
    for (prompt, completions), found in zip(rows, Encoder(tokenizer).encode(rows), strict=True):
        for completion, rest in zip(completions, found.completions, strict=True):
            text = tokenizer.decode(found.prompt + rest)
            assert text.lstrip(" ") == (prompt + completion).lstrip(" ")
            assert name in PREPENDING or text == prompt + completion


@pytest.mark.parametrize("name", FAMILIES)
def test_prompt_and_completion_are_the_whole_text(name):
    check_family(name, 40)


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_thousands_of_rows_are_the_whole_text(name):
    check_family(name, 1000)


@pytest.mark.parametrize("name", FAMILIES)
def test_rows_of_every_kind_share_prompt_and_special_tokens(name):
    tokenizer, draw = family(name), random.Random(name)
    limits = {"max_prompt_length": 500, "max_completion_length": 100, "eos_token_ids": [tokenizer.eos_token_id]}
    words = ["soup", " I think", " the", "\n", "Question:", " ", " it's", "12", " good."]
    rows = [row(f"{prompt}?", f"a{one}", f"b{two}") for prompt, (one, two) in draw_rows(draw, 20, words)]
    pairs, _ = pairs_of(rows, tokenizer, max_prompt_length=500)
    examples, _ = examples_of(rows, tokenizer, **limits)
    prompts, _ = tokenize(Prompt, [{"prompt": row["prompt"]} for row in rows], tokenizer, **limits)
    prompt_of = {prompt.row: prompt.prompt for prompt in prompts}
    completion_of = {example.row: example.completion for example in examples}
    special = [ids for ids in tokenizer("a").input_ids if ids not in tokenizer("a", add_special_tokens=False).input_ids]
    bos = [token for token in special if token != tokenizer.eos_token_id]
    for pair in pairs:
        assert pair.prompt == prompt_of[pair.row]
        assert pair.chosen == completion_of[pair.row]
        assert [token for token in pair.prompt if token in tokenizer.all_special_ids[:2] + bos] == bos
        assert [pair.chosen.count(tokenizer.eos_token_id), pair.chosen[-1]] == [1, tokenizer.eos_token_id]


@pytest.mark.parametrize("name", ["byte level", "metaspace of a normalizer", "metaspace first", "unigram, bytes"])
def test_a_chat_has_the_tokens_of_the_templates_text(name):
    tokenizer = copy.copy(family(name))
    tokenizer.chat_template = "<s>" + CHATML
    rows = [row([user("What is tea?")], [assistant(" It is good.")], [assistant("soup\n")]) for _ in range(3)]
    pairs, report = pairs_of(rows, tokenizer)
    assert report.inside_token == 0
    for pair in pairs:
        for part, ids in (("chosen", pair.chosen), ("rejected", pair.rejected)):
            text = tokenizer.apply_chat_template([*rows[0]["prompt"], *rows[0][part]], tokenize=False)
            whole = tokenizer(text, add_special_tokens=False).input_ids
            end = len(whole) - whole[::-1].index(tokenizer.convert_tokens_to_ids("<|im_end|>"))
            assert [*pair.prompt, *ids] == whole[:end]


def test_a_metaspace_tokenizer_puts_no_space_before_an_answer():
    tokenizer = family("metaspace of a normalizer")
    pair = pairs_of([row("Question: tea\n", "It is good.", "No.")], tokenizer)[0][0]
    assert tokenizer.decode(pair.prompt + pair.chosen) == "<s> Question: tea\nIt is good.</s>"
    assert tokenizer.convert_ids_to_tokens(pair.chosen[:2]) != ["▁It", "▁is"]


@pytest.mark.parametrize("name", ["byte level", *PREPENDING])
def test_a_prompt_that_ends_in_a_space_is_counted_and_named(name):
    tokenizer = family(name)
    [pair], report = pairs_of([row("Answer: ", "I think so", "I think not")], tokenizer)
    assert tokenizer.decode([*pair.prompt, *pair.chosen], skip_special_tokens=True).strip() == "Answer: I think so"
    assert (report.inside_token, report.not_as_text) == (2, 0)
    assert [line for line in report.warnings() if "inside a token" in line] == [
        "2 of 2 (100.0%) completions begin inside a token of their row's text: end the prompts where a token ends: a "
        "space belongs to the beginning of the completions; of chats, take a generation prompt that ends as the "
        "template's answers begin (chat_template_kwargs)"
    ]


def test_a_template_written_as_text_may_end_in_a_space():
    tokenizer = family("metaspace of a normalizer")
    rows = [row("<s> [INST] What is tea? [/INST] ", "I think that it is good.", "I think not.")]
    [pair], report = pairs_of(rows, tokenizer)
    assert tokenizer.decode([*pair.prompt, *pair.chosen]).endswith("[/INST] I think that it is good.</s>")
    assert (report.inside_token, report.not_as_text, report.doubled_bos) == (2, 0, 1)


def test_a_generation_prompt_may_end_inside_a_line_break_token():
    """As of Qwen3.5: the prompt ends in one line break, of the two that are a single token in an answer."""
    tokenizer = copy.copy(family("byte level, no words"))
    block = "<|user|>\n\n<|user|>\n\n"
    opens = "{% if enable_thinking is defined and not enable_thinking %}" + block + "{% else %}<|user|>\n{% endif %}"
    answer = "{% if m.role == 'assistant' %}" + block + "{% endif %}{{ m.content }}<|im_end|>"
    start = "{% if add_generation_prompt %}<|im_start|>" + opens + "{% endif %}"
    tokenizer.chat_template = "{% for m in messages %}<|im_start|>" + answer + "{% endfor %}" + start
    chat = row([user("tea?")], [assistant("good")], [assistant("bad")])
    [pair], report = pairs_of([chat], tokenizer)
    assert tokenizer.decode([*pair.prompt, *pair.chosen]).endswith(f"<|im_start|>{block}good<|im_end|>")
    assert report.inside_token == 2
    [pair], report = pairs_of([{**chat, "chat_template_kwargs": {"enable_thinking": False}}], tokenizer)
    assert tokenizer.decode(pair.prompt).endswith(block)
    assert report.inside_token == 0


def test_completions_that_disagree_on_a_token_share_the_prompt():
    tokenizer = family("byte level, no words")
    encoder = Encoder(tokenizer)
    [found] = encoder.encode([("I th", ["ink that it is", "\n"])])
    assert found.num_split == 1  # "think" is one token, "th" and a line break are two
    assert found.prompt == encoder.ids(["I th"])[0]
    assert [tokenizer.decode(found.prompt + ids) for ids in found.completions] == ["I think that it is", "I th\n"]


def test_words_that_no_tokens_can_join_are_named():
    _, report = pairs_of([row("what is", "soup?", "tea?")], family("words"))
    assert report.not_as_text == 2
    assert any(line.startswith("2 of 2 (100.0%) completions have tokens that do not") for line in report.warnings())


def test_unknown_characters_are_counted():
    _, report = pairs_of([row("what is tea?", " the zebra", " bread?")], family("words"))
    assert report.unknown == 1
    assert any("characters that the tokenizer does not know" in line for line in report.warnings())


def test_ids_with_gaps_are_compared_with_the_largest_id():
    """As tokenizers made from tiktoken's files have them: the special tokens are far behind the others."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({**{letter: i for i, letter in enumerate(letters)}, EOS: 600}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.add_special_tokens([AddedToken(EOS, special=True, normalized=False)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=EOS)
    assert (len(tokenizer), tokenizer.eos_token_id) == (257, 600)
    [pair], _ = pairs_of([row()], tokenizer)
    assert pair.chosen[-1] == 600
    with pytest.raises(DataError, match="EOS id 300 is not among the tokenizer's 257 ids, up to 600"):
        pairs_of([row()], tokenizer, eos_token_ids=[300])
