"""ZeRO by DeepSpeed: two processes train as one does, and go on from each other's checkpoints."""

import json
from pathlib import Path

import pytest
import ranks
import torch
from ranks import WORLD, ended, started
from safetensors.torch import load_file
from tiny import make_config, new_model, save

from hypo_train.config import Config
from hypo_train.journal.log import read_metrics, without_costs
from hypo_train.train import train

pytest.importorskip("deepspeed")
pytestmark = pytest.mark.slow
STEPS = 20
FULL = {"learning_rate": 1e-3}
LORA = {"use_peft": True, "lora_r": 4}
CASES = {
    "1, dpo": {"algorithm": "dpo", **FULL, "zero_stage": 1},
}


def launch(folder: Path, configs: list[Config]) -> None:
    """Train them in two processes."""
    folder.mkdir(exist_ok=True)
    (folder / "configs.json").write_text(json.dumps([config.model_dump() for config in configs]), encoding="utf-8")
    for status, _, error in ended(started([str(Path(ranks.__file__)), str(folder)])):
        assert status == 0, error


def config_of(name: str, folder: Path, model: Path, world: int = 1) -> Config:
    folder.mkdir(parents=True, exist_ok=True)
    changes = {"per_device_train_batch_size": 4 // world, "num_eval_rows": 8, "max_steps": STEPS, **CASES[name]}
    # Adam divides by a gradient's size: of one that is zero but for rounding, it would train on the rounding.
    changes |= {"adam_epsilon": 1e-5, "zero_stage": CASES[name]["zero_stage"] if world > 1 else 0}
    return make_config(folder, model, **changes)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every case as one process has run it, in ``one``, and as two have, in ``two``."""
    folder = tmp_path_factory.mktemp("deepspeed")
    model = save(new_model("llama"), folder / "llama")
    launch(folder / "launch", [config_of(name, folder / "two" / name, model, WORLD) for name in CASES])
    for name in CASES:
        train(config_of(name, folder / "one" / name, model), progress=False)
    return folder


@pytest.mark.parametrize("name", CASES)
def test_two_processes_log_what_one_does(name: str, runs: Path) -> None:
    one, two = (read_metrics(runs / count / name / "run" / "metrics.jsonl") for count in ("one", "two"))
    assert [line["step"] for line in two] == [line["step"] for line in one]
    assert len(one) == STEPS + 1
    for line, expected in zip(two, one, strict=True):
        line, expected = without_costs(line), without_costs(expected)
        # Ratios are of a micro-batch, which processes divide.
        line, expected = ({k: v for k, v in of_one.items() if "sampling/" not in k} for of_one in (line, expected))
        assert line.keys() == expected.keys()
        for key, value in expected.items():
            close = 1e-4 if key == "grad_norm" else 1e-5  # of all entries: more of their rounding
            assert line[key] == pytest.approx(value, rel=close, abs=close), (key, line["step"])


@pytest.mark.parametrize("name", CASES)
def test_two_processes_save_what_one_does(name: str, runs: Path) -> None:
    one, two = (load_file(next((runs / n / name / "run" / "final").glob("*.safetensors"))) for n in ("one", "two"))
    assert one.keys() == two.keys()
    for key, value in one.items():
        torch.testing.assert_close(two[key], value, rtol=1e-4, atol=1e-4, msg=lambda text, key=key: f"{key}: {text}")
