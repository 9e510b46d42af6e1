"""TL;DR's own rows to token ids: what is written, what is cut, and what cannot be used."""

from __future__ import annotations

import random
from typing import get_args

import datasets
import pytest
import real_formats
import tiny
from tokenizers import processors

from hypo_train.config import Config
from hypo_train.data.errors import DataError, Unusable
from hypo_train.data.load import load_split_rows
from hypo_train.data.rows import Example, Pair, Prompt
from hypo_train.data.tldr import Post
from hypo_train.data.tokens import FORMATS, tokenize

POST = {"subreddit": "dogs", "title": "He is afraid", "post": "One.\nTwo.\n\nThree."}
PROMPT = "SUBREDDIT: r/dogs\n\nTITLE: He is afraid\n\nPOST: One.\nTwo.\n\nThree.\n\nTL;DR:"


@pytest.fixture(scope="module")
def tokenizer():
    return real_formats.pythia_tokenizer()


def options(tokenizer, **changes):
    limits = {"max_prompt_length": 512, "max_completion_length": 169, "eos_token_ids": [tokenizer.eos_token_id]}
    return {**limits, "dataset_format": "tldr", **changes}


def comparison(choice=1, texts=(" bad", " good"), **info):
    return {
        "info": {**POST, "id": "a", "site": None, "article": None, **info},
        "summaries": [{"text": text, "policy": "p", "note": None} for text in texts],
        "choice": choice,
    }


def reference(**fields):
    return {**POST, "summary": "good", **fields}


def test_every_format_has_a_name_in_the_configuration():
    assert get_args(Config.model_fields["dataset_format"].annotation) == tuple(FORMATS)


# What is written


@pytest.mark.parametrize("choice", [0, 1])
def test_a_comparison_is_a_pair_in_the_order_of_its_choice(tokenizer, choice):
    [pair], report = tokenize(Pair, [comparison(choice)], tokenizer, **options(tokenizer))
    assert tokenizer.decode(pair.prompt) == PROMPT
    texts = [" bad<|endoftext|>", " good<|endoftext|>"]
    assert [tokenizer.decode(pair.chosen), tokenizer.decode(pair.rejected)] == [texts[choice], texts[1 - choice]]
    assert (report.rows, report.used, report.shortened_prompts) == (1, 1, 0)


@pytest.mark.parametrize("summary", ["good", " good"])
def test_a_reference_follows_its_prompt_after_one_space(tokenizer, summary):
    [example], _ = tokenize(Example, [reference(summary=summary)], tokenizer, **options(tokenizer))
    assert tokenizer.decode(example.prompt) == PROMPT
    assert tokenizer.decode(example.completion) == " good<|endoftext|>"


def test_sft_on_comparisons_imitates_the_preferred_summary(tokenizer):
    [example], _ = tokenize(Example, [comparison(0)], tokenizer, **options(tokenizer))
    assert tokenizer.decode(example.completion) == " bad<|endoftext|>"


@pytest.mark.parametrize("row", [reference(), comparison(), POST], ids=["reference", "comparison", "post"])
def test_prompts_are_those_of_the_posts(tokenizer, row):
    [prompt], _ = tokenize(Prompt, [row], tokenizer, **options(tokenizer))
    assert tokenizer.decode(prompt.prompt) == PROMPT


def test_braces_in_a_post_are_text(tokenizer):
    [prompt], _ = tokenize(Prompt, [reference(post="{title} {0}", title="{post}")], tokenizer, **options(tokenizer))
    assert "TITLE: {post}\n\nPOST: {title} {0}\n\n" in tokenizer.decode(prompt.prompt)


def test_a_long_summary_is_cut_and_reported(tokenizer):
    limits = options(tokenizer, max_completion_length=4)
    [example], report = tokenize(Example, [reference(summary="zq zq zq zq zq")], tokenizer, **limits)
    assert len(example.completion) == 4
    assert example.completion[-1] == tokenizer.eos_token_id
    assert report.truncated_completions == 1


# What is cut


def cut_prompt(post, tokenizer, limit):
    """The rule, one step at a time."""
    encode = lambda: tokenizer(f"SUBREDDIT: r/x\n\nTITLE: y\n\nPOST: {post}\n\nTL;DR:")["input_ids"]  # noqa: E731
    while len(ids := encode()) > limit:
        post = post[: post.rindex("\n")] if "\n" in post else post[:-1]
    return ids


WORDS = [
    "the",
    "kitchen",
    "I",
    "don't",
    "a",
    "https://example.org/a_b?c=12345",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "😀👍🏽",
    "日本語",
]


