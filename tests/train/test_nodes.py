"""Two nodes of torchrun, simulated on one machine: a launcher for each; they find each other and train one run."""

import os
import subprocess
import sys

import pytest
from ranks import free_port, popen, wait_until
from tiny import make_config, new_model, save

from hypo_train.metrics.log import read_metrics

STEPS = 2


@pytest.mark.slow
@pytest.mark.timeout(0)  # ranks.py waits by the processes' progress
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
            machines.append(popen(command, **options))
    wait_until(lambda: all(machine.poll() is not None for machine in machines), machines)
    logs = [(tmp_path / f"{number}.log").read_text() for number in range(2)]
    assert [machine.returncode for machine in machines] == [0, 0], logs
    assert sum("steps of 4 pairs on 2 processes" in text for text in logs) == 1, "only the main process prints its page"
    assert [line["step"] for line in read_metrics(tmp_path / "run" / "metrics.jsonl")] == [1, 2]
    assert (tmp_path / "run" / "final" / "model.safetensors").is_file()
