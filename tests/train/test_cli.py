"""The command line as a new user meets it: one clear line for every mistake, before anything is trained."""

from __future__ import annotations

import json
import re

import pytest
import tiny
import yaml
from transformers import BertConfig, BertForMaskedLM

from hypo_train.cli import main
from hypo_train.config import Config
from hypo_train.data import load
from hypo_train.export.settings import load_settings as export_settings
from hypo_train.metrics.log import read_metrics


@pytest.fixture
def recipe(settings, tmp_path):
    """Write the tiny run's settings, with ``changes``, to a YAML file; None leaves a setting out."""

    def write(**changes):
        values = {**settings().model_dump(exclude_defaults=True), **changes}
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump({name: v for name, v in values.items() if v is not None}), encoding="utf-8")
        return path

    return write


@pytest.fixture
def refusal(recipe, tmp_path, capfd):
    """The one line that ``--config`` and ``flags`` are refused with, after a look at what was left alone."""

    def run(*flags, **changes):
        path = recipe(**changes)
        before = sorted(tmp_path.rglob("*"))
        capfd.readouterr()
        status = main(["--config", str(path), *flags])
        out, err = capfd.readouterr()
        assert status == 2
        assert out == ""
        assert err.startswith("hypo_train: ")
        assert err.endswith("\n")
        assert err.count("\n") == 1, err
        assert "\r" not in err, "no progress bar"
        assert sorted(tmp_path.rglob("*")) == before, "nothing is written, output_dir least of all"
        return err.removeprefix("hypo_train: ").removesuffix("\n")

    return run


# Settings


def test_a_typo_in_a_key_is_one_line_with_the_nearest_name(refusal, tmp_path):
    assert refusal(learning_rte=1e-4) == (
        f"1 problem in the configuration: unknown key 'learning_rte' in {tmp_path}/recipe.yaml: "
        "did you mean learning_rate?"
    )


def test_a_typo_in_a_flag_is_one_line_with_the_nearest_name(refusal):
    assert refusal("--num_generation", "4").endswith("unknown flag --num_generation: did you mean --num_generations?")


def test_a_missing_recipe_is_one_line(capfd):
    assert main(["--config", "nope.yaml"]) == 2
    assert capfd.readouterr() == ("", "hypo_train: --config nope.yaml: No such file or directory\n")


def test_a_reward_that_is_not_there_is_named(refusal):
    assert refusal("--reward", "no_such_module:reward").startswith("reward='no_such_module:reward': No module named")
    assert "reward='json:reward': module 'json' has no attribute 'reward'" in refusal("--reward", "json:reward")
    assert refusal("--reward", "json:__name__") == "reward='json:__name__': __name__ is not a function"


# Data


def test_a_missing_data_file_is_named_with_those_that_are_there(refusal, tmp_path):
    assert refusal(dataset_name=str(tmp_path / "pears.jsonl")) == (
        f"dataset_name='{tmp_path}/pears.jsonl': there is no such file or folder; in '{tmp_path}' there is pairs.jsonl"
    )


def test_missing_columns_are_named_with_those_that_are_there(refusal, tmp_path):
    path = tiny.write_rows(tmp_path / "other.jsonl", [{"question": "film", "chosen": "good", "score": 1}])
    message = refusal(dataset_name=str(path))
    assert "preference data needs the columns 'chosen' and 'rejected'" in message
    assert message.endswith("the columns are 'question', 'chosen', 'score'")


def test_rows_without_a_single_usable_one_are_counted_and_named(refusal, tmp_path):
    rows = [{**row, "rejected": " "} for row in tiny.pair_rows(3)]
    path = tiny.write_rows(tmp_path / "empty.jsonl", rows)
    assert refusal(dataset_name=str(path)) == (
        f"dataset_name='{path}', split 'train': no row can be used: "
        "3 of 3 rows dropped: 3 with an empty 'rejected' (rows 0, 1, 2)"
    )


