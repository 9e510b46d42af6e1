"""Several processes that are stopped, resumed or lose one of them: started as a user does, with torchrun."""

import importlib.util
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from ranks import RankProcess, ended, final, launch, start, wait_until
from tiny import make_config, new_model, save

from hypo_train.config import Config
from hypo_train.metrics.log import read_metrics, without_costs
from hypo_train.train import train

pytestmark = [pytest.mark.slow, pytest.mark.timeout(0)]  # ranks.py waits by the processes' progress
STEPS = 6
WAYS = {
    "ddp": {},
    "fsdp": {"fsdp": True},
    "vocab-parallel": {"fsdp": True, "vocab_parallel": True},
    "zero": {"zero_stage": 2},
}
WHOLE = {"fsdp": False, "vocab_parallel": False, "zero_stage": 0}


def start_run(config: Config) -> list[RankProcess]:
    """Start ``python -m hypo_train`` on two ranks."""
    file = Path(config.output_dir).with_suffix(".yaml")
    file.write_text(config.to_yaml(), encoding="utf-8")
    return start(["-m", "hypo_train", "--config", str(file)])


def config_of(folder: Path, **changes: object) -> Config:
    folder.mkdir(exist_ok=True)
    model = save(new_model("llama"), folder / "model")
    small = {"per_device_train_batch_size": 2, "max_steps": STEPS, "save_steps": 3, "num_eval_rows": 8}
    return make_config(folder, model, **{**small, "adam_epsilon": 1e-5, **changes})


def lines_of(config: Config) -> list[dict[str, float]]:
    return [without_costs(line) for line in read_metrics(Path(config.output_dir) / "metrics.jsonl")]


def cut_to(config: Config, step: int, folder: Path, **changes: object) -> Config:
    """Copy a run as if it was killed right after its checkpoint of ``step``; return the config that resumes it."""
    shutil.copytree(config.output_dir, folder)
    shutil.rmtree(folder / f"checkpoint-{STEPS}")
    shutil.rmtree(folder / "final")
    return config.model_copy(update={"output_dir": str(folder), "resume_from_checkpoint": "auto", **changes})


@pytest.fixture(scope="module")
def uninterrupted_and_resumed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Config, Config]]:
    """By way: a run that was not interrupted, and a copy that other processes resumed from its checkpoint."""
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
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path, uninterrupted_and_resumed, way):
    if "zero" in way:
        pytest.importorskip("deepspeed")
    config, again = uninterrupted_and_resumed[way]
    assert lines_of(again) == lines_of(config)
    whole = final(Path(config.output_dir))
    assert all(torch.equal(value, whole[name]) for name, value in final(Path(again.output_dir)).items())

    alone = cut_to(config, 3, tmp_path / "alone", per_device_train_batch_size=4, **WHOLE)
    train(alone, progress=False)
    for line, expected in zip(lines_of(alone), lines_of(config), strict=True):
        assert line == pytest.approx(expected, rel=1e-4, abs=1e-4)

    other_rows = cut_to(config, 3, tmp_path / "other", **WHOLE)
    with pytest.raises(ValueError, match=r"4 rows per step on 2 processes, and this one has 2 on 1"):
        train(other_rows, progress=False)


def test_a_signal_to_one_process_stops_and_saves_all(tmp_path):
    config = config_of(tmp_path, max_steps=100_000, save_steps=0)
    ranks = start_run(config)
    processes = [rank.process for rank in ranks]
    metrics = Path(config.output_dir) / "metrics.jsonl"

    def has_logged() -> bool:
        return metrics.exists() and metrics.read_text().count("\n") > 2

    wait_until(lambda: has_logged() or any(process.poll() is not None for process in processes), processes)
    processes[1].send_signal(signal.SIGTERM)
    (main, _, errors), (other, _, _) = ended(ranks)
    assert (main, other) == (128 + signal.SIGTERM,) * 2
    saved = [path.name for path in Path(config.output_dir).glob("checkpoint-*")]
    assert len(saved) == 1
    assert f"stopped by SIGTERM, saved in {config.output_dir}/{saved[0]}" in errors


def failing_on_the_second(prompt: str, completion: str) -> float:
    """A reward that a config can name; it fails on rank 1."""
    if os.environ["RANK"] == "1":
        raise ValueError("this machine is broken")
    return 0.0


def test_a_failed_process_ends_all_and_its_error_is_printed(tmp_path):
    config = config_of(tmp_path, algorithm="rloo", reward="test_processes_end:failing_on_the_second")
    (main, _, said), (other, _, error) = ended(start_run(config))
    assert (main, other) == (1, 1)
    assert "ValueError: this machine is broken" in error
    assert "hypo_train: another process has failed: process 1: ValueError: this machine is broken" in said
    assert "Traceback" not in said, "of a broken connection"


def test_a_configuration_error_is_printed_once(tmp_path):
    config = config_of(tmp_path, per_device_train_batch_size=2)
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "tell", "chosen": "a", "rejected": "b"}\n')
    (main, _, said), (other, _, also) = ended(start_run(config.model_copy(update={"num_eval_rows": 0})))
    assert main == 2
    assert other != 0
    assert "1 training rows for 2 processes" in said
    assert "1 training rows for 2 processes" not in also
