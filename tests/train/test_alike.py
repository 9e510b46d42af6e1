"""What processes must have alike: the refusal of each that has not, which would otherwise train on in silence."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from threading import Barrier, Thread
from types import SimpleNamespace

import pytest
import tiny
import torch
from tiny import new_model, pair_rows, save, write_rows

from hypo_train.config import Config, ConfigError
from hypo_train.data.plan import Plan
from hypo_train.data.rows import Pair
from hypo_train.distributed.processes import Processes
from hypo_train.model.policy import Policy
from hypo_train.preflight import consistency
from hypo_train.utils.errors import OtherProcessError
from hypo_train.utils.rank_share import RankShare

ROWS = (Pair(0, (5, 6), (7, 1), (8, 1)), Pair(1, (5,), (9, 1), (8, 1)))


class Beside(Processes):
    """A process that is a thread."""

    def __init__(self, rank, values, barrier):
        self.rank_share, self._values, self._barrier = RankShare(rank, len(values)), values, barrier

    def gather(self, value):
        self._values[self.rank_share.rank] = value
        self._barrier.wait()
        found = list(self._values)
        self._barrier.wait()
        return found


def errors(function, of_each):
    """What ``function(processes, own)`` raises in each of several processes, by rank."""
    found, values, barrier = [None] * len(of_each), [None] * len(of_each), Barrier(len(of_each), timeout=60)

    def run(rank):
        try:
            function(Beside(rank, values, barrier), of_each[rank])
        except Exception as error:
            found[rank] = error

    threads = [Thread(target=run, args=(rank,)) for rank in range(len(of_each))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def refused(found):
    """The text that the main process says, once."""
    main, *others = found
    assert isinstance(main, ConfigError), main
    assert all(isinstance(error, OtherProcessError) for error in others)
    assert str(main) not in [str(error) for error in others]
    return str(main)


def with_settings(processes, config):
    consistency.require_same_settings(processes, config, device_type="cpu")


def test_different_settings_are_refused_and_different_paths_not():
    config = Config(model_name_or_path="m", dataset_name="d")
    elsewhere = config.model_copy(update={"model_name_or_path": "/local/m", "dataset_name": "/local/d"})
    assert errors(with_settings, [config, elsewhere, config]) == [None] * 3
    other = config.model_copy(update={"beta": 0.5, "fsdp": True})
    said = refused(errors(with_settings, [config, config, other]))
    assert said == (
        "process 2 differs from process 0: fsdp is True and not False, beta is 0.5 and not 0.1; start all "
        "processes with the same settings"
    )


def test_another_package_or_another_kind_of_device_is_refused():
    config = Config(model_name_or_path="m", dataset_name="d")

    def on(processes, device_type):
        consistency.require_same_settings(processes, config, device_type=device_type)

    assert "the device is cpu and not cuda" in refused(errors(on, ["cuda", "cpu"]))

    def with_versions(processes, versions):
        consistency.require_equal(processes, versions, "install the same packages on all machines")

    said = refused(errors(with_versions, [{"torch": "2.12", "peft": "1"}, {"torch": "2.13"}]))
    assert "torch is 2.13 and not 2.12, peft is missing and not 1; install the same packages" in said


def check_inputs(processes, own):
    plan, model, function = own
    source = SimpleNamespace(eos_token_ids=[1], tokenizer=SimpleNamespace(pad_token_id=0))
    inputs = SimpleNamespace(config=plan.config, plan=plan, source=source, reward_function=function)
    consistency.require_same_inputs(processes, inputs, SimpleNamespace(trained=model, reward=None))


def test_different_rows_weights_or_rewards_are_refused_by_name():
    config = Config(model_name_or_path="m", dataset_name="d")
    plan, model = Plan(config, ROWS, ROWS[:1]), Policy(new_model("llama"), is_peft=False)
    same = (plan, model, tiny.reward_of_length)
    assert errors(check_inputs, [same, same]) == [None, None]

    def said(other):
        return refused(errors(check_inputs, [same, other]))

    one_token = replace(ROWS[1], rejected=(7, 1))
    moved = replace(ROWS[1], prompt=(5, 9), chosen=(1,))  # the same numbers, cut elsewhere
    for row in (one_token, moved):
        text = said((Plan(config, (ROWS[0], row), ROWS[:1]), *same[1:]))
        assert text.startswith("process 1 does not have process 0's train rows: dataset_name='d'")
    assert "process 0's eval rows" in said((Plan(config, ROWS, ()), *same[1:]))
    weights = Policy(new_model("llama"), is_peft=False)
    with torch.no_grad():
        next(weights.parameters())[3, 4] += 1e-3
    assert "process 0's weights: model_name_or_path='m'" in said((plan, weights, same[2]))
    theta = Policy(new_model("llama", rope_theta=5e5), is_peft=False)
    assert "process 0's model settings" in said((plan, theta, same[2]))
    assert "process 0's reward" in said((plan, model, json.dumps))


@pytest.mark.slow
def test_torchrun_shows_that_a_process_has_different_data(tmp_path):
    config = tiny.make_config(tmp_path, save(new_model("llama"), tmp_path / "model"), per_device_train_batch_size=2)
    other = write_rows(tmp_path / "other.jsonl", pair_rows(seed=1))
    configs = [config, config.model_copy(update={"dataset_name": str(other)})]
    for rank, own in enumerate(configs):
        (tmp_path / f"{rank}.yaml").write_text(own.to_yaml(), encoding="utf-8")
    command = f"exec {sys.executable} -m hypo_train --config {tmp_path}/$RANK.yaml"
    torchrun = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--rdzv_backend", "c10d"]
    done = subprocess.run(
        [sys.executable, *torchrun, "--rdzv_endpoint", "localhost:0", "--no-python", "bash", "-c", command],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=250,
    )
    said = "process 1 does not have process 0's train rows"
    assert done.returncode != 0
    assert f"hypo_train: {said}" in done.stderr
    assert "hypo_train: another process has failed: process 0 has failed" in done.stderr
    cause = done.stderr.partition("Root Cause (first observed failure)")[2]
    assert f"ConfigError: {said}" in cause
    assert "hypo_train/build.py" not in done.stderr, "of a mistake that is no fault of the program's"
    assert not (tmp_path / "run").exists()
