"""Runs that die and go on: what they log and the weights they end with are those of a run that did not."""

from __future__ import annotations

import errno
import json
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny
import torch
import yaml
from safetensors.torch import load_file, save_file

import hypo_train.algorithms.preference as preference
import hypo_train.build as building
import hypo_train.checkpoint.state as state
import hypo_train.step as one_step
import hypo_train.train as loop
from hypo_train.__main__ import main
from hypo_train.checkpoint.files import latest_checkpoint
from hypo_train.config import ConfigError
from hypo_train.metrics.log import read_metrics, without_costs
from hypo_train.metrics.timing import PhaseTimer
from hypo_train.model.policy import Policy
from hypo_train.sampling import DecodeSampler
from hypo_train.train import train
from hypo_train.utils import atomic
from hypo_train.utils.errors import CheckpointError, Stopped

LORA = {"use_peft": True, "lora_r": 4, "lora_target_modules": "all-linear", "lora_dropout": 0.3}
LORA_HEAD = {**LORA, "lora_target_modules": ["q_proj", "lm_head"], "lora_dropout": 0.0}
# Checkpoints of 3 and 9 fall between two lines of metrics, the one of 6 does not; an evaluation lies in between.
INTERVALS = {"max_steps": 12, "save_steps": 3, "logging_steps": 2, "eval_steps": 4, "num_eval_rows": 4}
# Everything that a checkpoint has to bring back, if it is not a function of the step.
STATE = {"lr_scheduler_type": "cosine", "warmup_ratio": 0.25, "weight_decay": 0.1, "gradient_accumulation_steps": 2}

# A true reward that makes an evaluation wait for its SIGKILL once a checkpoint is there.
REWARD = """
import os, pathlib, time

def reward(prompt, completion):
    while pathlib.Path(os.environ.get("DIE_AFTER", "/no/checkpoint")).exists():
        time.sleep(0.01)
    return float(len(completion.split()))
"""


@pytest.fixture
def interrupted(settings):
    """``interrupted(**changes)`` is the config of a run of twelve steps that leaves checkpoints on its way."""

    def make(name="run", **changes):
        folder = Path(settings().output_dir).with_name(name)
        return settings(**{**INTERVALS, **STATE, "output_dir": str(folder), **changes})

    return make


def metrics_of(config):
    """Every line of metrics.jsonl, timings aside."""
    lines = read_metrics(Path(config.output_dir) / "metrics.jsonl")
    return [without_costs(line) for line in lines]


def final_weights(config):
    [file] = (Path(config.output_dir) / "final").glob("*.safetensors")
    return load_file(file)


def assert_same_run(found, expected):
    assert metrics_of(found) == metrics_of(expected)
    weights, others = final_weights(expected), final_weights(found)
    assert weights.keys() == others.keys()
    for name, weight in weights.items():
        assert torch.equal(others[name], weight), name
    samples = sorted((Path(expected.output_dir) / "samples").iterdir())
    assert [path.name for path in samples] == [f"step-{step}.jsonl" for step in (0, 12, 4, 8)]
    for path in samples:
        assert (Path(found.output_dir) / "samples" / path.name).read_text() == path.read_text()


def resumed(config, **changes):
    config = config.model_copy(update={"resume_from_checkpoint": "auto", **changes})
    train(config, progress=False)
    return config


# In processes of their own, by SIGKILL


def start(config, folder, *flags, die_after=None):
    """``python -m hypo_train`` on ``config``, as a user starts it."""
    recipe = folder / f"{Path(config.output_dir).name}.yaml"
    recipe.write_text(yaml.safe_dump(config.model_dump(exclude_defaults=True)), encoding="utf-8")
    root = Path(__file__).parents[2]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(root), str(folder)]),
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_CACHE": str(folder / "cache"),
        "OMP_NUM_THREADS": "1",
    }
    if die_after is not None:
        environment["DIE_AFTER"] = str(die_after)
    command = [sys.executable, "-m", "hypo_train", "--config", str(recipe), *flags]
    return subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )


def finished(process):
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors


