"""A prompt ends where an answer begins, and an answer ends with its turn, in chat and in text."""

from __future__ import annotations

import pytest
from data_rows import assistant, examples_of, make_tokenizer, pairs_of, row, user
from tiny import CHATML

from hypo_train.data.errors import DataError
from hypo_train.data.rows import Prompt
from hypo_train.data.tokens import tokenize
from hypo_train.model.source import eos_token_ids

# As of the models distilled from DeepSeek-R1: only the generation prompt opens a thinking block.
THINKING = (
    "{% for m in messages %}{% if m['role'] == 'user' %}<user>{{ m['content'] }}{% endif %}"
    "{% if m['role'] == 'assistant' %}<assistant>{{ m['content'].split('</think>')[-1] }}</s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant><think>\n{% endif %}"
)


@pytest.fixture(scope="module")
def plain():
    return make_tokenizer("<s> $A")


@pytest.fixture(scope="module")
def chat():
    return make_tokenizer("<s> $A", eos_token="<|im_end|>", chat_template=CHATML)


@pytest.fixture(scope="module")
def thinking():
    return make_tokenizer(chat_template=THINKING)


def decoded(pair, tokenizer):
    return tuple(
        tokenizer.decode(ids).removeprefix("<s>").removesuffix("</s>")
        for ids in (pair.prompt, pair.chosen, pair.rejected)
    )


def only_reason(report):
    [(reason, _)] = report.dropped.items()
    return reason


# Dialogues in text

HUMAN, ANSWER = "\n\nHuman:", "\n\nAssistant:"
START = f"{HUMAN} hi{ANSWER}"


@pytest.mark.parametrize(
    ("chosen", "rejected", "expected"),
    [
        # The answers begin with the same words.
        (f"{START} I do like it", f"{START} I do not", (START, " I do like it", " I do not")),
        # One is the beginning of the other.
        (f"{START} Yes.", f"{START} Yes. No.", (START, " Yes.", " Yes. No.")),
        # The last answer that both have in common begins the prompt's last turn.
        (
            f"{START} Hello.{HUMAN} 1+1?{ANSWER} 2",
            f"{START} Hello.{HUMAN} 1+1?{ANSWER} 3",
            (f"{START} Hello.{HUMAN} 1+1?{ANSWER}", " 2", " 3"),
        ),
        # They part early and go on: the next turn of the human is no answer.
        (
            f"{START} I see{HUMAN} what?{ANSWER} it",
            f"{START} I saw{HUMAN} whom?{ANSWER} her",
            (START, " I see", " I saw"),
        ),
        ("### Instruction:\nhi\n\n### Response:\nyes", "### Instruction:\nhi\n\n### Response:\nyeah",
         ("### Instruction:\nhi\n\n### Response:\n", "yes", "yeah")),
        ("Q: hi\nA: yes", "Q: hi\nA: yeah\nQ: more?\nA: no", ("Q: hi\nA:", " yes", " yeah")),
        ("USER: hi ASSISTANT: yes", "USER: hi ASSISTANT: yeah USER: so?", ("USER: hi ASSISTANT:", " yes", " yeah")),
        ("[INST] hi [/INST] yes", "[INST] hi [/INST] yeah[INST] more", ("[INST] hi [/INST]", " yes", " yeah")),
    ],
)  # fmt: skip
def test_a_dialogue_is_cut_at_the_marks_of_its_turns(plain, chosen, rejected, expected):
    [pair], _ = pairs_of([{"chosen": chosen, "rejected": rejected}], plain)
    assert decoded(pair, plain) == expected
    [example], _ = examples_of([{"chosen": chosen, "rejected": rejected}], plain)
    assert (example.prompt, example.completion) == (pair.prompt, pair.chosen)


def test_turns_behind_an_answer_are_cut_and_counted(plain):
    text = row(START, f" yes{HUMAN} why?{ANSWER} so", " no")
    [pair], report = pairs_of([text], plain)
    assert decoded(pair, plain) == (START, " yes", " no")
    assert report.cut_turns == 1
    assert [line for line in report.warnings() if "go on" in line] == [
        "1 of 1 (100.0%) rows whose conversations go on after the answers that differ: the first answer is trained on: "
        "end both dialogues with the answers to compare, if later turns matter"
    ]
    [example], report = examples_of([{"prompt": START, "completion": text["chosen"]}], plain)
    assert plain.decode(example.completion) == " yes</s>"
    assert report.cut_turns == 1