def random_post(rng):
    def line():
        return rng.choice([" ", "  ", ""]).join(rng.choices(WORDS, k=rng.choice([0, 1, 5, 40])))

    return rng.choice(["\n", "\n\n", "\n \n", "\r\n"]).join(line() for _ in range(rng.choice([1, 2, 9])))


@pytest.mark.parametrize("seed", range(60))
def test_a_prompt_is_cut_by_the_plain_rule(tokenizer, seed):
    rng = random.Random(seed)
    post, limit = random_post(rng), rng.choice([28, 40, 100, 300])
    encode = lambda prompt: tuple(tokenizer(prompt)["input_ids"])  # noqa: E731
    expected = cut_prompt(post, tokenizer, limit)
    assert Post("x", "y", post).shorten(encode, limit) == tuple(expected)


@pytest.mark.parametrize(
    ("post", "letters", "kept"),
    [
        ("one\ntwo\nthree", 13, "one\ntwo\nthree"),
        ("one\ntwo\nthree", 12, "one\ntwo"),
        ("one\ntwo\nthree", 7, "one\ntwo"),
        ("one\ntwo\nthree", 6, "one"),
        ("one two\nthree", 5, "one t"),
        ("one\n\n\n", 5, "one\n\n"),
        ("\none", 3, ""),
    ],
)
def test_a_post_is_cut_by_lines_and_then_by_letters(post, letters, kept):
    head, tail = "SUBREDDIT: r/a\n\nTITLE: b\n\nPOST: ", "\n\nTL;DR:"
    letter_by_letter = Post("a", "b", post).shorten(tuple, len(head) + letters + len(tail))
    assert "".join(letter_by_letter) == head + kept + tail


def test_a_post_without_line_breaks_is_cut_in_few_looks(tokenizer):
    looks = 0

    def encode(prompt):
        nonlocal looks
        looks += 1
        return tuple(tokenizer(prompt)["input_ids"])

    post = " ".join(random.Random(0).choices(WORDS, k=2000))
    ids = Post("x", "y", post).shorten(encode, 512)
    assert 505 < len(ids) <= 512
    assert looks < 100  # of 20,000 letters that go


def test_the_report_counts_the_prompts_whose_post_was_cut(tokenizer):
    rows = [reference(), reference(post="One more line.\n" * 200), reference(title="Another")]
    examples, report = tokenize(Example, rows, tokenizer, **options(tokenizer))
    text = tokenizer.decode(examples[1].prompt)
    assert text.startswith("SUBREDDIT: r/dogs\n\nTITLE: He is afraid\n\nPOST: One more line.\n")
    assert text.endswith("One more line.\n\nTL;DR:")
    assert len(examples[1].prompt) <= 512
    assert (report.shortened_prompts, report.truncated_prompts) == (1, 0)
    assert "1 of 3 (33.3%) prompts with their text shortened to have max_prompt_length tokens" in report.lines()


def test_a_bos_that_the_tokenizer_adds_counts(tokenizer):
    with_bos = tiny.word_tokenizer()
    with_bos.add_special_tokens({"bos_token": "<s>"})
    with_bos.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", with_bos.bos_token_id)]
    )
    row = reference(post="a\nfilm\nand\nmeal")
    limits = options(with_bos, max_prompt_length=12)
    [prompt], _ = tokenize(Prompt, [row], with_bos, **limits)
    assert prompt.prompt[0] == with_bos.bos_token_id
    assert len(prompt.prompt) == 12
    assert with_bos.decode(prompt.prompt).split().count("<s>") == 1


# What cannot be used


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (comparison(post=None, subreddit=None, article="News."), "a news article (CNN/DM) where the post should be"),
        (comparison(post=None), "no text as 'post'"),
        (comparison(subreddit=None), "no text as 'subreddit'"),
        (comparison(title=None), "no text as 'title'"),
        (comparison(post=" \n"), "an empty 'post'"),
        (comparison(title="zq " * 600), "a prompt of more than max_prompt_length tokens without its post"),
        (comparison(texts=(" a",)), "'summaries' that are not two with a text"),
        (comparison(texts=(" a", None)), "no text as 'chosen'"),
        (comparison(texts=(" ", " b")), "an empty 'rejected'"),
        (comparison(texts=(" a", "a")), "the same tokens in 'chosen' and 'rejected'"),
        ({**comparison(), "summaries": [" a", " b"]}, "'summaries' that are not two with a text"),
        ({**comparison(), "summaries": [None, None]}, "'summaries' that are not two with a text"),
        (comparison(choice=2), "a 'choice' that is neither 0 nor 1"),
        (comparison(choice=None), "a 'choice' that is neither 0 nor 1"),
        ({**comparison(), "info": None}, "no text as 'post'"),
        ({**comparison(), "summaries": None}, "'summaries' that are not two with a text"),
    ],
)
def test_a_row_that_cannot_be_used_is_dropped_with_its_reason(tokenizer, row, reason):
    _, report = tokenize(Pair, [comparison(), row], tokenizer, **options(tokenizer))
    assert report.dropped == {reason: [1]}


