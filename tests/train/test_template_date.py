"""Chat templates that write today's date: all rows of a run have the date of the day it began."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path

import pytest
import short_runs
import tiny
from transformers.utils import chat_template_utils

from hypo_train.checkpoint.resume import check_same_run
from hypo_train.config import Config
from hypo_train.data.plan import load_plan
from hypo_train.model.source import load_tokenizer
from hypo_train.prepare import prepare
from hypo_train.utils.errors import ConfigError

# The word tokenizer has no numbers: the parity of the day chooses a word.
DATED = "{% if strftime_now('%d')|int % 2 %}tell {% else %}what {% endif %}" + tiny.CHATML


@pytest.fixture
def clock(monkeypatch):
    """``clock(14)``: chat templates see the 14th of September 2026."""

    def turn_to(day):
        class Clock(datetime):
            @classmethod
            def now(cls, tz=None):
                return cls(2026, 9, day, 12, tzinfo=tz)

        monkeypatch.setattr(chat_template_utils, "datetime", Clock)

    return turn_to


@pytest.fixture
def dated(tmp_path):
    """The folder of a model whose chat template writes the date."""
    folder = tiny.save(tiny.new_model("llama"), tmp_path / "dated", chat=True)
    tokenizer = tiny.word_tokenizer(chat=True)
    tokenizer.chat_template = DATED
    tokenizer.save_pretrained(folder)
    return folder


def first_words(config):
    """The ids with which the rows' prompts begin."""
    tokenizer = load_tokenizer(config)
    plan, _ = load_plan(config, tokenizer, [tokenizer.eos_token_id])
    return {row.prompt[0] for row in plan.train_rows}


def test_a_run_resumed_the_next_day_has_its_rows(settings, dated, clock):
    clock(14)
    whole = settings(model=dated, rows=tiny.pair_rows(chat=True), algorithm="dpo", save_steps=1, logging_steps=1)
    metrics = short_runs.trained(whole)
    assert json.loads(Path(whole.output_dir, "data.json").read_text())["train"][-1].startswith(
        "the chat template writes the date: this run uses 2026-09-14"
    )
    clock(15)
    resumed = whole.model_copy(
        update={"resume_from_checkpoint": f"{whole.output_dir}/checkpoint-2", "output_dir": whole.output_dir + "-2"}
    )
    run = prepare(resumed)
    assert run.config.template_date == "2026-09-14"
    assert short_runs.trained(resumed)[-1] == metrics[-1]


def test_a_configured_date_is_the_one_that_is_written(settings, dated, clock):
    clock(15)
    even, odd = (
        settings(model=dated, rows=tiny.pair_rows(chat=True), template_date=day, output_dir=day)
        for day in ("2026-09-14", "2026-09-13")
    )
    assert first_words(even) == {tiny.WORDS.index("what")}
    assert first_words(odd) == {tiny.WORDS.index("tell")}
    assert first_words(odd.model_copy(update={"template_date": None})) == {tiny.WORDS.index("tell")}  # the clock's


def test_a_checkpoint_without_a_date_names_the_template(settings, dated, clock):
    """Runs of older versions did not store their date."""
    clock(14)
    run = prepare(settings(model=dated, rows=tiny.pair_rows(chat=True)))
    extra = {"config": run.config.model_dump() | {"template_date": None}, "processes": [0], "rows_a_step": 1}
    check_same_run(run.plan, extra | {"origin": run.origin}, Path("checkpoint-1"))
    extra["origin"] = {"rows": {"train": "other", "eval": run.origin["rows"]["eval"]}}
    with pytest.raises(ConfigError, match="the chat template writes the date: set template_date to the day the run"):
        check_same_run(run.plan, extra, Path("checkpoint-1"))


def test_dates_are_read_as_yaml_writes_them():
    def date(value):
        return Config(model_name_or_path="m", dataset_name="d", template_date=value).template_date

    assert date(datetime(2026, 9, 14).date()) == date("2026-09-14") == "2026-09-14"
    with pytest.raises(ValueError, match="should be a date as 2026-11-30"):
        date("yesterday")


def test_a_template_without_a_date_leaves_it_out(settings, saved_model):
    assert prepare(settings(model=saved_model(chat=True), rows=tiny.pair_rows(chat=True))).config.template_date is None