def test_turns_that_both_answers_share_belong_to_the_prompt(plain):
    same = f" Hello.{HUMAN} 1+1?{ANSWER}"
    [pair], report = pairs_of([row(START, f"{same} 2", f"{same} 3")], plain)
    assert decoded(pair, plain) == (START + same, " 2", " 3")
    assert report.cut_turns == 0


def test_dialogues_that_part_in_a_human_turn_are_dropped(plain):
    good = {"chosen": f"{START} a", "rejected": f"{START} b"}
    bad = [
        {"chosen": f"{START} Hello.{HUMAN} one?{ANSWER} a", "rejected": f"{START} Hello.{HUMAN} two?{ANSWER} b"},
        {"chosen": f"{HUMAN} one?{ANSWER} a", "rejected": f"{HUMAN} only two?{ANSWER} b"},
    ]
    _, report = pairs_of([good, *bad], plain)
    assert report.dropped == {"dialogues that part in a human turn: no answers to the same prompt": [1, 2]}


def test_a_mark_inside_an_explicit_answer_moves_no_boundary(plain):
    same = "Think.\nAnswer: "
    [pair], _ = pairs_of([row("Question: 1+1?\n", f"{same}2", f"{same}3")], plain)
    assert decoded(pair, plain) == ("Question: 1+1?\n", f"{same}2", f"{same}3")


def test_a_common_beginning_that_ends_in_a_sentence_is_a_warning(plain):
    rows = [{"chosen": "Tell me. I think that it is", "rejected": "Tell me. I think that it was"}]
    _, report = pairs_of(rows, plain)
    assert [line for line in report.warnings() if "sentence" in line] == [
        "1 of 1 (100.0%) prompts, the common beginning of 'chosen' and 'rejected', end in the middle of a sentence: "
        "write the prompts in a column 'prompt', if the answers begin earlier"
    ]
    _, report = pairs_of([{"chosen": "Tell me. Yes", "rejected": "Tell me. No"}], plain)
    assert report.prompts_in_sentence == 0


# Conversations


@pytest.mark.parametrize("eos", ["<|im_end|>", "</s>"])
def test_a_users_turn_is_never_trained_on(eos):
    tokenizer = make_tokenizer(eos_token=eos, chat_template=CHATML)
    rows = [
        {
            "chosen": [user("hi"), assistant("yes"), user("Why?"), assistant("a")],
            "rejected": [user("hi"), assistant("no"), user("Why not?"), assistant("b")],
        }
    ]
    [pair], report = pairs_of(rows, tokenizer)
    assert [tokenizer.decode(ids) for ids in (pair.chosen, pair.rejected)] == ["yes<|im_end|>", "no<|im_end|>"]
    assert (report.cut_turns, report.cut_at_eos) == (1, 0)


def test_messages_that_all_answers_share_belong_to_the_prompt(chat):
    same = [assistant("hello"), user("1+1?")]
    rows = [row([user("hi")], [*same, assistant("2")], [*same, assistant("3")])]
    [pair], report = pairs_of(rows, chat)
    expected = chat.apply_chat_template([user("hi"), *same], tokenize=False, add_generation_prompt=True)
    assert chat.decode(pair.prompt) == expected
    assert [chat.decode(ids) for ids in (pair.chosen, pair.rejected)] == ["2<|im_end|>", "3<|im_end|>"]
    assert report.cut_turns == 0


@pytest.mark.parametrize(
    ("end", "expected"),
    [
        ("<|im_end|>\n", "yes<|im_end|>"),
        ("\n\n", "yes\n\n</s>"),
        ("</s>\n", "yes</s>"),
        ("<|im_end|></s>", "yes<|im_end|></s>"),
    ],
)
def test_what_the_template_writes_behind_an_answer_ends_it(end, expected):
    tokenizer = make_tokenizer(chat_template=CHATML.replace("<|im_end|>\n", end))
    [pair], report = pairs_of([row([user("hi")], [assistant("yes")], [assistant("no")])], tokenizer)
    assert tokenizer.decode(pair.chosen) == expected
    is_other = expected == "yes<|im_end|>"
    assert report.turn_end == ("<|im_end|>" if is_other else None)
    assert any("completions end with '<|im_end|>'" in line for line in report.lines()) == is_other
    ends = tokenizer.convert_ids_to_tokens(eos_token_ids(None, tokenizer))  # samples end there too
    assert ends == ["</s>", *["<|im_end|>"] * is_other]


