"""What the report on a data set finds, and which of it is a warning that says what to do."""

from __future__ import annotations

import json

import pytest
from data_rows import CHAT_FORMS, assistant, config_for, examples_of, make_tokenizer, pairs_of, row, user
from tiny import CHATML

from hypo_train.data.load import load_split_rows
from hypo_train.data.rows import Pair


def many(count=200, start=0):
    """Rows that nothing can be said against."""
    return [row(f"Question {i}?", f" yes {i}", f" no {i}") for i in range(start, start + count)]


@pytest.fixture(scope="module")
def plain():
    return make_tokenizer()


@pytest.fixture(scope="module")
def with_bos():
    return make_tokenizer("<s> $A")


@pytest.fixture(scope="module")
def chat():
    return make_tokenizer("<s> $A", eos_token="<|im_end|>", chat_template="<s>" + CHATML)


def warning(report):
    [line] = report.warnings()
    return line


def test_a_healthy_data_set_has_no_warning(with_bos):
    _, report = pairs_of(many(), with_bos)
    assert report.warnings() == []
    assert [line.split(" tokens: ")[0] for line in report.lines()] == [
        "200 of 200 rows used",
        "prompt",
        "chosen",
        "rejected",
    ]


def test_many_dropped_rows_are_a_warning_and_a_few_are_none(plain):
    _, report = pairs_of([*many(95), *[row(chosen=" no")] * 5], plain)
    assert report.warnings() == []
    _, report = pairs_of([*many(94), *[row(chosen=" no")] * 6], plain)
    assert warning(report) == "6 of 100 (6.0%) rows dropped: repair or leave out these rows"
    assert "6 with the same tokens in 'chosen' and 'rejected' (rows 94, 95," in report.lines()[1]


def test_rows_that_come_twice_are_named(plain):
    rows = [*many(3), *many(2)]
    _, report = pairs_of(rows, plain, first_row=100)
    assert report.repeats.rows == [103, 104]
    assert warning(report) == ("2 of 5 (40.0%) rows are equal to an earlier one (rows 103, 104): leave the copies out")


def test_a_prompt_with_several_pairs_is_a_note_and_no_warning(plain):
    _, report = pairs_of([row(chosen=f" {i} yes") for i in range(4)], plain)
    assert report.repeats.prompts == [1, 2, 3]
    assert "3 of 4 (75.0%) rows have the prompt of an earlier one" in report.lines()
    assert report.warnings() == []


def test_pairs_that_contradict_each_other_are_named(plain):
    _, report = pairs_of([row(), row(chosen=" no", rejected=" yes"), row("Q: ho")], plain)
    assert report.repeats.reversed_pairs == [1]
    assert warning(report) == (
        "1 of 3 (33.3%) pairs prefer what an earlier one with the same texts rejects (row 1): keep one of the two, "
        "or set label_smoothing"
    )


def test_examples_that_come_twice_are_named(plain):
    rows = [{"prompt": "a", "completion": text} for text in ("b", "c", "b")]
    _, report = examples_of(rows, plain)
    assert (report.repeats.rows, report.repeats.prompts) == ([2], [1, 2])


def test_prompts_on_both_sides_of_a_split_are_named(tmp_path, plain):
    rows = [*many(30), row("Question 3?", " perhaps", " never"), *many(9, start=30)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = config_for(path, num_eval_rows=10)
    _, _, reports = load_split_rows(Pair, config, plain, [plain.eos_token_id])
    assert reports["train"].warnings() == []
    assert warning(reports["eval"]) == (
        "1 of 10 (10.0%) held-out rows have the prompt of a training row (row 30): hold out rows of other prompts, or "
        "evaluations say nothing about unseen ones"
    )


@pytest.mark.parametrize(
    ("limits", "line"),
    [
        (
            {"max_prompt_length": 5},
            "3 of 3 (100.0%) prompts cut to their last max_prompt_length tokens: raise max_prompt_length (the longest "
            "has 11 tokens)",
        ),
        (
            {"max_completion_length": 6},
            "3 of 6 (50.0%) completions cut to max_completion_length tokens: raise max_completion_length (the longest "
            "has 7 tokens)",
        ),
    ],
)
def test_cut_rows_are_a_warning_with_the_length_they_need(plain, limits, line):
    _, report = pairs_of(many(3), plain, **limits)
    assert warning(report) == line


def test_the_text_of_a_bos_in_a_prompt_is_a_warning(with_bos):
    _, report = pairs_of([row("<s>Q: hi")], with_bos)
    assert warning(report).endswith("take the BOS token's text out of the data: the tokenizer writes one")


def test_an_eos_in_a_prompts_text_is_a_warning(plain):
    [pair], report = pairs_of([row("Q: hi</s>")], plain)
    assert plain.decode(pair.prompt) == "Q: hi"
    assert warning(report) == (
        "1 of 1 (100.0%) prompts ended with an EOS of their text, now removed: take the EOS token's text out of the "
        "prompts: an answer follows"
    )
    _, report = pairs_of([row()], make_tokenizer("<s> $A </s>"))
    assert report.eos_behind_prompt == 0
    _, report = pairs_of([row("<s>Q: hi</s>")], make_tokenizer("<s> $A </s>"))
    assert (report.eos_behind_prompt, report.doubled_bos) == (1, 1)


def test_the_text_of_a_bos_before_a_completion_is_a_warning(with_bos):
    _, report = pairs_of([row(chosen="<s> yes")], with_bos)
    assert (report.bos_in_completion, report.completions) == (1, 2)
    assert warning(report).startswith("1 of 2 (50.0%) completions begin with a BOS: ")


def test_a_chat_template_that_leaves_out_the_bos_is_a_warning():
    tokenizer = make_tokenizer("<s> $A", eos_token="<|im_end|>", chat_template=CHATML)
    _, report = pairs_of([CHAT_FORMS["implicit messages"]], tokenizer)
    assert warning(report) == (
        "1 of 1 (100.0%) prompts have no BOS, which the tokenizer puts before plain text: let the chat template write "
        "the bos_token"
    )


def test_completions_that_repeat_their_prompt_are_a_warning(plain):
    _, report = pairs_of([row("Tell me something", "Tell me something good", "Tell me something bad")], plain)
    assert report.begins_with_prompt == 2
    assert warning(report).startswith("2 of 2 (100.0%) completions begin with the whole text of their prompt: ")


def test_a_chat_template_that_is_applied_is_reported(chat):
    messages = row([user("hi")], [assistant("yes")], [assistant("no")])
    _, report = pairs_of([messages], chat)
    assert "chat template applied to all rows" in report.lines()
    assert report.warnings() == []
    _, report = pairs_of([messages, row()], chat)
    assert "chat template applied to 1 rows" in report.lines()


def test_a_chat_template_that_is_not_applied_is_a_warning(chat):
    _, report = pairs_of([row()], chat)
    assert warning(report).startswith("plain text, and the tokenizer has a chat template that is not applied: ")


def test_text_that_a_template_wrote_is_no_warning(chat):
    _, report = pairs_of([row("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n")], chat)
    assert report.warnings() == []