@pytest.mark.slow
@pytest.mark.parametrize("way", [{}, LORA], ids=["full", "lora"])
def test_a_run_killed_with_sigkill_and_resumed_equals_one_that_was_not(interrupted, tmp_path, way):
    (tmp_path / "waiting.py").write_text(REWARD, encoding="utf-8")
    whole, killed = (interrupted(name, reward="waiting:reward", **way) for name in ("whole", "killed"))
    checkpoint = Path(killed.output_dir) / "checkpoint-3"
    reference, victim = start(whole, tmp_path), start(killed, tmp_path, die_after=checkpoint)
    try:
        deadline = time.monotonic() + 120
        while not (checkpoint.exists() and metrics_of(killed)[-1]["step"] == 4):
            assert victim.poll() is None, victim.stderr.read()
            assert time.monotonic() < deadline
            time.sleep(0.01)
        victim.send_signal(signal.SIGKILL)
        assert victim.wait(timeout=60) == -signal.SIGKILL
        finished(reference)
    finally:
        for process in (reference, victim):
            process.kill()
            process.communicate()
    assert [line["step"] for line in metrics_of(killed)] == [0, 2, 4], "step 4 was logged, and is not in a checkpoint"
    assert not (Path(killed.output_dir) / "final").exists()
    finished(start(killed, tmp_path, "--resume_from_checkpoint", "auto"))
    assert [line["step"] for line in metrics_of(killed)] == [0, 2, 4, 4, 6, 8, 8, 10, 12, 12]
    assert_same_run(killed, whole)


# Within this process, at any point


class Killed(BaseException):
    """Stands for SIGKILL: nothing in the package may catch it."""


def die(monkeypatch, owner, name, nth, *, afterwards=False):
    """Die in place of the nth call of ``owner.name``, or right after it."""
    original, calls = getattr(owner, name), 0

    def deadly(*arguments, **keywords):
        nonlocal calls
        calls += 1
        if calls == nth and not afterwards:
            raise Killed
        result = original(*arguments, **keywords)
        if calls == nth:
            raise Killed
        return result

    monkeypatch.setattr(owner, name, deadly)


PHASES = {
    "before a step, with nothing saved": (loop, "train_step", 3, False),
    "between a checkpoint and its line": (loop, "train_step", 5, False),
    "within a step, before sampling": (DecodeSampler, "sample", 8, False),
    "within a step, before the backward pass": (preference, "preference_loss_call", 17, False),
    "within a step, before the update": (one_step, "_clip_gradients", 8, False),
    "within a step, after the update": (DecodeSampler, "weights_changed", 8, False),
    "after an evaluation, before its line": (loop, "evaluate", 3, True),
    "after a line is logged": (loop.RunLog, "log", 6, True),
    "before a checkpoint": (loop, "save", 2, False),
    "within a checkpoint": (atomic, "fsync", 9, False),
    "before the final model": (loop, "save_model", 1, False),
    "within the final model": (Policy, "save_pretrained", 1, True),
}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, saved_model):
    folder = tmp_path_factory.mktemp("uninterrupted")
    config = tiny.make_config(folder, saved_model(), **INTERVALS, **STATE)
    train(config, progress=False)
    return config


@pytest.mark.parametrize("phase", PHASES)
def test_a_run_killed_in_any_phase_goes_on_as_if_it_was_not(interrupted, uninterrupted, monkeypatch, phase):
    config = interrupted()
    owner, name, nth, afterwards = PHASES[phase]
    with monkeypatch.context() as patch:
        die(patch, owner, name, nth, afterwards=afterwards)
        with pytest.raises(Killed):
            train(config, progress=False)
    assert not (Path(config.output_dir) / "final").exists()
    assert_same_run(resumed(config), uninterrupted)


def test_a_run_may_die_more_than_once(interrupted, uninterrupted, monkeypatch):
    config = interrupted()
    for nth in (5, 3, 4):
        with monkeypatch.context() as patch:
            die(patch, loop, "train_step", nth)
            with pytest.raises(Killed):
                resumed(config)
    assert_same_run(resumed(config), uninterrupted)


