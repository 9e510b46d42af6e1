"""Columns that nothing reads: which are named, which are a warning, which end the run; and column_mapping."""

from __future__ import annotations

import json

import datasets
import pytest
from data_rows import assistant, config_for, examples_of, make_tokenizer, pairs_of, row, user
from tiny import CHATML

from hypo_train.config import load_config
from hypo_train.data.errors import DataError
from hypo_train.data.load import check_texts, load_held_out, load_split_rows
from hypo_train.data.rows import Example, Pair, Prompt
from hypo_train.data.tokens import tokenize
from hypo_train.evaluation.settings import FIELDS
from hypo_train.utils.errors import ConfigError


@pytest.fixture(scope="module")
def plain():
    return make_tokenizer()


@pytest.fixture(scope="module")
def chat():
    return make_tokenizer("<s> $A", eos_token="<|im_end|>", chat_template="<s>" + CHATML)


def answers(i, question=None):
    """A chosen and a rejected text that begin alike, as two answers of one model often do."""
    start = "" if question is None else f"{question} "
    return {"chosen": f"{start}The answer is {i}.", "rejected": f"{start}The answer was never {i}."}


def talk(i, text):
    return [user(f"Question {i}?"), assistant(f"{text} {i}")]


def repeated(make, count=20):
    return [make(i) for i in range(count)]


# The columns of data sets on the Hub


PAIRS = {
    "HuggingFaceH4/ultrafeedback_binarized": (
        lambda i: {
            "prompt": f"Question {i}?",
            "prompt_id": f"id{i}",
            "chosen": talk(i, "yes"),
            "rejected": talk(i, "no"),
            "messages": talk(i, "yes"),
            "score_chosen": 9.0,
            "score_rejected": 2.0,
        },
        ("prompt_id", "messages", "score_chosen", "score_rejected"),
    ),
    "Anthropic/hh-rlhf": (
        lambda i: {
            "chosen": f"\n\nHuman: Question {i}?\n\nAssistant: yes",
            "rejected": f"\n\nHuman: Question {i}?\n\nAssistant: no",
        },
        (),
    ),
    "argilla/ultrafeedback-binarized-preferences-cleaned": (
        lambda i: {
            "source": "sharegpt",
            "prompt": f"Question {i}?",
            "chosen": talk(i, "yes"),
            "chosen-rating": 4.5,
            "chosen-model": "a",
            "rejected": talk(i, "no"),
            "rejected-rating": 3.0,
            "rejected-model": "b",
        },
        ("source", "chosen-rating", "chosen-model", "rejected-rating", "rejected-model"),
    ),
    "argilla/dpo-mix-7k": (
        lambda i: {"dataset": "x", "chosen": talk(i, "yes"), "rejected": talk(i, "no"), "chosen_rating": 5.0},
        ("dataset", "chosen_rating"),
    ),
    "argilla/distilabel-capybara-dpo-7k-binarized": (
        lambda i: {
            "source": "capybara",
            "conversation": [{"input": f"Question {i}?", "output": "yes"}],
            "prompt": f"Question {i}?",
            "chosen": talk(i, "yes"),
            "rejected": talk(i, "no"),
            "original_response": "yes",
        },
        ("source", "conversation", "original_response"),
    ),
    "jondurbin/py-dpo-v0.1": (lambda i: row(f"Write {i}", "a", "b") | {"id": f"{i}"}, ("id",)),
    "mlabonne/orpo-dpo-mix-40k": (
        lambda i: {
            "source": "x",
            "prompt": f"Question {i}?",
            "question": f"Question {i}?",
            "chosen": talk(i, "yes"),
            "rejected": talk(i, "no"),
        },
        ("source", "question"),
    ),
    "Dahoas/full-hh-rlhf": (
        lambda i: row(f"Human: {i}\n\nAssistant:", " yes", " no") | {"response": " yes"},
        ("response",),
    ),
    "trl-lib/ultrafeedback_binarized": (
        lambda i: {"chosen": talk(i, "yes"), "rejected": talk(i, "no"), "score_chosen": 8.0, "score_rejected": 2.0},
        ("score_chosen", "score_rejected"),
    ),
}