def test_a_line_that_is_not_json_is_named(refusal, tmp_path):
    path = tmp_path / "broken.jsonl"
    path.write_text('{"prompt": "film"}\n{"prompt": "bo\n')
    assert refusal(dataset_name=str(path)).startswith(f"dataset_name='{path}': line 2 is not JSON")


def test_a_file_in_another_encoding_is_one_line(refusal, tmp_path):
    path = tmp_path / "latin.jsonl"
    path.write_bytes('{"prompt": "café", "chosen": "a", "rejected": "b"}\n'.encode("latin-1"))
    message = "line 1 is not UTF-8: save the file as UTF-8"
    assert refusal(dataset_name=str(path)) == f"dataset_name='{path}': {message}"


def test_an_unknown_split_is_named_with_those_that_are_there(refusal):
    message = refusal("--dataset_train_split", "test")
    assert "split 'test'" in message
    assert "['train']" in message


def test_chat_messages_without_a_template_are_one_line(refusal, tmp_path):
    path = tiny.write_rows(tmp_path / "chat.jsonl", tiny.pair_rows(chat=True))
    assert "has chat messages, but the tokenizer" in refusal(dataset_name=str(path))


def test_an_empty_response_is_dropped_and_reported(recipe, tmp_path, capfd):
    rows = tiny.pair_rows(12)
    rows[3]["rejected"] = ""
    path = recipe(dataset_name=str(tiny.write_rows(tmp_path / "rows.jsonl", rows)))
    capfd.readouterr()
    assert main(["--config", str(path)]) == 0
    out, err = capfd.readouterr()
    lines = out.splitlines()
    assert "  train: 11 of 12 rows used" in lines
    assert "  train: 1 of 12 rows dropped: 1 with an empty 'rejected' (row 3)" in lines
    warning = "  train: 1 of 12 (8.3%) rows dropped: repair or leave out these rows"
    assert lines[: lines.index("model")].count(warning) == 1, "what is wrong comes first"
    assert lines[-1] == f"model saved in {tmp_path}/run/final"
    assert err == "", "neither bars nor warnings"
    assert [line["step"] for line in read_metrics(tmp_path / "run" / "metrics.jsonl")] == [1, 2, 3]


# Models


def test_a_model_folder_that_is_not_there_is_named(refusal):
    assert refusal(model_name_or_path="./missing") == "model_name_or_path: there is no folder './missing'"


def test_a_name_that_is_neither_a_folder_nor_on_the_hub_is_named(refusal):
    message = refusal(model_name_or_path="models/missing")
    assert message.startswith("cannot read the config of 'models/missing': no local folder, and from the Hub: ")


def test_a_model_that_is_not_causal_is_named(refusal, tmp_path):
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
    folder = tiny.save(BertForMaskedLM(BertConfig(vocab_size=len(tiny.WORDS), **sizes)), tmp_path / "bert")
    assert refusal(model_name_or_path=str(folder)) == (
        f"'{folder}' is a bert model (BertForMaskedLM), not a causal language model: "
        "choose a decoder that AutoModelForCausalLM loads"
    )


def test_an_adapter_folder_is_one_line(refusal, tmp_path, saved_model):
    from hypo_train.model.load import load_policy

    adapted = tiny.make_config(tmp_path, saved_model(), use_peft=True)
    load_policy(adapted, autocast=False).save_pretrained(tmp_path / "adapter")
    tiny.word_tokenizer().save_pretrained(tmp_path / "adapter")
    assert f"{tmp_path}/adapter" in refusal(model_name_or_path=str(tmp_path / "adapter"))


def test_too_long_sequences_for_the_model_are_one_line(refusal):
    assert refusal(max_prompt_length=512).startswith("LlamaForCausalLM has 128 positions, and prompt and completion")


def test_too_small_a_chunk_budget_is_answered_with_the_least_one(recipe, capfd):
    assert main(["--config", str(recipe(max_steps=1, max_chunk_bytes=100))]) == 2
    last = capfd.readouterr().err.splitlines()[-1]
    assert re.fullmatch(r"hypo_train: max_chunk_bytes=100 cannot hold one row of \d+ logits: pass at least \d+.*", last)