@pytest.mark.parametrize(
    "changes",
    [
        LORA,
        LORA_HEAD,
        {"num_layers_unfrozen": 1},
        {"algorithm": "dpo"},
        {"algorithm": "sft"},
        {"rollout_steps": 4},
        {"algorithm": "rloo", "reward": "tiny:reward_of_length", "rollout_steps": 4},
        {"bf16": True, "dtype": "bfloat16", **LORA},
    ],
    ids=str,
)
def test_every_way_to_train_is_resumed_exactly(interrupted, monkeypatch, changes):
    whole, killed = interrupted("whole", **changes), interrupted("killed", **changes)
    train(whole, progress=False)
    with monkeypatch.context() as patch:
        die(patch, loop, "train_step", 9)
        with pytest.raises(Killed):
            train(killed, progress=False)
    assert_same_run(resumed(killed), whole)


RANDOM_REWARD = """
import random
import numpy
import torch

def reward(prompt, completion):
    return random.random() + float(numpy.random.rand()) + torch.rand(()).item()
"""


def test_a_reward_that_draws_random_numbers_draws_the_same_after_a_resume(interrupted, tmp_path, monkeypatch):
    (tmp_path / "drawing.py").write_text(RANDOM_REWARD, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    changes = {"algorithm": "rloo", "reward": "drawing:reward"}
    whole, killed = interrupted("whole", **changes), interrupted("killed", **changes)
    train(whole, progress=False)
    for nth in (2, 9):  # before the first checkpoint, and after one
        with monkeypatch.context() as patch:
            die(patch, loop, "train_step", nth)
            with pytest.raises(Killed):
                resumed(killed)
    assert_same_run(resumed(killed), whole)


def test_a_gpt_neox_model_gets_its_trained_head_back(interrupted, saved_model, monkeypatch):
    base = saved_model("gpt_neox")
    whole, killed = interrupted("whole", model=base), interrupted("killed", model=base)
    train(whole, progress=False)
    killed_run(killed, monkeypatch)
    continued, expected = resumed(killed), final_weights(whole)
    [head] = [name for name in expected if name.startswith(("embed_out", "lm_head"))]
    assert not torch.equal(expected[head], load_file(base / "model.safetensors")[head]), "the head was trained"
    assert_same_run(continued, whole)


def test_a_finished_run_that_is_resumed_trains_no_more(interrupted, uninterrupted, monkeypatch, capsys):
    config = interrupted()
    train(config, progress=False)
    monkeypatch.setattr(loop, "train_step", None)
    assert_same_run(resumed(config), uninterrupted)
    assert "all steps are done: only the final model is saved" in capsys.readouterr().out


# Told to stop


@pytest.fixture
def heard():
    """SIGINT and SIGHUP are heard, as in a terminal: a script's background jobs and nohup begin with them ignored."""
    heard = {signal.SIGINT: signal.default_int_handler, signal.SIGHUP: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in heard.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def signalled(patch, number, nth=8, times=1):
    """``number`` comes ``times`` within the ``nth`` step of each run from now on."""
    step, count = loop.train_step, 0

    def train_step(*arguments):
        nonlocal count
        count += 1
        for _ in range(times if count == nth else 0):
            os.kill(os.getpid(), number)
        step(*arguments)

    patch.setattr(loop, "train_step", train_step)


@pytest.mark.usefixtures("heard")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP], ids=lambda number: number.name)
def test_a_run_that_is_told_to_stop_ends_its_step_saves_and_goes_on_later(
    interrupted, uninterrupted, monkeypatch, capsys, number
):
    config, before = interrupted(), signal.getsignal(number)
    with monkeypatch.context() as patch:
        signalled(patch, number)
        with pytest.raises(Stopped, match=f"stopped by {number.name}, saved in .*checkpoint-8: ") as caught:
            train(config, progress=False)
    assert caught.value.checkpoint == Path(config.output_dir) / "checkpoint-8"
    assert pickle.loads(pickle.dumps(caught.value)).signal is number
    assert signal.getsignal(number) is before
    assert f"{number.name}: finishing the step and saving; send it again to stop at once" in capsys.readouterr().err
    assert_same_run(resumed(config), uninterrupted)


