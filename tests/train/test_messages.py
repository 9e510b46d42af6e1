"""Chat messages in the forms that data sets store them in, and what else a chat template writes: tools and calls."""

from __future__ import annotations

import json

import datasets
import numpy
import pytest
from data_rows import CHAT_FORMS, assistant, examples_of, make_tokenizer, pairs_of, row, user
from tiny import CHATML

from hypo_train.data.rows import Prompt
from hypo_train.data.tokens import tokenize

# ChatML that knows tools: a list of them in front, and the calls of a message behind its text.
WITH_TOOLS = (
    "{% if tools %}<tools>{{ tools | tojson }}</tools>{% endif %}{% if shout %}!{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['content'] is not none %}{{ m['content'] }}{% endif %}"
    "{% for call in m.tool_calls or [] %}{% set f = call.function %}"
    "<call>{{ f.name }} {{ f.arguments | tojson }}</call>{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def chat():
    return make_tokenizer("<s> $A", eos_token="<|im_end|>", chat_template="<s>" + CHATML)


@pytest.fixture(scope="module")
def with_tools():
    return make_tokenizer("<s> $A", eos_token="<|im_end|>", chat_template="<s>" + WITH_TOOLS)


def parted(text):
    return {"role": "user", "content": [{"type": "text", "text": text[:1]}, {"type": "text", "text": text[1:]}]}


def of_lists(*messages):
    return {key: [message[key] for message in messages] for key in ("role", "content")}


EXPECTED = CHAT_FORMS["explicit messages"]
FORMS = {
    "one message": {"prompt": user("hi"), "chosen": assistant("yes"), "rejected": assistant("no")},
    "dictionary of lists": {"prompt": of_lists(user("hi")), "chosen": [assistant("yes")], "rejected": "no"},
    "conversations of lists": {
        "chosen": of_lists(user("hi"), assistant("yes")),
        "rejected": of_lists(user("hi"), assistant("no")),
    },
    "sharegpt's ranking": {
        "conversations": [{"from": "human", "value": "hi"}],
        "chosen": {"from": "gpt", "value": "yes"},
        "rejected": {"from": "gpt", "value": "no"},
    },
    "sharegpt's dialogues": {
        "chosen": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yes"}],
        "rejected": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "no"}],
    },
    "messages beside answers": {"messages": [user("hi")], "chosen": assistant("yes"), "rejected": "no"},
    "text of JSON": {key: json.dumps(value) for key, value in EXPECTED.items()},
    "text of Python": {key: str(value) for key, value in EXPECTED.items()},
    "text of one message": {"prompt": "hi", "chosen": str(assistant("yes")), "rejected": json.dumps(assistant("no"))},
    "text of sharegpt": {**EXPECTED, "prompt": json.dumps([{"from": "human", "value": "hi"}])},
    "content in parts": {**EXPECTED, "prompt": [parted("hi")]},
    "keys without a value": {**EXPECTED, "prompt": [user("hi") | {"from": None, "value": None, "tool_calls": None}]},
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_messages_gives_the_same_ids(chat, form):
    [expected], _ = pairs_of([EXPECTED], chat)
    [pair], _ = pairs_of([FORMS[form]], chat)
    assert pair == expected


def test_numpys_text_of_messages_is_read_or_named(chat):
    long = "y" * 80  # NumPy breaks its lines between messages of this length, and else writes them on one
    answers = {"chosen": long, "rejected": long[1:]}
    texts = {part: str(numpy.array([user("hi"), assistant(answer)])) for part, answer in answers.items()}
    pairs, _ = pairs_of([texts], chat)
    assert chat.decode(pairs[0].chosen) == f"{long}<|im_end|>"
    short = {**EXPECTED, "chosen": str(numpy.array([user("hi"), assistant("yes")]))}
    _, report = pairs_of([EXPECTED, short], chat)
    [reason] = report.dropped
    assert reason.startswith("a 'chosen' that is the text of messages, but neither JSON nor Python: save the data as")