@pytest.mark.parametrize("name", PAIRS)
def test_known_pairs_are_read_and_the_rest_is_named(chat, name):
    make, unread = PAIRS[name]
    pairs, report = pairs_of(repeated(make), chat)
    assert len(pairs) == 20
    assert set(report.columns.unread) == set(unread)
    assert (f"columns that nothing reads: {', '.join(map(repr, report.columns.unread))}" in report.lines()) == bool(
        unread
    )
    assert not [line for line in report.warnings() if "nothing reads" in line]


REFUSED = {
    "Intel/orca_dpo_pairs": (
        Pair,
        lambda i: {"system": "Be kind.", "question": f"What is {i}?", **answers(i)},
        r"nothing reads the columns 'system', 'question'.*column_mapping: \{question: prompt\}",
    ),
    "argilla/distilabel-intel-orca-dpo-pairs": (
        Pair,
        lambda i: {"system": "", "input": f"What is {i}?", **answers(i), "generations": ["a", "b"]},
        r"column_mapping: \{input: prompt\}",
    ),
    "Alpaca's ranking rows": (
        Pair,
        lambda i: {"instruction": f"Say {i}", "input": "", **answers(i)},
        r"'instruction', 'input'.*column_mapping: \{instruction: prompt\}",
    ),
    "openbmb/UltraInteract_pair": (
        Pair,
        lambda i: {"task": "x", "trajectory": [{"from": "user", "value": f"Solve {i}"}], **answers(i)},
        r"column_mapping: \{trajectory: messages\}",
    ),
    "argilla/ultrafeedback-binarized-preferences": (
        Pair,
        lambda i: {"instruction": f"Say {i}", "chosen_response": "a", "rejected_response": "b"},
        r"\{instruction: prompt, chosen_response: chosen, rejected_response: rejected\}",
    ),
    "trl-lib/kto-mix-14k with pairs": (
        Pair,
        lambda i: {"prompt": [user("hi")], "completion": [assistant("a")], "label": True},
        "rows with one completion and a label are no pairs",
    ),
    "trl-lib/kto-mix-14k with sft": (
        Example,
        lambda i: {"prompt": [user("hi")], "completion": [assistant("a")], "label": i % 2 == 0},
        r"'label' calls 10 of 20 completions bad.*column_mapping: \{label: null\}",
    ),
    "stanfordnlp/SHP": (
        Pair,
        lambda i: {"history": f"What is {i}?", "human_ref_A": "a", "human_ref_B": "b", "labels": 1},
        "the columns are 'history', 'human_ref_A', 'human_ref_B', 'labels'",
    ),
    "berkeley-nest/Nectar": (
        Pair,
        lambda i: {"prompt": "Human: a", "answers": [{"answer": "a", "rank": 1.0}], "turns": 1},
        "the columns are 'prompt', 'answers', 'turns'",
    ),
    "nvidia/HelpSteer": (
        Example,
        lambda i: {"prompt": "a", "response": "b", "helpfulness": 3},
        r"column_mapping: \{response: completion\}",
    ),
    "tatsu-lab/alpaca": (
        Example,
        lambda i: {"instruction": "a", "input": "", "output": "b", "text": "ab"},
        r"column_mapping: \{instruction: prompt, output: completion\}",
    ),
    "pairs about images": (
        Pair,
        lambda i: row(f"See {i}", "a", "b") | {"images": ["picture.png"]},
        "'images' hold images or sound, and only text is supported",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_rows_that_would_train_on_nonsense_are_refused(chat, name):
    kind, make, message = REFUSED[name]
    with pytest.raises(DataError, match=message):
        (pairs_of if kind is Pair else examples_of)(repeated(make), chat)


def test_a_question_that_the_answers_repeat_is_no_loss(plain):
    rows = repeated(lambda i: {"question": f"What is {i}?", **answers(i, f"What is {i}?")})
    _, report = pairs_of(rows, plain)
    assert report.columns.unread == ("question",)


@pytest.mark.parametrize(
    ("column", "value", "fix"),
    [
        ("input", "a text to translate", "write its text into the prompt"),
        ("system", "Be kind.", "write prompt and completions as chat messages"),
        ("tools", [{"name": "f"}], "write prompt and completions as chat messages"),
        ("system_prompt", "Be kind.", "set column_mapping: {system_prompt: system}"),
        ("functions", "[{}]", "set column_mapping: {functions: tools}"),
    ],
)
def test_a_column_that_the_answers_may_need_is_a_warning(plain, column, value, fix):
    rows = repeated(lambda i: row(f"Question {i}?", "a", "b") | {column: value})
    _, report = pairs_of(rows, plain)
    [line] = report.warnings()
    assert line.startswith(f"nothing reads the column {column!r}, which the prompt does not repeat: {fix}")
    assert line.endswith(f"column_mapping: {{{column}: null}}")


def test_a_column_without_values_is_only_named(plain):
    rows = repeated(lambda i: row(f"Question {i}?", "a", "b") | {"input": "", "images": None})
    _, report = pairs_of(rows, plain)
    assert (report.columns.unread, report.warnings()) == (("input", "images"), [])


def test_a_label_of_pairs_that_changes_is_a_warning(plain):
    _, report = pairs_of(repeated(lambda i: row(f"Q {i}", "a", "b") | {"label": i % 2}), plain)
    [line] = report.warnings()
    assert line.startswith("nothing reads the column 'label': 'chosen' is preferred in every row")


@pytest.mark.parametrize("names", [("score_chosen", "score_rejected"), ("chosen-rating", "rejected-rating")])
def test_scores_that_contradict_the_choice_are_a_warning(plain, names):
    chosen, rejected = names
    scored = [(5.0, 3.0), (2, 4), (1.0, 1.0), (None, 3.0)]
    rows = [row(f"Q {i}", "a", "b") | {chosen: a, rejected: b} for i, (a, b) in enumerate(scored)]
    _, report = pairs_of(rows, plain)
    assert report.warnings() == [
        f"1 of 4 pairs have a lower {chosen!r} than {rejected!r}: leave them out or swap the two"
    ]


@pytest.mark.parametrize("label", ["science", 3, True, "true", 1])
def test_a_label_that_calls_nothing_bad_is_only_named(plain, label):
    examples, report = examples_of([{"prompt": "a", "completion": "b", "label": label}], plain)
    assert (len(examples), report.columns.unread) == (1, ("label",))


def test_an_unread_column_may_hold_anything(plain):
    odd = [1, "a", None, {"a": 1}, {"a": "b"}, [[1], ["b"]], 2**70, [user("hi"), None]]
    pairs, _ = pairs_of([row(f"Q {i}", "a", "b") | {"metadata": value} for i, value in enumerate(odd)], plain)
    assert len(pairs) == len(odd)


def test_an_unread_picture_is_never_decoded(plain, tmp_path):
    features = datasets.Features({**dict.fromkeys(row(), datasets.Value("string")), "thumb": datasets.Image()})
    rows = datasets.Dataset.from_list([row() | {"thumb": {"bytes": b"no picture", "path": None}}], features=features)
    pairs, report = pairs_of(rows, plain)
    assert (len(pairs), report.columns.unread) == (1, ("thumb",))


# column_mapping


ORCA = repeated(lambda i: {"id": i, "system": "Be kind.", "question": f"What is {i}?", **answers(i)})


def write(folder, rows, name="rows.jsonl"):
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_renamed_column_is_read_in_every_split(tmp_path, plain):
    mapping = {"question": "prompt", "system": None}
    config = config_for(write(tmp_path, ORCA), column_mapping=mapping, num_eval_rows=5)
    train, held_out, reports = load_split_rows(Pair, config, plain, [plain.eos_token_id])
    assert plain.decode(train[3].prompt) == "What is 3?"
    assert plain.decode(held_out[0].prompt) == "What is 15?"
    assert {report.columns.unread for report in reports.values()} == {("id",)}
    rows, _ = load_held_out(config, plain, [plain.eos_token_id])
    assert rows == held_out
    assert check_texts(config)["train"].used == 15


def test_a_renamed_column_of_parquet_is_read(tmp_path, plain):
    datasets.Dataset.from_list(ORCA).to_parquet(tmp_path / "rows.parquet")
    config = config_for(tmp_path / "rows.parquet", column_mapping={"question": "prompt", "id": None})
    train, _, reports = load_split_rows(Pair, config, plain, [plain.eos_token_id])
    assert plain.decode(train[3].prompt) == "What is 3?"
    assert reports["train"].columns.unread == ("system",)


def test_columns_can_change_places(tmp_path, plain):
    path = write(tmp_path, [row("Q", "bad", "good")])
    config = config_for(path, column_mapping={"chosen": "rejected", "rejected": "chosen"})
    [pair], _, _ = load_split_rows(Pair, config, plain, [plain.eos_token_id])
    assert plain.decode(pair.chosen) == "good</s>"


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ({"qestion": "prompt"}, r"renames 'qestion', and the columns are 'id', 'system', 'question'"),
        (
            {"question": "promt"},
            r"renames a column to 'promt', which nothing reads: the names are 'chat_template_kwargs', 'chosen'",
        ),
        (
            {"question": "chosen"},
            r"renames a column to 'chosen', and there is one of that name: leave it out \(chosen: null\)",
        ),
    ],
)
def test_a_mapping_that_does_not_fit_the_columns_is_refused(tmp_path, mapping, message):
    with pytest.raises(DataError, match=rf"rows\.jsonl', split 'train': column_mapping {message}"):
        check_texts(config_for(write(tmp_path, ORCA), column_mapping=mapping))