@pytest.mark.parametrize("phase", ["data", "sample", "reference", "forward", "loss", "backward", "optimizer"])
def test_a_signal_in_any_phase_of_a_step_ends_the_step_saves_and_exits_with_143(
    interrupted, tmp_path, monkeypatch, capsys, phase
):
    config, enter, count = interrupted(max_steps=4, save_steps=0, eval_steps=0), PhaseTimer._enter, 0
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(config.to_yaml(), encoding="utf-8")

    def signalling(self, name):
        nonlocal count
        enter(self, name)
        count += name == phase
        if name == phase and count == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(PhaseTimer, "_enter", signalling)
    assert main(["--config", str(recipe)]) == 143
    last = latest_checkpoint(Path(config.output_dir))
    assert last is not None
    assert f"stopped by SIGTERM, saved in {last}: " in capsys.readouterr().err
    assert not (Path(config.output_dir) / "final").exists()


@pytest.mark.usefixtures("heard")
def test_a_second_signal_stops_where_it_is(interrupted, uninterrupted, monkeypatch):
    config = interrupted()
    with monkeypatch.context() as patch:
        signalled(patch, signal.SIGINT, times=2)
        with pytest.raises(KeyboardInterrupt):
            train(config, progress=False)
    assert not (Path(config.output_dir) / "checkpoint-8").exists()
    assert_same_run(resumed(config), uninterrupted)


def test_a_signal_that_is_ignored_stays_ignored(interrupted, uninterrupted, monkeypatch):
    config, before = interrupted(), signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with monkeypatch.context() as patch:
            signalled(patch, signal.SIGINT)
            train(config, progress=False)
    finally:
        signal.signal(signal.SIGINT, before)
    assert_same_run(config, uninterrupted)


def test_a_signal_in_the_last_step_changes_nothing(interrupted, uninterrupted, monkeypatch):
    config = interrupted()
    with monkeypatch.context() as patch:
        signalled(patch, signal.SIGTERM, nth=config.max_steps)
        train(config, progress=False)
    assert_same_run(config, uninterrupted)


def test_the_command_line_says_how_to_go_on_and_exits_as_the_signal_asks(interrupted, tmp_path, monkeypatch, capfd):
    config = interrupted()
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(config.to_yaml(), encoding="utf-8")
    with monkeypatch.context() as patch:
        signalled(patch, signal.SIGTERM)
        assert main(["--config", str(recipe)]) == 128 + signal.SIGTERM
    assert "hypo_train: stopped by SIGTERM, saved in " in capfd.readouterr().err


# A disk that is full


def test_a_checkpoint_that_finds_no_room_leaves_the_one_before_it(interrupted, uninterrupted, monkeypatch):
    config = interrupted()
    write = state.save_checkpoint

    def in_little_room(folder, **arguments):
        allowed = resource.getrlimit(resource.RLIMIT_FSIZE)
        if folder.name == "checkpoint-6":
            resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, allowed[1]))  # bytes of a file
        try:
            write(folder, **arguments)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, allowed)

    with monkeypatch.context() as patch:
        patch.setattr(state, "save_checkpoint", in_little_room)
        with pytest.raises(CheckpointError, match=r"cannot save .*checkpoint-6: .*; earlier checkpoints are unchanged"):
            train(config, progress=False)
    assert sorted(path.name for path in Path(config.output_dir).glob("checkpoint-*")) == ["checkpoint-3"]
    assert_same_run(resumed(config), uninterrupted)


def test_a_final_model_that_finds_no_room_can_be_saved_later(interrupted, uninterrupted, monkeypatch):
    config = interrupted()

    def in_no_room(self, folder, state):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Policy, "save_pretrained", in_no_room)
        with pytest.raises(CheckpointError, match=r"cannot save .*final: .*No space left.*auto saves the model"):
            train(config, progress=False)
    assert not list(Path(config.output_dir).glob("final*"))
    assert_same_run(resumed(config), uninterrupted)