def test_a_prompt_too_long_without_its_post_ends_the_loop():
    with pytest.raises(Unusable, match="without its post"):
        Post("a", "b", "c d").shorten(lambda prompt: tuple(prompt.split()), 5)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Pair, "TL;DR preferences need the columns 'info', 'summaries' and 'choice'"),
        (Example, "SFT on TL;DR needs the columns 'subreddit', 'title', 'post' and 'summary'"),
        (Prompt, "TL;DR prompts need the columns 'subreddit', 'title' and 'post'"),
    ],
)
def test_columns_of_another_format_are_named(tokenizer, kind, message):
    with pytest.raises(DataError, match=r"the columns are 'prompt', 'chosen', 'rejected'") as caught:
        tokenize(kind, tiny.pair_rows(2), tokenizer, **options(tokenizer))
    assert str(caught.value).startswith(message)


# Files as they are found


def test_the_hubs_folders_load_with_their_splits(tmp_path, tokenizer):
    folder = real_formats.write_dataset(
        tmp_path / "comparisons",
        real_formats.COMPARISONS,
        {
            "train": real_formats.comparisons(12),
            "validation": real_formats.comparisons(6, seed=5),
            "validation_cnndm": real_formats.news_comparisons(3),
        },
    )
    settings = {"model_name_or_path": "m", "dataset_name": str(folder), "dataset_format": "tldr"}
    config = Config(**settings, dataset_test_split="validation[:4]")
    ends = [tokenizer.eos_token_id]
    train, held_out, reports = load_split_rows(Pair, config, tokenizer, ends)
    assert (len(train), len(held_out)) == (12, 4)
    assert reports["train"].shortened_prompts == 1
    news = Config(**settings, dataset_test_split="validation_cnndm")
    with pytest.raises(DataError, match=r"3 of 3 rows dropped: 3 with a news article \(CNN/DM\) where the post should"):
        load_split_rows(Pair, news, tokenizer, ends)
    prompts, _, _ = load_split_rows(Prompt, config, tokenizer, ends)
    assert [row.prompt for row in prompts] == [row.prompt for row in train]


def test_references_load_from_a_folder_and_from_json_lines(tmp_path, tokenizer):
    rows = real_formats.references(12)
    folder = real_formats.write_dataset(tmp_path / "posts", real_formats.REFERENCES, {"train": rows})
    lines = tiny.write_rows(tmp_path / "train.jsonl", rows)
    found = []
    for name in (folder, lines):
        config = Config(model_name_or_path="m", algorithm="sft", dataset_name=str(name), dataset_format="tldr")
        examples, _, reports = load_split_rows(Example, config, tokenizer, [tokenizer.eos_token_id])
        found.append(examples)
        assert reports["train"].dropped == {}
    assert found[0] == found[1]
    assert len(found[0]) == 12


def test_openais_json_lines_of_comparisons_load(tmp_path, tokenizer):
    rows = [
        {name: row[name] for name in ("info", "summaries", "choice", "split")} for row in real_formats.comparisons(5)
    ]
    for row in rows:  # the files leave out what a post does not have
        row["info"] = {name: row["info"][name] for name in ("id", "post", "title", "subreddit")}
    path = tiny.write_rows(tmp_path / "batch3.json", rows)
    config = Config(model_name_or_path="m", dataset_name=str(path), dataset_format="tldr", num_eval_rows=1)
    train, held_out, _ = load_split_rows(Pair, config, tokenizer, [tokenizer.eos_token_id])
    assert (len(train), len(held_out)) == (4, 1)


def test_a_csv_of_posts_keeps_its_cells_as_text(tmp_path, tokenizer):
    path = tmp_path / "posts.csv"
    datasets.Dataset.from_list([reference(title="007", summary="NA")]).to_csv(path)
    config = Config(model_name_or_path="m", algorithm="sft", dataset_name=str(path), dataset_format="tldr")
    [example], _, _ = load_split_rows(Example, config, tokenizer, [tokenizer.eos_token_id])
    assert "TITLE: 007" in tokenizer.decode(example.prompt)
    assert tokenizer.decode(example.completion) == " NA<|endoftext|>"
