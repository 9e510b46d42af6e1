"""Trackers: the installed ones are run for real, and no failure of one ends a run."""

import json
import os
import socket
import sqlite3
import sys
from pathlib import Path

import pytest
from accelerate.tracking import TensorBoardTracker

import hypo_train.metrics.trackers
from hypo_train.cli import main
from hypo_train.config import ConfigError, load_config
from hypo_train.metrics.log import RunLog, read_metrics
from hypo_train.metrics.trackers import QUIET, Trackers, require_trackers, settings_to_show
from hypo_train.train import train

SECRET = "https://me:s3cret@host/data.jsonl?token=abc123"


@pytest.fixture(autouse=True)
def own_environment(monkeypatch):
    """Remove the environment variables that starting a tracker sets."""
    for variable in QUIET:
        monkeypatch.delenv(variable, raising=False)
    before = dict(os.environ)
    yield
    for variable in set(os.environ) - set(before):
        del os.environ[variable]


def logged(config, steps, *, first_step=0):
    """Log these steps of a run, training and evaluation."""
    with RunLog(
        config.output_dir, 10, trackers=Trackers(config, first_step), resume_step=first_step, progress=False
    ) as log:
        for step in steps:
            log.log(step, {"loss": float(step), "rewards/margins": 0.5})
            log.log(step, {"eval_loss": 2.0})


# TensorBoard


def scalars(config, name):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(Path(config.output_dir) / "tensorboard"))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


def test_tensorboard_has_every_scalar_once_after_a_resume(settings):
    config = settings(report_to=["tensorboard"])
    with RunLog(config.output_dir, 10, trackers=Trackers(config), progress=False) as log:
        for step in range(1, 7):
            log.log(step, {"loss": -1.0 if step > 4 else float(step)})
    with RunLog(config.output_dir, 10, trackers=Trackers(config, 4), resume_step=4, progress=False) as log:
        for step in range(5, 9):
            log.log(step, {"loss": float(step)})
    assert scalars(config, "loss") == [(step, float(step)) for step in range(1, 9)]
    assert [line["loss"] for line in read_metrics(Path(config.output_dir) / "metrics.jsonl")] == list(range(1, 9))


def test_without_trackers_there_is_metrics_jsonl_alone(settings):
    config = settings()
    logged(config, [1])
    assert [path.name for path in Path(config.output_dir).iterdir()] == ["metrics.jsonl"]


# Before anything expensive