def test_the_final_model_of_a_finished_run_is_there_until_it_is_saved_again(interrupted, uninterrupted, monkeypatch):
    config = interrupted()
    train(config, progress=False)
    with monkeypatch.context() as patch:
        die(patch, Policy, "save_pretrained", 1, afterwards=True)
        with pytest.raises(Killed):
            resumed(config)
    assert_same_run(config, uninterrupted)
    assert_same_run(resumed(config), uninterrupted)
    assert [path.name for path in Path(config.output_dir).glob("final*")] == ["final"]


def test_what_a_kill_in_the_last_removal_leaves_behind_is_gone_after_the_resume(interrupted, monkeypatch):
    config = interrupted(save_total_limit=1)
    with monkeypatch.context() as patch:
        die(patch, atomic, "_set_aside", 3, afterwards=True)  # the fourth save removes the third checkpoint
        with pytest.raises(Killed):
            train(config, progress=False)
    folder = Path(config.output_dir)
    assert {path.name for path in folder.glob("checkpoint-*")} == {"checkpoint-12", "checkpoint-9.old.tmp"}
    resumed(config)
    assert [path.name for path in folder.glob("checkpoint-*")] == ["checkpoint-12"]


# Which checkpoint


def killed_run(config, monkeypatch, nth=8):
    with monkeypatch.context() as patch:
        die(patch, loop, "train_step", nth)
        with pytest.raises(Killed):
            train(config, progress=False)
    return config


def test_auto_without_a_checkpoint_starts_from_the_beginning(interrupted, uninterrupted, capsys):
    config = resumed(interrupted())
    assert f"no checkpoint in {config.output_dir}: starting from the beginning" in capsys.readouterr().out
    assert_same_run(config, uninterrupted)


def test_the_checkpoint_that_is_continued_is_named(interrupted, monkeypatch, capsys):
    config = resumed(killed_run(interrupted(), monkeypatch))
    assert f"continuing from {config.output_dir}/checkpoint-6, step 6" in capsys.readouterr().out.splitlines()


@pytest.mark.parametrize("damage", ["truncated", "a byte changed", "a file missing"])
def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before(
    interrupted, uninterrupted, monkeypatch, capsys, damage
):
    config = killed_run(interrupted(), monkeypatch)
    weights = Path(config.output_dir) / "checkpoint-6" / "model.safetensors"
    if damage == "truncated":
        os.truncate(weights, 100)
    elif damage == "a byte changed":
        content = bytearray(weights.read_bytes())
        content[-5] ^= 1
        weights.write_bytes(content)
    else:
        weights.unlink()
    with pytest.warns(UserWarning, match=r"skipping the checkpoint .*checkpoint-6: model\.safetensors"):
        resumed(config)
    assert "checkpoint-3, step 3" in capsys.readouterr().out
    assert_same_run(config, uninterrupted)