def test_text_rows_get_the_eos_and_not_the_end_of_a_turn():
    tokenizer = make_tokenizer(chat_template=CHATML)
    [pair], _ = pairs_of([row()], tokenizer, eos_token_ids=eos_token_ids(None, tokenizer))
    assert tokenizer.decode(pair.chosen) == " yes</s>"


# Templates that write a prompt differently if an answer follows


def test_a_thinking_block_of_the_generation_prompt_is_left_out(thinking):
    pairs, report = pairs_of([row([user("hi")], [assistant("<b>")], [assistant("no")])], thinking)
    assert decoded(pairs[0], thinking) == ("<user>hi<assistant>", "<b>", "no")
    assert report.shortened_generation_prompts == 1
    assert any(line.startswith("1 of 1 (100.0%) prompts end before what the chat") for line in report.warnings())


def test_prompts_that_are_sampled_from_are_those_of_the_pairs(thinking):
    rows = [row([user("hi")], [assistant("yes")], [assistant("no")])]
    limits = {"max_prompt_length": 99, "max_completion_length": 99, "eos_token_ids": [thinking.eos_token_id]}
    [prompt], _ = tokenize(Prompt, rows, thinking, **limits)
    [pair], _ = pairs_of(rows, thinking)
    assert prompt.prompt == pair.prompt


@pytest.mark.parametrize("answer", [assistant("<think>hm</think>yes"), {**assistant("yes"), "reasoning_content": "hm"}])
def test_lost_thoughts_of_an_answer_drop_its_row(thinking, answer):
    rows = [row(), row([user("hi")], [answer], [assistant("no")])]
    _, report = pairs_of(rows, thinking)
    assert only_reason(report).startswith("an answer that the chat template does not write as it is (a thinking block")


def test_two_ways_to_write_a_prompt_are_shown_where_they_part():
    template = CHATML.replace("{% if add_gen", "{% if add_generation_prompt %}!{% endif %}{% if add_gen")
    tokenizer = make_tokenizer(eos_token="<|im_end|>", chat_template=template)
    with pytest.raises(
        DataError, match=r"if an answer follows \('.*!<\|im_start\|>.*' against '.*<\|im.*'\.\.\.\): use"
    ):
        pairs_of([row([user("hi")], [assistant("yes")], [assistant("no")])], tokenizer)


def test_a_message_that_the_template_leaves_out_is_a_warning():
    template = CHATML.replace(
        "{% for message in messages %}", "{% for message in messages if message.role != 'system' %}"
    )
    tokenizer = make_tokenizer(eos_token="<|im_end|>", chat_template=template)
    system = {"role": "system", "content": "Be kind."}
    _, report = pairs_of([row([system, user("hi")], [assistant("yes")], [assistant("no")])], tokenizer)
    assert report.unwritten_messages == 1
    assert any("a message that the chat template does not write" in line for line in report.warnings())


# Prompts that end with the beginning of the answer


@pytest.mark.parametrize("repeated", [False, True])
def test_a_prompt_that_begins_the_answer_is_left_open(chat, repeated):
    prompt = [user("hi"), assistant("Sure, it")]
    answers = ("Sure, it is.", "Sure, it was.") if repeated else (" is.", " was.")
    chosen, rejected = ([*prompt[:repeated], assistant(answer)] for answer in answers)
    [pair], report = pairs_of([row(prompt, chosen, rejected)], chat)
    assert chat.decode(pair.prompt) == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nSure, it"
    assert [chat.decode(ids) for ids in (pair.chosen, pair.rejected)] == [" is.<|im_end|>", " was.<|im_end|>"]
    assert report.open_prompts == 1
    limits = {"max_prompt_length": 99, "max_completion_length": 99, "eos_token_ids": [chat.eos_token_id]}
    [alone], _ = tokenize(Prompt, [{"prompt": prompt}], chat, **limits)
    assert alone.prompt == pair.prompt


def test_an_empty_message_for_the_answer_is_a_place_for_it(chat):
    [pair], report = pairs_of([row([user("hi"), assistant("")], [assistant("yes")], [assistant("no")])], chat)
    assert chat.decode(pair.prompt).endswith("<|im_end|>\n<|im_start|>assistant\n")
    assert report.open_prompts == 0