@pytest.mark.parametrize(
    "text", ["[1, 2]", "[citation needed] yes", '{"answer": 4}', "[{'a': 1}]", "['role', 'content']", "{role: user}"]
)
def test_text_in_brackets_that_is_no_message_stays_text(chat, text):
    [pair], _ = pairs_of([row(chosen=text)], chat)
    assert chat.decode(pair.chosen) == f"{text}<|im_end|>"


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ([{"role": "user", "content": [{"type": "image_url", "text": None}]}], "has 'image_url' in it, but only text"),
        ([{"role": "user", "content": [{"type": "text", "text": None}]}], "with a message in parts without text"),
        ({"role": ["user", "assistant"], "content": ["a"]}, "a dictionary of lists, but not of equally long ones"),
        ([{"from": "narrator", "value": "a"}], "with a message from 'narrator', but should be one of assistant, bot"),
        ([{"role": "user", "content": None}], "with a message without a 'role' and a 'content' text"),
        ("[{'role': 'user', 'content': broken", "the text of messages, but neither JSON nor Python"),
        (
            [{"role": "assistant", "content": None, "tool_calls": [{"function": {"name": None}}]}],
            "with a tool call without a function's name",
        ),
        (
            [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{a"}}]}],
            "with a tool call whose arguments are not JSON",
        ),
        ([{"role": "assistant", "tool_calls": {"name": "f"}}], "with 'tool_calls' that are not a list"),
        ([{"from": "function_call", "value": "f(1)"}], "with a tool call that is not JSON"),
    ],
)
def test_messages_that_cannot_be_used_are_dropped_by_name(chat, bad, reason):
    _, report = pairs_of([EXPECTED, {**EXPECTED, "prompt": bad}], chat)
    [(found, rows)] = report.dropped.items()
    assert reason in found
    assert rows == [1]


# Supervised fine-tuning on conversations


@pytest.mark.parametrize("column", ["messages", "conversations"])
def test_sft_imitates_the_last_answer_of_a_conversation(chat, column):
    turns = [{"role": "system", "content": "Be kind."}, user("hi"), assistant("hello"), user("1+1?"), assistant("2")]
    [example], report = examples_of([{column: turns}], chat)
    prompt = chat.apply_chat_template(turns[:-1], tokenize=False, add_generation_prompt=True)
    assert chat.decode(example.prompt) == prompt
    assert chat.decode(example.completion) == "2<|im_end|>"
    assert report.earlier_answers == 1


def test_sft_reads_sharegpt_turns(chat):
    turns = [{"from": "system", "value": "Be kind."}, {"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo"}]
    [example], _ = examples_of([{"conversations": turns, "source": "x"}], chat)
    assert "system\nBe kind." in chat.decode(example.prompt)
    assert chat.decode(example.completion) == "yo<|im_end|>"


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([user("hi")], "a 'messages' of a single message"),
        ([user("hi"), assistant("a"), user("b")], "a 'messages' whose last message is not from the assistant"),
        ("User: hi", "a 'messages' that is text, but should be a list of messages"),
        ([], "an empty 'messages'"),
    ],
)
def test_a_conversation_without_an_answer_is_dropped(chat, messages, reason):
    _, report = examples_of([{"messages": [user("hi"), assistant("a")]}, {"messages": messages}], chat)
    assert report.dropped == {reason: [1]}


def test_a_prompt_column_beside_a_conversation_is_not_read(chat):
    [example], report = examples_of([{"prompt": "hi", "messages": [user("hi"), assistant("a")]}], chat)
    assert chat.decode(example.completion) == "a<|im_end|>"
    assert (report.columns.unread, report.warnings()) == (("prompt",), [])


def test_prompts_of_conversations_end_before_the_answer(chat):
    limits = {"max_prompt_length": 99, "max_completion_length": 9, "eos_token_ids": [chat.eos_token_id]}
    rows = [{"messages": [user("hi"), assistant("yes")]}, {"messages": [user("hi")]}]
    (first, second), _ = tokenize(Prompt, rows, chat, **limits)
    assert first.prompt == second.prompt