def test_after_a_power_failure_the_last_whole_checkpoint_is_found(interrupted, uninterrupted, monkeypatch, capsys):
    """Files of zeros and folders half renamed, as a disk without its last writes has them."""
    config = killed_run(interrupted(save_total_limit=3), monkeypatch, nth=12)
    folder = Path(config.output_dir)
    assert sorted(path.name for path in folder.glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-6", "checkpoint-9"]
    for path in (folder / "checkpoint-9").iterdir():
        path.write_bytes(bytes(path.stat().st_size))
    (folder / "checkpoint-6" / "checkpoint.json").write_bytes(b"")
    shutil.copytree(folder / "checkpoint-3", folder / "checkpoint-11.tmp")
    shutil.copytree(folder / "checkpoint-3", folder / "checkpoint-1.old.tmp")
    (folder / "final.tmp").mkdir()
    with (folder / "metrics.jsonl").open("ab") as file:
        file.write(bytes(100))
    with pytest.warns(UserWarning, match=r"skipping the checkpoint .*checkpoint\.json cannot be read"):
        resumed(config)
    assert "checkpoint-3, step 3" in capsys.readouterr().out
    assert_same_run(config, uninterrupted)
    assert not list(folder.glob("*.tmp"))


@pytest.mark.parametrize("damage", ["truncated", "a byte changed"])
def test_a_run_whose_checkpoints_are_all_damaged_is_left_as_it_is(interrupted, uninterrupted, monkeypatch, damage):
    config = killed_run(interrupted(), monkeypatch)
    folders = sorted(Path(config.output_dir).glob("checkpoint-*"))
    for folder in folders:
        path = folder / "model.safetensors"
        path.write_bytes(path.read_bytes()[:8] if damage == "truncated" else bytes(path.stat().st_size))
    before = snapshot(config.output_dir)
    with (
        pytest.warns(UserWarning, match=r"skipping the checkpoint .*checkpoint-3: model\.safetensors"),
        pytest.raises(
            ConfigError, match=r"all of its checkpoints are damaged .*checkpoint-6: model.*checkpoint-3: .*remove them"
        ),
    ):
        resumed(config)
    assert snapshot(config.output_dir) == before
    for folder in folders:
        shutil.rmtree(folder)
    assert_same_run(resumed(config), uninterrupted)


def test_a_checkpoint_that_cannot_be_read_is_skipped_by_name(interrupted, uninterrupted, monkeypatch):
    config, read = killed_run(interrupted(), monkeypatch), Path.open

    def refuse(path, *args, **options):
        if path.parent.name == "checkpoint-6" and path.name == "optimizer.safetensors":
            raise PermissionError(errno.EACCES, "Permission denied")
        return read(path, *args, **options)

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.warns(UserWarning, match=r"checkpoint-6: optimizer\.safetensors cannot be read \(PermissionError"):
        resumed(config)
    assert_same_run(config, uninterrupted)


def test_the_sampler_is_told_which_weights_it_goes_on_from(interrupted, monkeypatch):
    config = killed_run(interrupted(), monkeypatch)
    versions, original = [], DecodeSampler.sample

    def sample(self, *arguments, **keywords):
        samples = original(self, *arguments, **keywords)
        versions.append(samples.version)
        return samples

    monkeypatch.setattr(DecodeSampler, "sample", sample)
    resumed(config, eval_steps=0)
    assert versions == [*range(6, 12), 12]  # six steps from the checkpoint, and the last evaluation


def test_a_named_checkpoint_is_the_one_that_is_continued(interrupted, uninterrupted, monkeypatch, capsys):
    config = killed_run(interrupted(), monkeypatch)
    resumed(config, resume_from_checkpoint=f"{config.output_dir}/checkpoint-3")
    assert "checkpoint-3, step 3" in capsys.readouterr().out
    assert_same_run(config, uninterrupted)


def test_a_checkpoint_may_be_continued_in_another_folder(interrupted, uninterrupted, monkeypatch):
    config = killed_run(interrupted(), monkeypatch)
    folder = config.output_dir + "-branch"
    branch = resumed(config, resume_from_checkpoint=f"{config.output_dir}/checkpoint-6", output_dir=folder)
    assert metrics_of(branch) == [line for line in metrics_of(uninterrupted) if line["step"] > 6]
    for name, weight in final_weights(uninterrupted).items():
        assert torch.equal(final_weights(branch)[name], weight)


def test_a_checkpoint_that_is_not_there_is_named(interrupted):
    with pytest.raises(ConfigError, match="resume_from_checkpoint='runs/checkpoint-5': there is no such folder: "):
        resumed(interrupted(), resume_from_checkpoint="runs/checkpoint-5")


@pytest.mark.parametrize(
    ("wanted", "wrong", "meant"),
    [
        ("{run}", "is not a checkpoint folder", "checkpoint-6"),
        ("checkpoint-3", "there is no such folder", "checkpoint-3"),
        ("{run}/checkpoint-7", "there is no such folder", "checkpoint-6"),
    ],
)
def test_what_may_be_meant_by_a_folder_that_is_no_checkpoint_is_named(interrupted, monkeypatch, wanted, wrong, meant):
    config = killed_run(interrupted(), monkeypatch)
    with pytest.raises(ConfigError, match=rf"{wrong}.*: did you mean {config.output_dir}/{meant}\?"):
        resumed(config, resume_from_checkpoint=wanted.format(run=config.output_dir))


def test_a_damaged_checkpoint_that_was_asked_for_by_name_is_refused(interrupted, monkeypatch):
    config = killed_run(interrupted(), monkeypatch)
    folder = Path(config.output_dir) / "checkpoint-6"
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"checkpoint-6.*model\.safetensors is missing") as caught:
        resumed(config, resume_from_checkpoint=str(folder))
    assert type(caught.value).__module__.startswith("hypo_train"), "the command line shows it as one line"


