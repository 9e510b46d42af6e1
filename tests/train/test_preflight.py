"""What a run checks before it reads any weights: what it is refused for, what it warns of, and what it prints."""

from __future__ import annotations

import shutil
import socket
from pathlib import Path
from types import SimpleNamespace

import datasets
import huggingface_hub
import pytest
import tiny
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from hypo_train import preflight
from hypo_train.config import ConfigError
from hypo_train.data import load
from hypo_train.data.errors import DataError
from hypo_train.dry_run import DryRun
from hypo_train.model import load as model_load
from hypo_train.model import source
from hypo_train.model.tree_model import ModelError
from hypo_train.preflight import PreflightError, checks, disk, memory
from hypo_train.prepare import prepare
from hypo_train.train import train


@pytest.fixture(autouse=True)
def no_memory_estimate():
    """Here there is one."""


@pytest.fixture
def page(settings):
    """``page(field=value)`` is the first page of the tiny run, as lines."""

    def make(**changes):
        lines = []
        prepare(settings(**changes), show=lines.extend)
        return lines

    return make


@pytest.fixture
def nothing_heavy(monkeypatch):
    """Neither data nor weights may be read."""

    def refuse(*_, **__):
        raise AssertionError("read before the settings passed")

    monkeypatch.setattr(load, "load_rows", refuse)
    monkeypatch.setattr("hypo_train.build.load_policy", refuse)


def part(lines, title):
    """The lines under a title."""
    start = lines.index(title) + 1
    stop = lines.index("", start) if "" in lines[start:] else len(lines)
    return [line.strip() for line in lines[start:stop]]


def with_free_disk(monkeypatch, free):
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda path: SimpleNamespace(free=free))


# The page


def test_a_healthy_run_prints_one_screen_and_no_warning(page):
    lines = page()
    assert [line for line in lines if line and not line.startswith(" ")] == ["model", "steps", "data", "memory", "disk"]
    assert len(lines) < 40
    assert part(lines, "memory")[0].startswith("at least ")


def test_the_report_precedes_weights_and_starts_with_warnings(settings, monkeypatch):
    shown = []

    def stop(*_, **__):
        assert shown[0] == "warnings"
        raise ModelError("weights are read now")

    monkeypatch.setattr("hypo_train.build.load_policy", stop)
    with pytest.raises(ModelError, match="weights are read now"):
        prepare(settings(top_k=5), show=shown.extend)


def test_nothing_is_read_twice(settings, monkeypatch):
    counts = {"data": 0, "tokenizer": 0}
    read_rows, open_tokenizer = load.load_rows, AutoTokenizer.from_pretrained

    def rows(*arguments):
        counts["data"] += 1
        return read_rows(*arguments)

    def tokenizer(*arguments, **options):
        counts["tokenizer"] += 1
        return open_tokenizer(*arguments, **options)

    monkeypatch.setattr(load, "load_rows", rows)
    monkeypatch.setattr(source.AutoTokenizer, "from_pretrained", tokenizer)
    train(settings(max_steps=1, num_eval_rows=4), progress=False)
    assert counts == {"data": 1, "tokenizer": 1}


def test_a_hub_that_cannot_be_reached_is_asked_once(settings, monkeypatch):
    """The libraries would ask five times for each file, and wait for longer every time."""
    asked = []
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("hypo_train.preflight.hub.getproxies", dict)

    def refuse(address, **_):
        asked.append(address)
        raise OSError("no network in tests")

    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *arguments, **_: refuse(arguments))
    with pytest.raises(DataError, match="no local file or folder, and from the Hub: "):
        prepare(settings(dataset_name="nobody/nothing"))
    assert asked == [("huggingface.co", 443)]


# Refused before data and weights are read


def test_problems_of_the_settings_are_all_named(settings, tmp_path, nothing_heavy):
    with pytest.raises(PreflightError) as caught:
        prepare(settings(reward="no_such_module:reward", resume_from_checkpoint="runs/no"))
    lines = str(caught.value).split("\n")
    assert lines[0] == "2 problems:"
    assert "there is no such folder" in lines[1]
    assert "No module named 'no_such_module'" in lines[2]


def test_a_run_folder_given_as_a_checkpoint_is_refused(settings, tmp_path, nothing_heavy):
    (tmp_path / "run" / "checkpoint-3").mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"is not a checkpoint folder \(checkpoint-<step>\): "):
        prepare(settings(resume_from_checkpoint=str(tmp_path / "run")))


def test_a_reward_model_that_is_not_there_is_named(settings, nothing_heavy):
    with pytest.raises(ModelError, match=r"^reward_model_path: there is no folder './rm'$"):
        prepare(settings(reward_model_path="./rm"))


def test_a_reward_model_with_several_labels_is_named(settings, saved_model, tmp_path, nothing_heavy):
    AutoModelForSequenceClassification.from_config(tiny.new_config("llama", num_labels=3)).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="gives 3 labels: a reward model has one"):
        prepare(settings(reward_model_path=str(tmp_path)))


def test_more_layers_than_there_are_is_named(settings, nothing_heavy):
    with pytest.raises(ModelError, match="num_layers_unfrozen=3: LlamaForCausalLM has 2 layers"):
        prepare(settings(num_layers_unfrozen=3))