def flags(*mapping):
    return ["--model_name_or_path", "m", "--dataset_name", "d", "--column_mapping", *mapping]


@pytest.mark.parametrize(
    "given",
    [("question=prompt", "id=null"), ("{question: prompt, id: null}",), ('{"question": "prompt", "id": null}',)],
)
def test_a_mapping_is_given_on_the_command_line(given):
    assert load_config(flags(*given)).column_mapping == {"question": "prompt", "id": None}
    assert load_config(flags("none")).column_mapping is None


def test_a_mapping_survives_the_file_of_a_run(tmp_path):
    config = load_config(flags("question=prompt", "id=null"))
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    assert load_config(["--config", str(tmp_path / "config.yaml")]) == config
    assert "column_mapping" in FIELDS  # of an evaluation


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("a=prompt", "b=prompt"), "should rename one column to 'prompt', not several: join their texts in the data"),
        (
            ("question",),
            r"column_mapping='question': should be \{their name: our name\}, on the command line question=",
        ),
        (("a=prompt", "b"), "on the command line question=prompt"),
        (("a=",), "column_mapping='': needs a value"),
    ],
)
def test_a_mapping_that_is_none_is_refused(given, message):
    with pytest.raises(ConfigError, match=message):
        load_config(flags(*given))


def test_prompts_alone_leave_the_answers_unread(plain):
    rows = [{"prompt": "2+2?", "solution": "4"}]
    limits = {"max_prompt_length": 9, "max_completion_length": 9, "eos_token_ids": [plain.eos_token_id]}
    [prompt], report = tokenize(Prompt, rows, plain, **limits)
    assert plain.decode(prompt.prompt) == "2+2?"
    assert (report.columns.unread, report.warnings()) == (("solution",), [])