# Another run's checkpoint


def snapshot(folder):
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes())
        for path in sorted(Path(folder).rglob("*"))
        if path.is_file()
    }


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("seed", 7),
        ("learning_rate", 1e-4),
        ("kl_coef", 0.5),
        ("algorithm", "dpo"),
        ("max_steps", 24),
        ("per_device_train_batch_size", 2),
        ("num_layers_unfrozen", 1),
        ("use_peft", True),
    ],
)
def test_a_run_with_another_setting_is_refused_by_the_settings_name(interrupted, monkeypatch, field, value):
    config = killed_run(interrupted(), monkeypatch)
    before = snapshot(config.output_dir)
    with pytest.raises(ConfigError) as caught:
        resumed(config, **{field: value})
    assert str(caught.value) == (
        f"{config.output_dir}/checkpoint-6 belongs to another run: {field} was {getattr(config, field)!r} and is "
        f"{value!r}; set it back, or start a new run in another output_dir"
    )
    assert snapshot(config.output_dir) == before


def test_another_data_set_is_refused(interrupted, monkeypatch, tmp_path):
    config = killed_run(interrupted(), monkeypatch)
    other = tiny.write_rows(tmp_path / "other.jsonl", tiny.pair_rows(seed=1))
    with pytest.raises(
        ConfigError, match=r"belongs to another run: dataset_name was .*pairs.jsonl' and is .*other\.jsonl'"
    ):
        resumed(config, dataset_name=str(other))


def test_another_model_is_refused(interrupted, monkeypatch, saved_model):
    config = killed_run(interrupted(), monkeypatch)
    with pytest.raises(ConfigError, match="belongs to another run: model_name_or_path was"):
        resumed(config, model_name_or_path=str(saved_model("gpt_neox")))


def test_another_run_s_checkpoint_is_refused_before_weights_are_read_and_by_a_dry_run(
    interrupted, monkeypatch, tmp_path, capsys
):
    config = killed_run(interrupted(), monkeypatch)
    monkeypatch.setattr(building, "load_policy", None)
    with pytest.raises(ConfigError, match="belongs to another run: beta was"):
        resumed(config, beta=0.5)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(config.to_yaml(), encoding="utf-8")
    command = ["--config", str(recipe), "--resume", "--dry-run"]
    assert main(command) == 0
    assert main([*command, "--beta", "0.5"]) == 2
    assert "belongs to another run: beta was" in capsys.readouterr().err


def test_data_that_have_changed_under_their_name_are_refused(interrupted, monkeypatch):
    config = killed_run(interrupted(), monkeypatch)
    before = snapshot(config.output_dir)
    rows = tiny.pair_rows()
    tiny.write_rows(Path(config.dataset_name), [rows[1], rows[0], *rows[2:]])
    with pytest.raises(
        ConfigError, match=r"checkpoint-6 belongs to other data: the tokenized train rows of dataset_name=.* changed"
    ):
        resumed(config)
    assert snapshot(config.output_dir) == before