def test_an_output_dir_below_a_file_is_named(settings, tmp_path, nothing_heavy):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"file' is a file, choose another folder$"):
        prepare(settings(output_dir=str(tmp_path / "file" / "run")))


# Memory


def test_states_that_alone_exceed_the_device_are_refused(settings, monkeypatch):
    monkeypatch.setattr(memory, "available_memory", lambda device: 100_000)
    monkeypatch.setattr("hypo_train.build.load_policy", None)
    with pytest.raises(ConfigError) as caught:
        prepare(settings())
    message = str(caught.value)
    assert message.startswith(
        "memory: weights, their copies and the optimizer's state alone take 0.27 MiB, and the device"
    )
    assert "use_peft: true" in message


def test_more_than_nine_tenths_of_the_device_is_a_warning(page, monkeypatch):
    monkeypatch.setattr(memory, "available_memory", lambda device: int(0.3 * 2**20))
    [warning] = part(page(), "warnings")
    assert warning.startswith("memory: ")
    assert " are more than 90% of 0.30 MiB: try " in warning


def test_a_model_that_cannot_be_traced_trains_with_a_warning(page, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("no such operation on meta tensors")

    monkeypatch.setattr(checks, "estimate", fail)
    assert part(page(), "warnings") == ["memory is not estimated: no such operation on meta tensors"]


def test_a_model_built_only_by_its_checkpoint_gets_a_warning(page, monkeypatch):
    def fail(*_, **__):
        raise model_load.StructureError("cannot build a new model: no")

    monkeypatch.setattr(checks, "build_on_meta", fail)
    [warning] = part(page(), "warnings")
    assert warning.startswith("cannot build a new model: no: memory and disk are not estimated")


@pytest.mark.parametrize(("text", "limit"), [("max\n", None), ("1048576\n", 2**20), (None, None)])
def test_a_containers_limit_is_read(tmp_path, text, limit):
    path = tmp_path / "memory.max"
    if text is not None:
        path.write_text(text)
    assert memory._container_limit(path) == limit


# Disk


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"use_peft": True},
        {"num_layers_unfrozen": 1},
        {"algorithm": "reward"},
        {"optim": "adafactor"},
        {"optim": "muon"},
    ],
)
def test_the_disk_estimate_equals_the_bytes_that_are_written(settings, changes, monkeypatch, tmp_path):
    expected = []
    monkeypatch.setattr(
        checks, "check_disk", lambda c, p, t, f: expected.extend([disk.checkpoint_bytes(c, t), disk.final_bytes(t)])
    )
    train(settings(max_steps=1, **changes), progress=False)

    def size(folder):
        return sum(file.stat().st_size for file in (tmp_path / "run" / folder).glob("*.safetensors"))

    assert size("checkpoint-1") == pytest.approx(expected[0], abs=15_000)  # of names
    assert size("final") == pytest.approx(expected[1], abs=5_000)


def test_a_disk_without_room_for_one_checkpoint_is_refused(settings, monkeypatch):
    with_free_disk(monkeypatch, 200_000)
    monkeypatch.setattr("hypo_train.build.load_policy", None)
    with pytest.raises(ConfigError, match=r"a checkpoint takes 0\.20 MiB, and 0\.19 MiB are free: choose a folder"):
        prepare(settings())


def test_a_resumed_run_needs_room_for_one_more_checkpoint(settings, page, monkeypatch):
    train(settings(max_steps=2, save_steps=1), progress=False)
    with_free_disk(monkeypatch, 200_000)
    going_on = {"max_steps": 2, "save_steps": 1, "resume_from_checkpoint": "auto"}
    assert page(**going_on), "the final model alone is still to be saved"
    shutil.rmtree(Path(settings().output_dir) / "checkpoint-2")
    with pytest.raises(ConfigError, match=r"a checkpoint takes 0\.20 MiB, and 0\.19 MiB are free"):
        page(**going_on)


def test_a_disk_without_room_for_all_that_is_kept_is_a_warning(page, monkeypatch):
    with_free_disk(monkeypatch, 600_000)
    [warning] = part(page(save_steps=1, save_total_limit=2), "warnings")
    assert warning == (
        "disk: 0.61 MiB for checkpoints and the final model, and 0.57 MiB are free at output_dir: lower "
        "save_total_limit, or choose a folder on another disk"
    )
    assert "warnings" not in page(save_total_limit=2), "the last step's alone, and the final model"


def test_a_resumed_runs_old_checkpoints_make_room_for_new_ones(settings, page, monkeypatch):
    train(settings(max_steps=2, save_steps=1), progress=False)
    with_free_disk(monkeypatch, 250_000)
    lines = page(max_steps=2, save_steps=1, resume_from_checkpoint="auto")
    assert "warnings" not in lines


def test_a_dry_run_finds_them_all_the_same(settings, monkeypatch):
    with_free_disk(monkeypatch, 0)
    monkeypatch.setattr(memory, "available_memory", lambda device: 100_000)
    monkeypatch.setattr("hypo_train.preflight.hub._is_unreachable", lambda: True)
    found = preflight.check(settings(), DryRun())
    assert [str(problem).split(":")[0] for problem in found.problems] == [
        f"output_dir='{settings().output_dir}'",
        "memory",
    ]