def test_a_tracker_that_is_not_installed_is_refused_first(settings, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(hypo_train.metrics.trackers, "find_spec", lambda name: None)
    config = settings(report_to=["wandb", "mlflow"], model=tmp_path / "missing")
    with pytest.raises(ConfigError, match="wandb, mlflow is not installed: pip install wandb mlflow, or leave it out"):
        train(config)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(config.to_yaml())
    assert main(["--config", str(recipe)]) == 2
    assert main(["--config", str(recipe), "--dry-run"]) == 2
    assert capsys.readouterr().err.count("pip install wandb mlflow") == 2


def test_a_folder_of_a_tracker_is_not_its_package(settings, monkeypatch, tmp_path):
    (tmp_path / "here" / "mlflow_of_before").mkdir(parents=True)
    monkeypatch.syspath_prepend(tmp_path / "here")
    monkeypatch.setitem(hypo_train.metrics.trackers.PACKAGES, "mlflow", "mlflow_of_before")
    with pytest.raises(ConfigError, match="mlflow_of_before is not installed"):
        require_trackers(settings(report_to=["mlflow"]))


@pytest.mark.parametrize(
    ("environment", "accepted"),
    [
        ({}, False),
        ({"WANDB_MODE": "online"}, False),
        ({"WANDB_MODE": "offline"}, True),
        ({"WANDB_MODE": "disabled"}, True),
        ({"WANDB_API_KEY": "k" * 40}, True),
        ({"WANDB_BASE_URL": "https://wandb.example"}, True),  # which the netrc knows
    ],
    ids=str,
)
def test_wandb_without_a_login_is_refused_first(settings, monkeypatch, tmp_path, environment, accepted):
    monkeypatch.setattr(hypo_train.metrics.trackers, "_is_installed", lambda name: True)
    (tmp_path / "netrc").write_text("machine wandb.example login user password key\n")
    (tmp_path / "netrc").chmod(0o600)
    for variable in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_BASE_URL", "WANDB_IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(variable, raising=False)
    for variable, value in {"NETRC": str(tmp_path / "netrc"), **environment}.items():
        monkeypatch.setenv(variable, value)
    if accepted:
        require_trackers(settings(report_to=["wandb"]))
    else:
        with pytest.raises(ConfigError, match="wandb login, set WANDB_API_KEY, or set WANDB_MODE=offline"):
            require_trackers(settings(report_to=["wandb"]))


def test_a_tracker_that_does_not_start_is_one_line(settings, monkeypatch):
    def refused(self):
        raise OSError(f"no way to {SECRET}")

    monkeypatch.setattr(TensorBoardTracker, "start", refused)
    config = settings(report_to=["tensorboard"])
    with pytest.raises(ConfigError, match=r"report_to=tensorboard: the tracker does not start: OSError") as caught:
        train(config)
    assert "s3cret" not in str(caught.value)
    assert not (Path(config.output_dir) / "metrics.jsonl").exists(), "the folder can be used again"


def test_the_old_tensorboard_field_names_the_new_one(tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("model_name_or_path: m\ndataset_name: d\ntensorboard: false\n")
    with pytest.raises(ConfigError, match=r"tensorboard.*: use report_to: \[tensorboard\] for true"):
        load_config(["--config", str(recipe)])
    with pytest.raises(ConfigError, match="report_to: none for false"):
        load_config(["--model_name_or_path", "m", "--dataset_name", "d", "--tensorboard", "false"])


@pytest.mark.parametrize("wrong", [["wandbb"], ["all"], ["wandb", "wandb"], True, [None]], ids=str)
def test_other_trackers_are_refused(settings, wrong):
    with pytest.raises(ValueError, match="report_to"):
        settings(report_to=wrong)


@pytest.mark.parametrize("none", [None, "none", [], ["none"]], ids=str)
def test_no_tracker_can_be_written_in_several_ways(settings, none):
    assert settings(report_to=none).report_to == []


# While the run goes on


@pytest.mark.parametrize("place", ["log", "finish"])
def test_a_failing_tracker_ends_neither_run_nor_record(settings, monkeypatch, place):
    def broken(self, *arguments, **options):
        raise ConnectionError(f"lost {SECRET}")

    monkeypatch.setattr(TensorBoardTracker, place, broken)
    config = settings(report_to=["tensorboard"])
    with pytest.warns(UserWarning, match=r"tensorboard failed \(ConnectionError: lost .*metrics.jsonl has") as said:
        assert train(config, progress=False).model_dir.is_dir()
    of_trackers = [str(warning.message) for warning in said if "tensorboard" in str(warning.message)]
    assert len(of_trackers) == 1
    assert "s3cret" not in of_trackers[0]
    assert len(read_metrics(Path(config.output_dir) / "metrics.jsonl")) == 3


def test_settings_are_sent_flat_and_without_credentials(settings):
    config = settings(dataset_name=SECRET, lora_target_modules=["q_proj", "v_proj"], model="m")
    shown = settings_to_show(config)
    assert set(shown) == set(type(config).model_fields)
    assert all(isinstance(value, (str, int, float)) for value in shown.values())
    assert shown["lora_target_modules"] == "[q_proj, v_proj]"
    assert shown["max_tokens_per_micro_batch"] == "none"
    assert "s3cret" not in json.dumps(shown)
    assert "abc123" not in json.dumps(shown)


# The others, where they are installed


def test_wandb_offline_stores_nothing_of_the_host(settings, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setattr(sys, "argv", ["train.py", "--key", "s3cret"])
    monkeypatch.setattr(socket, "gethostname", lambda: "name-of-the-host")
    config = settings(report_to=["wandb"], dataset_name=SECRET)
    logged(config, [1, 2])
    (file,) = (Path(config.output_dir) / "wandb").glob("offline-run-*/*.wandb")
    content = file.read_bytes()
    assert b"rewards/margins" in content
    assert b"learning_rate" in content
    for private in (b"name-of-the-host", b"s3cret", b"abc123"):
        assert private not in content


def test_trackio_keeps_every_step_in_its_own_database(settings, monkeypatch, tmp_path):
    pytest.importorskip("trackio")
    from trackio import utils
    from trackio.sqlite_storage import SQLiteStorage

    monkeypatch.setattr(utils, "TRACKIO_DIR", tmp_path / "trackio")
    monkeypatch.setattr(sys.modules[SQLiteStorage.__module__], "TRACKIO_DIR", tmp_path / "trackio")
    config = settings(report_to=["trackio"], project="tested", run_name="one", dataset_name=SECRET)
    logged(config, [1, 2])
    logged(config, [2, 3], first_step=1)
    (path,) = (tmp_path / "trackio").glob("tested*.db")
    with sqlite3.connect(path) as database:
        rows = database.execute("select run_name, step, metrics from metrics").fetchall()
        everything = "\n".join(database.iterdump())
    losses = [(name, step) for name, step, metrics in rows if "loss" in json.loads(metrics)]
    assert sorted(losses) == [("one", 1), ("one", 2), ("one, from step 1", 2), ("one, from step 1", 3)]
    assert "s3cret" not in everything


def test_mlflow_has_a_run_for_each_attempt(settings, monkeypatch, tmp_path):
    mlflow = pytest.importorskip("mlflow")
    pytest.importorskip("sqlalchemy")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.chdir(tmp_path)
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path}/mlflow.db")
    config = settings(report_to=["mlflow"], project="tested", run_name="one", dataset_name=SECRET)
    logged(config, [1, 2])
    logged(config, [2, 3], first_step=1)
    found = mlflow.search_runs(experiment_names=["tested"], output_format="list")
    assert sorted(run.info.run_name for run in found) == ["one", "one, from step 1"]
    assert {run.data.params["beta"] for run in found} == {"0.1"}
    client = mlflow.MlflowClient()
    steps = {run.info.run_name: [m.step for m in client.get_metric_history(run.info.run_id, "loss")] for run in found}
    assert steps == {"one": [1, 2], "one, from step 1": [2, 3]}
    assert all("s3cret" not in str(run.data.params) for run in found)
    assert os.environ["MLFLOW_DISABLE_TELEMETRY"] == "true"