# The other arguments of chat templates


def test_a_system_column_becomes_the_first_message(chat):
    [expected], _ = pairs_of([{**EXPECTED, "prompt": [{"role": "system", "content": "Be kind."}, user("hi")]}], chat)
    for form in (
        "explicit messages",
        "implicit messages",
        "prompt as text",
        "prompt as text, repeated in the messages",
    ):
        [pair], report = pairs_of([{"system": "Be kind.", **CHAT_FORMS[form]}], chat)
        assert pair == expected
        assert report.columns.unread == ()
    with_turn = [{"role": "system", "content": "Be kind."}, user("hi")]
    pairs, report = pairs_of(
        [
            {**EXPECTED, "system": "Be kind.", "prompt": with_turn},
            {**EXPECTED, "system": "Be curt.", "prompt": with_turn},
            {**EXPECTED, "system": None},
        ],
        chat,
    )
    assert pairs[0].prompt == expected.prompt
    assert report.dropped == {"a 'system' that differs from the system message of the prompt": [1]}


TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"properties": {"town": {"type": "string"}}}}}


@pytest.mark.parametrize("tools", [[TOOL], json.dumps([TOOL])], ids=["a list", "JSON text"])
def test_tools_are_given_to_the_template(with_tools, tools):
    [pair], _ = pairs_of([{**EXPECTED, "tools": tools}], with_tools, max_prompt_length=300)
    expected = with_tools.apply_chat_template([user("hi")], tools=[TOOL], tokenize=False, add_generation_prompt=True)
    assert with_tools.decode(pair.prompt) == expected


@pytest.mark.parametrize("tools", [None, [], "", "[]"])
def test_no_tools_are_no_argument(with_tools, tools):
    [pair], _ = pairs_of([{**EXPECTED, "tools": tools}], with_tools)
    assert "<tools>" not in with_tools.decode(pair.prompt)


@pytest.mark.parametrize(
    ("column", "value", "reason"),
    [
        ("tools", "weather(town)", "a 'tools' that is text, but not JSON"),
        ("tools", {"name": "weather"}, "a 'tools' that is not a list of dictionaries"),
        ("chat_template_kwargs", {"tokenize": True}, "a 'chat_template_kwargs' with 'tokenize', which is set here"),
        ("chat_template_kwargs", [1], "a 'chat_template_kwargs' that is not a dictionary"),
        ("system", ["Be kind."], "a 'system' that is not text"),
    ],
)
def test_arguments_that_are_none_are_dropped_by_name(with_tools, column, value, reason):
    _, report = pairs_of([EXPECTED, {**EXPECTED, column: value}], with_tools)
    assert report.dropped == {reason: [1]}


def test_tools_that_the_template_does_not_know_are_named(chat):
    _, report = pairs_of([{**EXPECTED, "tools": None}, {**EXPECTED, "tools": [TOOL]}], chat)
    [(reason, rows)] = report.dropped.items()
    assert reason.startswith("'tools' ('weather') that the chat template does not write: use a model whose does, or ")
    assert rows == [1]


@pytest.mark.parametrize("given", [{"shout": True}, '{"shout": true}'])
def test_a_rows_own_arguments_reach_the_template(with_tools, given):
    [pair], _ = pairs_of([{**EXPECTED, "chat_template_kwargs": given}], with_tools)
    assert with_tools.decode(pair.prompt).startswith("<s>!<|im_start|>")


