"""Two machines as torchrun knows them, here on one: a launcher for each, which find each other and train together."""

import os
import subprocess
import sys

import pytest
from ranks import free_port
from tiny import make_config, new_model, save

from hypo_train.metrics.log import read_metrics

STEPS = 2


@pytest.mark.slow
def test_two_launchers_train_one_run(tmp_path):
    changes = {"per_device_train_batch_size": 2, "fsdp": True, "max_steps": STEPS, "resume_from_checkpoint": "auto"}
    config = make_config(tmp_path, save(new_model("llama"), tmp_path / "model"), **changes)
    (tmp_path / "recipe.yaml").write_text(config.to_yaml(), encoding="utf-8")
    launcher = ["-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "1", "--max-restarts", "0"]
    meeting = ["--rdzv_backend", "c10d", "--rdzv_id", "run", "--rdzv_endpoint", f"localhost:{free_port()}"]
    command = [sys.executable, *launcher, *meeting, "-m", "hypo_train", "--config", str(tmp_path / "recipe.yaml")]
    machines = []
    for number in range(2):
        with (tmp_path / f"{number}.log").open("w") as log:
            options = {"env": os.environ | {"OMP_NUM_THREADS": "1"}, "stdout": log, "stderr": subprocess.STDOUT}
            machines.append(subprocess.Popen(command, **options))
    found = [machine.wait(timeout=200) for machine in machines]
    said = [(tmp_path / f"{number}.log").read_text() for number in range(2)]
    assert found == [0, 0], said
    assert sum("steps of 4 pairs on 2 processes" in text for text in said) == 1, "the main process's page alone"
    assert [line["step"] for line in read_metrics(tmp_path / "run" / "metrics.jsonl")] == [1, 2]
    assert (tmp_path / "run" / "final" / "model.safetensors").is_file()