def test_a_checkpoint_that_is_not_there_is_one_line(refusal):
    message = refusal(resume_from_checkpoint="runs/no")
    assert message.startswith("resume_from_checkpoint='runs/no': there is no such folder: give a checkpoint's")


def test_a_used_output_dir_is_one_line(recipe, capfd):
    path = recipe(max_steps=1)
    assert main(["--config", str(path)]) == 0
    capfd.readouterr()
    assert main(["--config", str(path)]) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert "already holds a run" in err
    assert err.count("\n") == 1


# Help


@pytest.mark.parametrize("argv", [["--help"], ["-h"], ["--config", "recipe.yaml", "--help"]], ids=" ".join)
def test_help_documents_every_field(argv, capsys):
    assert main(argv) == 0
    out, err = capsys.readouterr()
    assert err == ""
    for name, field in Config.model_fields.items():
        assert f"  --{name}  " in out
        assert " ".join(field.description.split())[:30] in " ".join(out.split())


# The process


def test_a_mistake_reaches_the_shell_and_torchrun(refusal, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    path = tmp_path / "broken.jsonl"
    path.write_text('{"prompt": "film"\n')
    (tmp_path / "error.json").touch()
    message = refusal(dataset_name=str(path))
    assert message.startswith(f"dataset_name='{path}': line 1 is not JSON: ")
    assert message in json.loads((tmp_path / "error.json").read_text())["message"]["message"]


# Subcommands


def test_a_yes_or_no_flag_leaves_the_next_word_to_the_run(tmp_path):
    argv = ["--merge", str(tmp_path), "--output-dir", str(tmp_path / "out"), "--dtype=float16"]
    settings = export_settings(argv)
    assert (settings.run_or_checkpoint, settings.merge, settings.dtype) == (tmp_path, True, "float16")
    assert not export_settings(["--merge", "false", *argv[1:]]).merge


def test_every_mistake_in_a_subcommands_flags_is_listed(capsys):
    flags = ["--judge_workers", "0", "--juge", "x", "--judge", "a:b", "--judge", "a:b"]
    assert main(["judge", "a.jsonl", "b.jsonl", *flags]) == 2
    assert capsys.readouterr().err.splitlines() == [
        "hypo_train: 4 problems in the command line:",
        "  --judge is given more than once",
        "  unknown flag --juge: did you mean --judge?",
        "  unexpected argument 'b.jsonl'",
        "  judge_workers='0': should be greater than 0",
    ]


def test_a_missing_argument_of_a_subcommand_is_named(capsys):
    assert main(["export"]) == 2
    usage = "python -m hypo_train export RUN_OR_CHECKPOINT --output_dir FOLDER"
    assert capsys.readouterr().err.splitlines()[1:] == [
        f"  run_or_checkpoint is missing: write {usage}",
        f"  output_dir is missing: write {usage}",
    ]


@pytest.mark.parametrize("command", [[], ["demo"], ["evaluate"], ["export"], ["judge"], ["report"]], ids=str)
def test_a_help_page_fits_in_110_columns(command, capsys):
    assert main([*command, "--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(" ".join(["usage: python -m hypo_train", *command]))
    assert max(map(len, lines)) <= 110


def test_a_fault_of_the_program_keeps_its_traceback(recipe, monkeypatch):
    def fail(*_, **__):
        raise ValueError("a bug in torch")

    monkeypatch.setattr(load, "tokenize", fail)
    with pytest.raises(ValueError, match="a bug in torch"):
        main(["--config", str(recipe())])


def test_a_ctrl_c_outside_of_the_steps_ends_in_a_line(tmp_path, saved_model, monkeypatch, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(tiny.make_config(tmp_path, saved_model()).to_yaml(), encoding="utf-8")

    def interrupt(config):
        raise KeyboardInterrupt

    monkeypatch.setattr("hypo_train.train.train", interrupt)
    capsys.readouterr()  # of the model that was saved
    assert main(["--config", str(recipe)]) == 130
    assert (
        capsys.readouterr().err
        == "hypo_train: stopped at once by SIGINT; everything that was saved before is unchanged\n"
    )
