"""Files as other tools write them: encodings, line breaks, compression, documents, and what is wrong in which line."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma

import datasets
import pytest
from data_rows import assistant, config_for, make_tokenizer, row, user

from hypo_train.data.errors import DataError
from hypo_train.data.files import load_rows
from hypo_train.data.load import check_texts, load_split_rows
from hypo_train.data.rows import Pair

ROWS = [row(f"Q: {i} é\u2028", f" yes {i}", f" no {i}") for i in range(4)]
LINES = [json.dumps(row, ensure_ascii=False) for row in ROWS]
CSV = "prompt,chosen,rejected\n" + "".join(f'"{r["prompt"]}","{r["chosen"]}","{r["rejected"]}"\n' for r in ROWS)


def read(path, split="train", **fields):
    return list(load_rows(config_for(path, **fields), split))


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("line_break", ["\n", "\r\n", "\r\n\r\n"])
def test_encodings_and_line_breaks_of_windows_are_read(tmp_path, encoding, line_break):
    path = tmp_path / "rows.jsonl"
    path.write_bytes((line_break.join(LINES) + line_break).encode(encoding))
    assert read(path) == ROWS
    (tmp_path / "rows.csv").write_bytes(CSV.replace("\n", line_break).encode(encoding))
    assert read(tmp_path / "rows.csv") == ROWS


@pytest.mark.parametrize(("ending", "compress"), [("gz", gzip.compress), ("bz2", bz2.compress), ("XZ", lzma.compress)])
def test_compressed_files_are_read(tmp_path, ending, compress):
    for name, content in (("jsonl", "\n".join(LINES)), ("JSON", json.dumps(ROWS)), ("csv", CSV)):
        path = tmp_path / f"rows.{name}.{ending}"
        path.write_bytes(compress(content.encode()))
        assert read(path) == ROWS


def test_a_compressed_file_that_is_cut_off_is_named(tmp_path):
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress("\n".join(LINES).encode())[:-20])
    with pytest.raises(DataError, match=r"rows\.jsonl\.gz': .*ended before the end-of-stream marker"):
        read(path)
    path.write_text("no gzip")
    with pytest.raises(DataError, match=r"rows\.jsonl\.gz': Not a gzipped file"):
        read(path)


def test_a_zstd_file_needs_its_package(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.import_module", lambda name: (_ for _ in ()).throw(ModuleNotFoundError(name)))
    path = tmp_path / "rows.jsonl.zst"
    path.write_bytes(b"(\xb5/\xfd")
    with pytest.raises(DataError, match=r"needs the package zstandard: install it, or decompress the file"):
        read(path)


@pytest.mark.parametrize(
    "document",
    [
        {"data": ROWS},
        {"version": "1.0", "data": ROWS},
        {name: [row[name] for row in ROWS] for name in ROWS[0]},
        ROWS,
    ],
    ids=["data", "data and a version", "columns", "a list"],
)
@pytest.mark.parametrize("indent", [None, 2])
def test_documents_that_hold_rows_are_read(tmp_path, document, indent):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(document, indent=indent))
    assert read(path) == ROWS


def test_files_with_the_other_ending_are_read(tmp_path):
    (tmp_path / "rows.jsonl").write_text(json.dumps(ROWS, indent=1))
    (tmp_path / "rows.json").write_text("\n".join(LINES))
    (tmp_path / "one.json").write_text(json.dumps({"chosen": [user("a"), assistant("b")], "rejected": []}, indent=1))
    assert read(tmp_path / "rows.jsonl") == read(tmp_path / "rows.json") == ROWS
    assert len(read(tmp_path / "one.json")) == 1


def test_tabs_and_upper_case_endings_are_read(tmp_path):
    (tmp_path / "rows.tsv").write_text(CSV.replace(",", "\t"))
    (tmp_path / "ROWS.JSONL").write_text("\n".join(LINES))
    (tmp_path / "rows.ndjson").write_text("\n".join(LINES))
    datasets.Dataset.from_list(ROWS).to_parquet(tmp_path / "rows.PARQUET")
    for path in tmp_path.iterdir():
        assert read(path) == ROWS


def test_the_arrow_file_of_a_saved_data_set_is_read(tmp_path):
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    [path] = (tmp_path / "saved").glob("*.arrow")
    assert read(path) == ROWS


def test_quoted_cells_may_hold_commas_quotes_and_lines(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_bytes(b'prompt,chosen,rejected,\r\n"a, ""b""\nc",d,' + b"e" * 200_000 + b",\r\nshort,row\r\n")
    assert read(path) == [
        {"prompt": 'a, "b"\nc', "chosen": "d", "rejected": "e" * 200_000, "": ""},
        {"prompt": "short", "chosen": "row", "rejected": "", "": ""},
    ]


GOOD = '{"chosen": "a", "rejected": "b"}'


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.jsonl", f"\n{GOOD}\n{GOOD},\n{GOOD}\n", "line 3 is not JSON: Extra data$"),
        (
            "rows.jsonl",
            f"\ufeff{GOOD}\n{GOOD[:-9]}",
            r"line 2 is not JSON: .*; it is the last line, the file may",
        ),
        ("rows.jsonl", GOOD[:-9] + "\n" + GOOD, "line 1 is not JSON: "),
        ("rows.json", f"{GOOD}\n{GOOD[:-9]}\n{GOOD}", "line 2 is not JSON: "),
        ("rows.json", f"[\n{GOOD},\n{GOOD[:-9]}", "line 3 is not JSON: "),
        ("rows.json", f'[{GOOD}, "a"]', r"row 1 \(counted from 0\) is not a JSON object"),
        (
            "rows.json",
            '{"train": [{"a": 1}], "test": [{"a": 2}]}',
            "the lists 'train', 'test': write each to a",
        ),
        ("rows.json", '{"chosen": {"0": "a"}, "rejected": {"0": "b"}}', "pandas' to_json writes them by default"),
        ("rows.json", '"text"', "the file holds a single value, not a list of rows"),
        (
            "rows.csv",
            "prompt,chosen,rejected\na,b,c\na,b,c,d\n",
            "line 3 has 4 cells, and the header has 3: put",
        ),
        ("rows.csv", 'prompt,chosen,rejected\na,"b,c\nd,e,f\n', "line 3: unexpected end of data"),
        ("rows.csv", 'prompt,chosen,rejected\na,"b"c,d\n', "line 2: ',' expected after '\"'"),
        ("rows.csv", "prompt;chosen;rejected\na;b;c\n", "cells are separated by ';' and not by ','"),
        ("rows.csv", "prompt,chosen,prompt\na,b,c\n", "several columns are called 'prompt'"),
        ("rows.parquet.gz", "x", r"the name should end in one of \.jsonl"),
    ],
)
def test_what_is_wrong_in_a_file_is_named_with_its_line(tmp_path, name, content, message):
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match=message) as caught:
        read(tmp_path / name)
    assert f"{name}': " in str(caught.value)


def test_a_line_in_another_encoding_is_named(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(f"{GOOD}\n".encode() + '{"chosen": "é"}\n'.encode("latin-1"))
    with pytest.raises(DataError, match="line 2 is not UTF-8: save the file as UTF-8"):
        read(path)


ODD = [1, "a", None, {"a": 1}, {"a": {"b": 2}}, [1], [{"c": 1}, {"d": None}], 2**70, "2024-01-01", 1e400, True]


def test_columns_nobody_reads_do_not_break_reading(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row(f"Q {i}") | {"meta": value}) + "\n" for i, value in enumerate(ODD)))
    assert check_texts(config_for(path))["train"].used == len(ODD)


def test_texts_that_look_like_dates_stay_texts(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row("When?", f"2024-01-0{i}", "2023-05-05")) + "\n" for i in (1, 2)))
    assert [row["chosen"] for row in read(path)] == ["2024-01-01", "2024-01-02"]


def test_rows_may_lack_columns_that_others_have(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join([json.dumps(row()), '{"chosen": "a", "rejected": "b"}']))
    assert read(path)[1] == {"prompt": None, "chosen": "a", "rejected": "b"}


def test_a_folder_may_hold_files_of_several_kinds(tmp_path):
    (tmp_path / "a.jsonl").write_text("\n".join(LINES[:2]))
    (tmp_path / "b.json").write_text(json.dumps(ROWS[2:3]))
    datasets.Dataset.from_list(ROWS[3:]).to_parquet(tmp_path / "c.parquet")
    (tmp_path / "README.md").write_text("# Rows")
    (tmp_path / "notes.txt").write_text("nothing")
    assert read(tmp_path) == ROWS


def test_the_splits_of_a_folder_may_be_of_different_kinds(tmp_path):
    (tmp_path / "train.jsonl").write_text("\n".join(LINES))
    (tmp_path / "TEST.CSV".lower()).write_text(CSV)
    assert read(tmp_path, "train") == read(tmp_path, "test") == ROWS


def test_a_cards_list_of_files_names_the_splits(tmp_path):
    (tmp_path / "one.jsonl").write_text("\n".join(LINES))
    (tmp_path / "two.jsonl").write_text(LINES[0])
    card = "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: first\n    path: one.jsonl\n---\n"
    (tmp_path / "README.md").write_text(card)
    assert read(tmp_path, "first") == ROWS


def test_a_part_of_a_split_is_named_as_in_datasets(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(LINES))
    assert read(path, "train[:50%]") == ROWS[:2]
    config = config_for(path, dataset_train_split="train[:75%]", dataset_test_split="train[75%:]")
    tokenizer = make_tokenizer()
    train, held_out, _ = load_split_rows(Pair, config, tokenizer, [tokenizer.eos_token_id])
    assert (len(train), len(held_out)) == (3, 1)