def call(**arguments):
    function = {"name": "weather", "arguments": arguments}
    return {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": function}]}


def turns(called):
    return [user("Rain?"), called, {"role": "tool", "content": "yes", "name": "weather"}]


def test_calls_of_tools_are_read_and_trained_on(with_tools):
    [pair], _ = pairs_of([{"prompt": turns(call(town="Bern")), "chosen": "It rains.", "rejected": "No."}], with_tools)
    assert '<call>weather {"town": "Bern"}</call><|im_end|>' in with_tools.decode(pair.prompt)
    assert "<|im_start|>tool\nyes" in with_tools.decode(pair.prompt)
    answers = {"chosen": [call(town="Bern")], "rejected": [call(town="Rome")]}
    [pair], _ = pairs_of([{"prompt": [user("Rain in Bern?")], **answers}], with_tools)
    assert with_tools.decode(pair.chosen) == '<call>weather {"town": "Bern"}</call><|im_end|>'


def test_calls_mean_the_same_however_they_are_written(with_tools):
    function = {"name": "weather", "arguments": '{"town": "Bern"}'}
    sharegpt = [
        {"from": "human", "value": "Rain?"},
        {"from": "function_call", "value": '{"name": "weather", "arguments": {"town": "Bern"}}'},
        {"from": "observation", "value": "yes"},
        {"from": "gpt", "value": "It rains."},
    ]
    plain = [user("Rain?"), call(town="Bern"), {"role": "tool", "content": "yes"}, assistant("It rains.")]
    as_text = [plain[0], {"role": "assistant", "tool_calls": [{"type": "function", "function": function}]}, *plain[2:]]
    examples, _ = examples_of([{"messages": messages} for messages in (plain, as_text, sharegpt)], with_tools)
    assert len({(example.prompt, example.completion) for example in examples}) == 1


def test_arguments_that_arrow_filled_in_are_left_out(with_tools, tmp_path):
    rows = [{"messages": [user("Rain?"), call(town="Bern")]}, {"messages": [user("Snow?"), call(day=3)]}]
    saved = datasets.Dataset.from_list(rows)
    assert saved[0]["messages"][1]["tool_calls"][0]["function"]["arguments"] == {"town": "Bern", "day": None}
    examples, _ = examples_of(saved, with_tools)
    direct, _ = examples_of(rows, with_tools)
    assert examples == direct
    assert with_tools.decode(examples[1].completion) == '<call>weather {"day": 3}</call><|im_end|>'


def test_tools_do_not_get_the_parameters_of_others(with_tools):
    tool = {"type": "function", "function": {"name": "time", "parameters": {"properties": {"zone": {"enum": ["a"]}}}}}
    rows = [{**EXPECTED, "tools": [TOOL]}, {**EXPECTED, "tools": [tool]}]
    saved = datasets.Dataset.from_list(rows)
    assert saved[1]["tools"][0]["function"]["parameters"]["properties"]["town"] is None
    assert pairs_of(saved, with_tools, max_prompt_length=300)[0] == pairs_of(rows, with_tools, max_prompt_length=300)[0]


@pytest.mark.parametrize("stored", ["rows", "JSON text in Arrow", "the type Json"])
def test_a_null_argument_is_kept_where_it_can_be_told(with_tools, stored):
    arguments = '{"town": null}' if stored == "JSON text in Arrow" else {"town": None}
    called = {"role": "assistant", "tool_calls": [{"function": {"name": "weather", "arguments": arguments}}]}
    rows = [{"messages": [user("Rain?"), called]}]
    if stored == "JSON text in Arrow":
        rows = datasets.Dataset.from_list(rows)
    if stored == "the type Json":
        if not hasattr(datasets, "Json"):
            pytest.skip("datasets 4.0 has no type Json")
        text = datasets.Value("string")
        message = {"role": text, "content": text, "tool_calls": datasets.List(datasets.Json())}
        rows = datasets.Dataset.from_list(rows, features=datasets.Features({"messages": datasets.List(message)}))
    [example], _ = examples_of(rows, with_tools)
    assert '{"town": null}' in with_tools.decode(example.completion)


def test_calls_that_the_template_does_not_know_are_named(chat):
    _, report = examples_of([{"messages": [user("hi"), assistant("a")]}, {"messages": turns(call())[:2]}], chat)
    assert report.dropped == {
        "tool calls ('weather') that the chat template does not write: use a model whose does": [1]
    }
