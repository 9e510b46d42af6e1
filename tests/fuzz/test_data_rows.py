"""Any data file gives rows that follow the rules, or a DataError of one line."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from budget import examples
from data_rows import config_for, make_tokenizer, row
from hypothesis import example, given
from hypothesis import strategies as st
from tiny import CHATML
from values import readable_text, scalars, text, values

from hypo_train.data.errors import DataError
from hypo_train.data.load import check_texts, load_split_rows
from hypo_train.data.rows import Example, Pair, Prompt
from hypo_train.data.tokens import tokenize

LIMITS = {"max_prompt_length": 12, "max_completion_length": 6}
COLUMNS = ["prompt", "chosen", "rejected", "completion", "info", "summaries", "choice", "subreddit", "title", "post"]
COLUMNS += ["messages", "conversations", "system", "tools", "chat_template_kwargs", "label", "question", "images"]

roles = st.one_of(st.sampled_from(["user", "assistant", "system", "tool", "USER", ""]), readable_text)
message = st.one_of(
    st.fixed_dictionaries({"role": roles, "content": text}),
    st.fixed_dictionaries({"role": roles, "content": values}, optional={"name": text, "tool_calls": values}),
    st.fixed_dictionaries({"from": roles, "value": values}),
    values,
)
cell = st.one_of(text, text, st.lists(message, max_size=4), values)
rows_of_any_kind = st.lists(
    st.one_of(
        st.fixed_dictionaries({"prompt": cell, "chosen": cell, "rejected": cell}),
        st.fixed_dictionaries({"prompt": text, "chosen": text, "rejected": text}),
        st.fixed_dictionaries({"chosen": cell, "rejected": cell}),
        st.fixed_dictionaries(
            {"messages": st.lists(message, max_size=4)},
            optional={"tools": values, "system": values, "chat_template_kwargs": values, "label": scalars},
        ),
        st.fixed_dictionaries({"prompt": cell, "completion": cell}),
        st.fixed_dictionaries(
            {"info": values, "summaries": st.lists(st.one_of(values, st.fixed_dictionaries({"text": text})))},
            optional={"choice": scalars},
        ),
        st.dictionaries(st.one_of(st.sampled_from(COLUMNS), readable_text), cell, max_size=4),
    ),
    max_size=5,
)
kinds = st.sampled_from([Pair, Example, Prompt])
formats = st.sampled_from(["preferences", "tldr"])


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer("<s> $A", eos_token="<|im_end|>", chat_template="<s>" + CHATML)


@pytest.fixture(scope="module")
def without_template():
    return make_tokenizer("$A")


def check_rows(rows, reports, tokenizer):
    assert rows
    for ids_of in rows:
        prompt = ids_of.prompt
        assert 1 <= len(prompt) <= LIMITS["max_prompt_length"]
        completions = [getattr(ids_of, name) for name in ("chosen", "rejected", "completion") if hasattr(ids_of, name)]
        for ids in completions:
            assert 2 <= len(ids) <= LIMITS["max_completion_length"]
            assert ids[-1] == tokenizer.eos_token_id
            assert tokenizer.eos_token_id not in ids[:-1]
        assert all(0 <= token < len(tokenizer) for ids in (prompt, *completions) for token in ids)
    for report in reports:
        assert all(line.strip() and "\n" not in line for line in [*report.lines(), *report.warnings()])
        assert report.used + sum(map(len, report.dropped.values())) == report.rows


def check_message(error):
    assert "\n" not in str(error)
    assert "Traceback" not in str(error)
    assert str(error)


@examples(150, share=0.15)
@given(rows=rows_of_any_kind, kind=kinds, form=formats, template=st.booleans())
@example(rows=[row("a", [{"role": "\ud800", "content": "x"}], "b")], kind=Pair, form="preferences", template=True)
@example(rows=[row("a", "\ud800 b", "c")], kind=Pair, form="preferences", template=False)
def test_any_rows_follow_the_rules_or_are_a_data_error(tokenizer, without_template, rows, kind, form, template):
    chosen = tokenizer if template else without_template
    try:
        found, report = tokenize(kind, rows, chosen, **LIMITS, eos_token_ids=[chosen.eos_token_id], dataset_format=form)
    except DataError as error:
        check_message(error)
    else:
        check_rows(found, [report], chosen)


def write_jsonl(path: Path, rows: list) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_json(path: Path, rows: list) -> None:
    path.write_bytes(json.dumps(rows, ensure_ascii=False).encode("utf-8", "surrogatepass"))


def write_csv(path: Path, rows: list) -> None:
    with path.open("w", encoding="utf-8", errors="surrogatepass", newline="") as file:
        writer = csv.DictWriter(file, sorted({name for row in rows for name in row} or {"a"}), restval="")
        writer.writeheader()
        for row in rows:
            writer.writerow({name: value if isinstance(value, str) else str(value) for name, value in row.items()})


def write_parquet(path: Path, rows: list) -> None:
    try:
        table = pyarrow.Table.from_pylist(rows)
        pyarrow.parquet.write_table(table, path)
    except (pyarrow.ArrowException, UnicodeError, OverflowError, TypeError, ValueError):
        path.write_bytes(b"PAR1" + repr(rows).encode("utf-8", "replace"))  # no parquet can hold these rows


WRITERS = {"jsonl": write_jsonl, "json": write_json, "csv": write_csv, "parquet": write_parquet}


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


@examples(60, share=0.05)
@given(
    rows=rows_of_any_kind,
    suffix=st.sampled_from([*WRITERS]),
    algorithm=st.sampled_from(["hypo", "sft", "rloo", "reward"]),
    form=formats,
    held_out=st.integers(0, 2),
)
def test_any_file_is_rows_or_a_data_error(own_cache, tokenizer, tmp_path, rows, suffix, algorithm, form, held_out):
    path = tmp_path / f"rows.{suffix}"
    try:
        WRITERS[suffix](path, rows)
    except (ValueError, csv.Error):
        return  # the writer refuses these rows
    changes = {"reward": "m:f"} if algorithm == "rloo" else {}
    config = config_for(path, algorithm=algorithm, dataset_format=form, num_eval_rows=held_out, **LIMITS, **changes)
    kind = {"sft": Example, "rloo": Prompt}.get(algorithm, Pair)
    for read in (
        lambda: load_split_rows(kind, config, tokenizer, [tokenizer.eos_token_id]),
        lambda: check_texts(config),
    ):
        try:
            found = read()
        except DataError as error:
            check_message(error)
        else:
            if isinstance(found, tuple):
                check_rows([*found[0], *found[1]], found[2].values(), tokenizer)


@examples(40, share=0.03)
@given(
    content=st.one_of(st.binary(max_size=60), text.map(lambda t: t.encode("utf-8", "surrogatepass"))),
    suffix=st.sampled_from([*WRITERS]),
)
@example(content=b"null", suffix="jsonl")
@example(content=b"[null]", suffix="json")
@example(content=b"\xff\xfe\x00", suffix="csv")
@example(content=b"[" * 5000, suffix="jsonl")
@example(content=b'{"a": ' * 5000, suffix="json")
@example(content=b'"\n', suffix="csv")
def test_any_bytes_are_rows_or_a_data_error(own_cache, tokenizer, tmp_path, content, suffix):
    path = tmp_path / f"rows.{suffix}"
    path.write_bytes(content)
    try:
        load_split_rows(Pair, config_for(path), tokenizer, [tokenizer.eos_token_id])
    except DataError as error:
        check_message(error)
