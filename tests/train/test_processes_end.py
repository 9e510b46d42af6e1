"""Several processes that are stopped, resumed or lose one of them: started as a user does, with torchrun."""

import importlib.util
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from ranks import ended, final, launch, started
from tiny import make_config, new_model, save

from hypo_train.config import Config
from hypo_train.metrics.log import read_metrics, without_costs
from hypo_train.train import train

pytestmark = pytest.mark.slow
STEPS = 6
WAYS = {
    "ddp": {},
    "fsdp": {"fsdp": True},
    "vocab-parallel": {"fsdp": True, "vocab_parallel": True},
    "zero": {"zero_stage": 2},
}
WHOLE = {"fsdp": False, "vocab_parallel": False, "zero_stage": 0}


def start(config: Config) -> list["subprocess.Popen[str]"]:
    """Two processes of ``python -m hypo_train``, by rank."""
    file = Path(config.output_dir).with_suffix(".yaml")
    file.write_text(config.to_yaml(), encoding="utf-8")
    return started(["-m", "hypo_train", "--config", str(file)])


def config_of(folder: Path, **changes: object) -> Config:
    folder.mkdir(exist_ok=True)
    model = save(new_model("llama"), folder / "model")
    small = {"per_device_train_batch_size": 2, "max_steps": STEPS, "save_steps": 3, "num_eval_rows": 8}
    return make_config(folder, model, **{**small, "adam_epsilon": 1e-5, **changes})


def lines_of(config: Config) -> list[dict[str, float]]:
    return [without_costs(line) for line in read_metrics(Path(config.output_dir) / "metrics.jsonl")]


def cut_to(config: Config, step: int, folder: Path, **changes: object) -> Config:
    """A copy of a run as a kill right after its checkpoint of ``step`` would have left it, to be gone on with."""
    shutil.copytree(config.output_dir, folder)
    shutil.rmtree(folder / f"checkpoint-{STEPS}")
    shutil.rmtree(folder / "final")
    return config.model_copy(update={"output_dir": str(folder), "resume_from_checkpoint": "auto", **changes})


@pytest.fixture(scope="module")
def whole_and_resumed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Config, Config]]:
    """A run that nobody touched and one that went on from its checkpoint in other processes, by how they share."""
    folder = tmp_path_factory.mktemp("ends")
    whole = {
        way: config_of(folder / way, logging_steps=2, **changes)
        for way, changes in WAYS.items()
        if "zero" not in way or importlib.util.find_spec("deepspeed") is not None
    }
    launch(folder / "whole", [*whole.values()])
    resumed = {way: cut_to(config, 3, folder / way / "again") for way, config in whole.items()}
    launch(folder / "resumed", [*resumed.values()])
    return {way: (whole[way], resumed[way]) for way in whole}


@pytest.mark.parametrize("way", WAYS)
def test_a_resumed_run_is_the_uninterrupted_one_on_as_many_processes_and_agrees_on_fewer(
    tmp_path, whole_and_resumed, way
):
    if "zero" in way:
        pytest.importorskip("deepspeed")
    config, again = whole_and_resumed[way]
    assert lines_of(again) == lines_of(config)
    whole = final(Path(config.output_dir))
    assert all(torch.equal(value, whole[name]) for name, value in final(Path(again.output_dir)).items())

    alone = cut_to(config, 3, tmp_path / "alone", per_device_train_batch_size=4, **WHOLE)
    train(alone, progress=False)
    for line, expected in zip(lines_of(alone), lines_of(config), strict=True):
        assert line == pytest.approx(expected, rel=1e-4, abs=1e-4)

    other_rows = cut_to(config, 3, tmp_path / "other", **WHOLE)
    with pytest.raises(ValueError, match=r"4 rows a step on 2 processes, and this one has 2 on 1"):
        train(other_rows, progress=False)


def test_a_signal_to_one_process_ends_the_step_and_saves_on_all(tmp_path):
    config = config_of(tmp_path, max_steps=100_000, save_steps=0)
    processes = start(config)
    metrics = Path(config.output_dir) / "metrics.jsonl"
    give_up = time.monotonic() + 120
    while not (metrics.exists() and metrics.read_text().count("\n") > 2) and time.monotonic() < give_up:
        time.sleep(0.2)
    processes[1].send_signal(signal.SIGTERM)
    (main, _, said), (other, _, _) = ended(processes)
    assert (main, other) == (128 + signal.SIGTERM,) * 2
    saved = [path.name for path in Path(config.output_dir).glob("checkpoint-*")]
    assert len(saved) == 1
    assert f"stopped by SIGTERM, saved in {config.output_dir}/{saved[0]}" in said


def failing_on_the_second(prompt: str, completion: str) -> float:
    """A reward that a config can name: one process's machine is broken."""
    if os.environ["RANK"] == "1":
        raise ValueError("this machine is broken")
    return 0.0


def test_a_process_that_fails_says_why_and_the_others_end_too(tmp_path):
    config = config_of(tmp_path, algorithm="rloo", reward="test_processes_end:failing_on_the_second")
    (main, _, said), (other, _, error) = ended(start(config))
    assert (main, other) == (1, 1)
    assert "ValueError: this machine is broken" in error
    assert "hypo_train: another process has failed: process 1: ValueError: this machine is broken" in said
    assert "Traceback" not in said, "of a broken connection"


def test_a_mistake_in_the_configuration_is_said_once(tmp_path):
    config = config_of(tmp_path, per_device_train_batch_size=2)
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "tell", "chosen": "a", "rejected": "b"}\n')
    (main, _, said), (other, _, also) = ended(start(config.model_copy(update={"num_eval_rows": 0})))
    assert main == 2
    assert other != 0
    assert "1 training rows for 2 processes" in said
    assert "1 training rows for 2 processes" not in also