@pytest.mark.parametrize("way", [{}, LORA, {"num_layers_unfrozen": 1}], ids=["full", "lora", "last layer"])
def test_a_model_that_has_changed_under_its_name_is_refused(interrupted, saved_model, monkeypatch, tmp_path, way):
    model = shutil.copytree(saved_model(), tmp_path / "model")
    config = killed_run(interrupted(model=model, **way), monkeypatch)
    weights = load_file(model / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"][0, 0] += 1
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(ConfigError, match=r"checkpoint-6 belongs to another model: the weights in .* have changed"):
        resumed(config)


def test_a_checkpoint_from_before_rows_and_weights_were_kept_is_continued(interrupted, uninterrupted, monkeypatch):
    write = state.save_checkpoint

    def without(*args, extra, **options):
        write(*args, extra={name: value for name, value in extra.items() if name != "origin"}, **options)

    with monkeypatch.context() as older:
        older.setattr(state, "save_checkpoint", without)
        config = killed_run(interrupted(), monkeypatch)
    assert_same_run(resumed(config), uninterrupted)


def test_another_rank_of_the_adapter_is_refused_by_its_name(interrupted, monkeypatch):
    config = killed_run(interrupted(**LORA), monkeypatch)
    with pytest.raises(ConfigError, match="lora_r was 4 and is 8"):
        resumed(config, lora_r=8)


def test_settings_that_only_watch_may_change(interrupted, uninterrupted, monkeypatch):
    config = killed_run(interrupted(), monkeypatch)
    watching = {
        "save_steps": 5,
        "save_total_limit": 1,
        "report_to": ["tensorboard"],
        "num_eval_prompts": 2,
        "eval_steps": 7,
    }
    resumed(config, **watching)
    lines = [line for line in metrics_of(config) if "loss" in line]
    assert lines == [line for line in metrics_of(uninterrupted) if "loss" in line]
    for name, weight in final_weights(uninterrupted).items():
        assert torch.equal(final_weights(config)[name], weight)


def test_a_checkpoint_from_before_a_setting_existed_is_continued_with_its_default(
    interrupted, uninterrupted, monkeypatch
):
    write = state.save_checkpoint

    def without_the_setting(*args, extra, **options):
        config = {name: value for name, value in extra["config"].items() if name != "length_penalty"}
        write(*args, extra={**extra, "config": config}, **options)

    with monkeypatch.context() as older:
        older.setattr(state, "save_checkpoint", without_the_setting)
        config = killed_run(interrupted(), monkeypatch)
    with pytest.raises(ConfigError, match=r"length_penalty was 0\.0 and is 0\.5"):
        resumed(config, length_penalty=0.5)
    resumed(config)
    assert_same_run(config, uninterrupted)


# A used folder


@pytest.mark.parametrize("state", ["killed", "finished"])
def test_a_used_output_dir_is_refused_and_left_alone(interrupted, monkeypatch, state):
    config = interrupted()
    if state == "killed":
        killed_run(config, monkeypatch)
    else:
        train(config, progress=False)
    before = snapshot(config.output_dir)
    with pytest.raises(ConfigError, match="already holds a run: choose another folder, or continue") as caught:
        train(config.model_copy(update={"seed": 7}), progress=False)
    assert repr(config.output_dir) in str(caught.value)
    assert snapshot(config.output_dir) == before


def test_a_checkpoint_is_not_continued_in_a_folder_that_holds_another_run(interrupted, monkeypatch):
    config, other = killed_run(interrupted(), monkeypatch), interrupted("other", max_steps=1)
    train(other, progress=False)
    before = snapshot(other.output_dir)
    with pytest.raises(ConfigError, match=r"other' already holds another run than .*checkpoint-6'"):
        resumed(config, output_dir=other.output_dir, resume_from_checkpoint=f"{config.output_dir}/checkpoint-6")
    assert snapshot(other.output_dir) == before


def test_an_output_dir_with_other_files_is_used_and_leaves_them(interrupted):
    config = interrupted(max_steps=1, save_steps=0)
    folder = Path(config.output_dir)
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    train(config, progress=False)
    assert (folder / "notes.txt").read_text() == "mine"


def test_a_checkpoint_holds_what_is_trained_alone(interrupted):
    config = interrupted(max_steps=1, **LORA)
    train(config, progress=False)
    folder = Path(config.output_dir) / "checkpoint-1"
    assert all("lora_" in name for name in load_file(folder / "model.safetensors"))
    extra = json.loads((folder / "trainer.json").read_text())["extra"]
    assert extra["config"] == config.model_dump()
