"""A run that is killed, stopped or out of disk space and then resumed equals an uninterrupted one, bit for bit."""

from __future__ import annotations

import errno
import hashlib
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
from resumed import INTERVALS, assert_same_run, assert_same_weights, final_weights, kill_run, metrics_of
from resumed import resumed as resume
from safetensors.torch import load_file, save_file

import hypo_train.algorithms.preference as preference
import hypo_train.build as building
import hypo_train.checkpoint.state as state
import hypo_train.step as one_step
import hypo_train.train as loop
from hypo_train.checkpoint.files import latest_checkpoint
from hypo_train.cli import main
from hypo_train.metrics.timing import PhaseTimer
from hypo_train.model.policy import Policy
from hypo_train.sampling import DecodeSampler
from hypo_train.train import train
from hypo_train.utils import atomic
from hypo_train.utils.errors import CheckpointError, ConfigError, Stopped

LORA = {"use_peft": True, "lora_r": 4, "lora_target_modules": "all-linear", "lora_dropout": 0.3}
LORA_HEAD = {**LORA, "lora_target_modules": ["q_proj", "lm_head"], "lora_dropout": 0.0}
# Every state that a checkpoint has to restore because it does not follow from the step.
STATE = {"lr_scheduler_type": "cosine", "warmup_ratio": 0.25, "weight_decay": 0.1, "gradient_accumulation_steps": 2}
slow = pytest.mark.slow


@pytest.fixture
def interrupted(settings):
    """``interrupted(name, **changes)`` is the config of a run of twelve steps with checkpoints."""

    def make(name="run", **changes):
        folder = Path(settings().output_dir).with_name(name)
        return settings(**{**INTERVALS, **STATE, "output_dir": str(folder), **changes})

    return make


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, saved_model):
    config = tiny.make_config(tmp_path_factory.mktemp("uninterrupted"), saved_model(), **INTERVALS, **STATE)
    train(config, progress=False)
    return config


@pytest.fixture(scope="module")
def killed_once(uninterrupted):
    changes = {"output_dir": f"{uninterrupted.output_dir}-killed", "save_total_limit": 3}
    return kill_run(uninterrupted.model_copy(update=changes), loop, "train_step", 8)


@pytest.fixture
def killed(killed_once, tmp_path):
    """A copy of a run that was killed in its eighth step, with checkpoints of steps 3 and 6."""
    folder = shutil.copytree(killed_once.output_dir, tmp_path / "run")
    return killed_once.model_copy(update={"output_dir": str(folder)})


def snapshot(folder):
    """Content and time of every file, to see that nothing was touched."""
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes())
        for path in sorted(Path(folder).rglob("*"))
        if path.is_file()
    }


def checkpoints(config):
    return sorted(path.name for path in Path(config.output_dir).glob("checkpoint-*"))


def evaluation_in_card(config):
    card = (Path(config.output_dir) / "final" / "README.md").read_text(encoding="utf-8")
    return card.partition("## Evaluation")[2]


def write_recipe(config, path):
    path.write_text(yaml.safe_dump(config.model_dump(exclude_defaults=True)), encoding="utf-8")
    return str(path)


# Killed in a process of its own, by SIGKILL

# A true reward that stops an evaluation once a checkpoint exists, so that the SIGKILL meets the run there.
WAITING_REWARD = """
import os, pathlib, time

def reward(prompt, completion):
    while pathlib.Path(os.environ.get("DIE_AFTER", "/no/checkpoint")).exists():
        time.sleep(0.01)
    return float(len(completion.split()))
"""


def start(config, folder, *flags, die_after=None):
    """Start ``python -m hypo_train`` on ``config``."""
    recipe = write_recipe(config, folder / f"{Path(config.output_dir).name}.yaml")
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
    command = [sys.executable, "-m", "hypo_train", "--config", recipe, *flags]
    return subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )


def wait_for_success(process):
    _, errors = process.communicate()
    assert process.returncode == 0, errors


@slow
@pytest.mark.timeout(0)  # waits for the progress of two processes, not for a time
@pytest.mark.parametrize("trained", [{}, LORA], ids=["full", "lora"])
def test_a_process_killed_by_sigkill_is_resumed_exactly(interrupted, tmp_path, trained):
    (tmp_path / "waiting.py").write_text(WAITING_REWARD, encoding="utf-8")
    expected, victim = (interrupted(name, reward="waiting:reward", **trained) for name in ("expected", "victim"))
    checkpoint = Path(victim.output_dir) / "checkpoint-3"
    wait_for_success(start(expected, tmp_path))
    process = start(victim, tmp_path, die_after=checkpoint)
    try:
        while not (checkpoint.exists() and metrics_of(victim)[-1]["step"] == 4):
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    finally:
        process.kill()
        process.communicate()
    assert [line["step"] for line in metrics_of(victim)] == [0, 2, 4], "step 4 is logged but in no checkpoint"
    assert not (Path(victim.output_dir) / "final").exists()
    wait_for_success(start(victim, tmp_path, "--resume_from_checkpoint", "auto"))
    assert [line["step"] for line in metrics_of(victim)] == [0, 2, 4, 4, 6, 8, 8, 10, 12, 12]
    assert_same_run(victim, expected)


# Killed within this process, at any point

# (owner, function, nth call, whether the run dies after that call)
MOMENTS = {
    "before the first checkpoint": (loop, "train_step", 3, False),
    "between a checkpoint and its metrics": (loop, "train_step", 5, False),
    "before sampling": (DecodeSampler, "sample", 8, False),
    "before the backward pass": (preference, "preference_loss_call", 17, False),
    "before the update": (one_step, "_clip_gradients", 8, False),
    "after the update": (DecodeSampler, "weights_changed", 8, False),
    "after an evaluation": (loop, "evaluate", 3, True),
    "after a log line": (loop.RunLog, "log", 6, True),
    "before a checkpoint": (loop, "save", 2, False),
    "within a checkpoint": (atomic, "fsync", 9, False),
    "before the final model": (loop, "save_model", 1, False),
    "within the final model": (Policy, "save_pretrained", 1, True),
    "within the last evaluation": (loop, "evaluate", 4, False),
    "before the last evaluation is logged": (loop, "write_json_lines", 4, True),
    "before the model card of the last evaluation": (loop, "write_card", 1, False),
}
AFTER_TRAINING = (
    "within the last evaluation",
    "before the last evaluation is logged",
    "before the model card of the last evaluation",
)
QUICK_MOMENTS = ("between a checkpoint and its metrics", "within a checkpoint", "within the final model")


@pytest.mark.parametrize("moment", [pytest.param(m, marks=() if m in QUICK_MOMENTS else slow) for m in MOMENTS])
def test_a_run_killed_at_any_moment_is_resumed_exactly(interrupted, uninterrupted, moment):
    owner, name, nth, afterwards = MOMENTS[moment]
    config = kill_run(interrupted(), owner, name, nth, afterwards=afterwards)
    assert (Path(config.output_dir) / "final").exists() == (moment in AFTER_TRAINING)
    assert_same_run(resume(config), uninterrupted)
    assert evaluation_in_card(config) == evaluation_in_card(uninterrupted) != ""


@pytest.mark.parametrize(("nth", "step"), [(3, 8), (4, 12)], ids=["in between", "the last"])
def test_a_killed_evaluation_loses_no_training(interrupted, uninterrupted, monkeypatch, nth, step):
    config = kill_run(interrupted(save_steps=4), loop, "evaluate", nth)
    assert f"checkpoint-{step}" in checkpoints(config)
    evaluated = []
    monkeypatch.setattr(loop, "evaluate", lambda run, original=loop.evaluate: evaluated.append(1) or original(run))
    if step == 12:
        assert_same_weights(config, uninterrupted)
        monkeypatch.setattr(loop, "train_step", None)
    assert_same_run(resume(config), uninterrupted)
    assert len(evaluated) == (12 - step) // 4 + 1


@slow
def test_a_run_may_be_killed_several_times(interrupted, uninterrupted):
    config = interrupted(resume_from_checkpoint="auto")
    for nth in (5, 3, 4):
        kill_run(config, loop, "train_step", nth)
    assert_same_run(resume(config), uninterrupted)


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param(LORA, id="LoRA with dropout"),
        pytest.param(
            {"algorithm": "rloo", "reward": "tiny:reward_of_length", "rollout_steps": 4}, id="RLOO, samples drawn ahead"
        ),
        pytest.param(LORA_HEAD, id="LoRA on the head", marks=slow),
        pytest.param({"num_layers_unfrozen": 1}, id="last layer", marks=slow),
        pytest.param({"algorithm": "dpo"}, id="DPO", marks=slow),
        pytest.param({"algorithm": "sft"}, id="SFT", marks=slow),
        pytest.param({"rollout_steps": 4}, id="HyPO, samples drawn ahead", marks=slow),
        pytest.param({"rollout_steps": 4, "online_fraction": 0.2}, id="a fifth online, drawn ahead", marks=slow),
        pytest.param({"bf16": True, "dtype": "bfloat16", **LORA}, id="bf16 LoRA", marks=slow),
    ],
)
def test_every_way_to_train_is_resumed_exactly(interrupted, changes):
    expected, config = interrupted("expected", **changes), interrupted("killed", **changes)
    train(expected, progress=False)
    kill_run(config, loop, "train_step", 9)
    assert_same_run(resume(config), expected)


RANDOM_REWARD = """
import random
import numpy
import torch

def reward(prompt, completion):
    return random.random() + float(numpy.random.rand()) + torch.rand(()).item()
"""


def test_a_random_reward_repeats_after_a_resume(interrupted, tmp_path, monkeypatch):
    (tmp_path / "random_reward.py").write_text(RANDOM_REWARD, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    changes = {"algorithm": "rloo", "reward": "random_reward:reward"}
    expected, config = interrupted("expected", **changes), interrupted("killed", **changes)
    train(expected, progress=False)
    kill_run(config, loop, "train_step", 9)
    assert_same_run(resume(config), expected)


@slow
def test_the_trained_head_of_a_gpt_neox_is_resumed(interrupted, saved_model):
    base = saved_model("gpt_neox")
    expected, config = interrupted("expected", model=base), interrupted("killed", model=base)
    train(expected, progress=False)
    kill_run(config, loop, "train_step", 8)
    assert_same_run(resume(config), expected)
    [head] = [name for name in final_weights(expected) if name.startswith(("embed_out", "lm_head"))]
    assert not torch.equal(final_weights(expected)[head], load_file(base / "model.safetensors")[head])


def test_resuming_a_finished_run_trains_nothing(uninterrupted, tmp_path, monkeypatch, capsys):
    folder = shutil.copytree(uninterrupted.output_dir, tmp_path / "run")
    config = uninterrupted.model_copy(update={"output_dir": str(folder)})
    shutil.rmtree(folder / "final")
    monkeypatch.setattr(loop, "train_step", None)
    assert_same_run(resume(config), uninterrupted)
    assert "all steps are done: only the final model is saved" in capsys.readouterr().out


# Stopped by a signal


@pytest.fixture
def signals_heard():
    """Listen to SIGINT and SIGHUP as in a terminal: a script's background jobs and nohup start with them ignored."""
    handlers = {signal.SIGINT: signal.default_int_handler, signal.SIGHUP: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def send(patch, number, nth=8, times=1):
    """Send ``number`` to this process ``times`` times in the ``nth`` step."""
    step, count = loop.train_step, 0

    def train_step(*arguments):
        nonlocal count
        count += 1
        for _ in range(times if count == nth else 0):
            os.kill(os.getpid(), number)
        step(*arguments)

    patch.setattr(loop, "train_step", train_step)


@pytest.mark.usefixtures("signals_heard")
@pytest.mark.parametrize(
    "number",
    [signal.SIGTERM, *(pytest.param(number, marks=slow) for number in (signal.SIGINT, signal.SIGHUP))],
    ids=lambda number: number.name,
)
def test_a_signal_ends_the_step_and_saves(interrupted, uninterrupted, monkeypatch, capsys, number):
    config, before = interrupted(), signal.getsignal(number)
    with monkeypatch.context() as patch:
        send(patch, number)
        with pytest.raises(Stopped, match=f"stopped by {number.name}, saved in .*checkpoint-8: ") as caught:
            train(config, progress=False)
    assert caught.value.checkpoint == Path(config.output_dir) / "checkpoint-8"
    assert pickle.loads(pickle.dumps(caught.value)).signal is number
    assert signal.getsignal(number) is before
    assert f"{number.name}: finishing the step and saving; send it again to stop at once" in capsys.readouterr().err
    assert_same_run(resume(config), uninterrupted)


@pytest.mark.parametrize(
    "phase",
    [
        "backward",
        *(pytest.param(p, marks=slow) for p in ("data", "sample", "reference", "forward", "loss", "optimizer")),
    ],
)
def test_a_signal_in_any_phase_exits_with_143(interrupted, tmp_path, monkeypatch, capsys, phase):
    config, enter, count = interrupted(max_steps=4, save_steps=0, eval_steps=0), PhaseTimer._enter, 0

    def signalling(self, name):
        nonlocal count
        enter(self, name)
        count += name == phase
        if name == phase and count == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(PhaseTimer, "_enter", signalling)
    assert main(["--config", write_recipe(config, tmp_path / "recipe.yaml")]) == 143
    last = latest_checkpoint(Path(config.output_dir))
    assert last is not None
    assert f"hypo_train: stopped by SIGTERM, saved in {last}: " in capsys.readouterr().err
    assert not (Path(config.output_dir) / "final").exists()


@pytest.mark.usefixtures("signals_heard")
def test_a_second_signal_stops_at_once(interrupted, uninterrupted, monkeypatch):
    config = interrupted()
    with monkeypatch.context() as patch:
        send(patch, signal.SIGINT, times=2)
        with pytest.raises(KeyboardInterrupt):
            train(config, progress=False)
    assert checkpoints(config) == ["checkpoint-3", "checkpoint-6"]
    assert_same_run(resume(config), uninterrupted)


@slow
def test_an_ignored_signal_stays_ignored(interrupted, uninterrupted, monkeypatch):
    config, before = interrupted(), signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with monkeypatch.context() as patch:
            send(patch, signal.SIGINT)
            train(config, progress=False)
    finally:
        signal.signal(signal.SIGINT, before)
    assert_same_run(config, uninterrupted)


@slow
def test_a_signal_in_the_last_step_changes_nothing(interrupted, uninterrupted, monkeypatch):
    config = interrupted()
    with monkeypatch.context() as patch:
        send(patch, signal.SIGTERM, nth=config.max_steps)
        train(config, progress=False)
    assert_same_run(config, uninterrupted)


# Out of disk space


def test_a_checkpoint_without_room_keeps_the_one_before(interrupted, uninterrupted, monkeypatch):
    config = interrupted()
    write = state.save_checkpoint

    def write_in_little_room(folder, **arguments):
        allowed = resource.getrlimit(resource.RLIMIT_FSIZE)
        if folder.name == "checkpoint-6":
            resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, allowed[1]))  # bytes per file
        try:
            write(folder, **arguments)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, allowed)

    with monkeypatch.context() as patch:
        patch.setattr(state, "save_checkpoint", write_in_little_room)
        with pytest.raises(CheckpointError, match=r"cannot save .*checkpoint-6: .*; earlier checkpoints are unchanged"):
            train(config, progress=False)
    assert checkpoints(config) == ["checkpoint-3"]
    assert_same_run(resume(config), uninterrupted)


def test_a_final_model_without_room_can_be_saved_later(killed, uninterrupted, monkeypatch):
    def no_space(self, folder, state):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Policy, "save_pretrained", no_space)
        with pytest.raises(CheckpointError, match=r"cannot save .*final: .*No space left.*auto saves the model"):
            resume(killed)
    assert not list(Path(killed.output_dir).glob("final*"))
    assert_same_run(resume(killed), uninterrupted)


def test_saving_the_final_model_again_keeps_the_old_one(uninterrupted, tmp_path, monkeypatch):
    folder = shutil.copytree(uninterrupted.output_dir, tmp_path / "run")
    config = uninterrupted.model_copy(update={"output_dir": str(folder), "resume_from_checkpoint": "auto"})
    kill_run(config, Policy, "save_pretrained", 1, afterwards=True)
    assert_same_run(config, uninterrupted)
    assert_same_run(resume(config), uninterrupted)
    assert [path.name for path in folder.glob("final*")] == ["final"]


def test_a_resume_removes_what_a_killed_removal_left(killed):
    config = killed.model_copy(update={"save_total_limit": 1, "resume_from_checkpoint": "auto"})
    kill_run(config, atomic, "_set_aside", 3, afterwards=True)  # removes those of steps 6 and 3, then of 9
    assert checkpoints(config) == ["checkpoint-12", "checkpoint-9.old.tmp"]
    resume(config)
    assert checkpoints(config) == ["checkpoint-12"]


# Which checkpoint


def test_auto_without_a_checkpoint_starts_from_step_0(interrupted, capsys):
    config = resume(interrupted(max_steps=1))
    assert f"no checkpoint in {config.output_dir}: starting from the beginning" in capsys.readouterr().out


def test_the_checkpoint_that_is_resumed_is_printed(killed, uninterrupted, capsys):
    resume(killed)
    assert f"continuing from {killed.output_dir}/checkpoint-6, step 6" in capsys.readouterr().out.splitlines()
    assert_same_run(killed, uninterrupted)


def test_a_damaged_newest_checkpoint_is_skipped(killed, uninterrupted, capsys):
    weights = Path(killed.output_dir) / "checkpoint-6" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-5] ^= 1
    weights.write_bytes(content)
    with pytest.warns(UserWarning, match=r"skipping the checkpoint .*checkpoint-6: model\.safetensors"):
        resume(killed)
    assert "checkpoint-3, step 3" in capsys.readouterr().out
    assert_same_run(killed, uninterrupted)


def test_after_a_power_failure_a_complete_checkpoint_is_found(killed, uninterrupted, capsys):
    """Without its last writes, a disk holds files of zeros and folders that were not renamed yet."""
    folder = Path(killed.output_dir)
    shutil.copytree(folder / "checkpoint-6", folder / "checkpoint-9")
    for path in (folder / "checkpoint-9").iterdir():
        path.write_bytes(bytes(path.stat().st_size))
    (folder / "checkpoint-6" / "checkpoint.json").write_bytes(b"")
    shutil.copytree(folder / "checkpoint-3", folder / "checkpoint-11.tmp")
    shutil.copytree(folder / "checkpoint-3", folder / "checkpoint-1.old.tmp")
    (folder / "final.tmp").mkdir()
    with (folder / "metrics.jsonl").open("ab") as file:
        file.write(bytes(100))
    with pytest.warns(UserWarning, match=r"skipping the checkpoint .*checkpoint\.json cannot be read"):
        resume(killed)
    assert "checkpoint-3, step 3" in capsys.readouterr().out
    assert_same_run(killed, uninterrupted)
    assert not list(folder.glob("*.tmp"))


def test_a_run_with_only_damaged_checkpoints_is_untouched(killed):
    for path in Path(killed.output_dir).glob("checkpoint-*/model.safetensors"):
        path.write_bytes(bytes(path.stat().st_size))
    before = snapshot(killed.output_dir)
    with (
        pytest.warns(UserWarning, match=r"skipping the checkpoint .*checkpoint-3: model\.safetensors"),
        pytest.raises(ConfigError, match=r"all of its checkpoints are damaged .*-6: model.*-3: .*remove them"),
    ):
        resume(killed)
    assert snapshot(killed.output_dir) == before


@slow
def test_an_unreadable_checkpoint_is_skipped(killed, uninterrupted, monkeypatch):
    read = Path.open

    def refuse(path, *args, **options):
        if path.parent.name == "checkpoint-6" and path.name == "optimizer.safetensors":
            raise PermissionError(errno.EACCES, "Permission denied")
        return read(path, *args, **options)

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.warns(UserWarning, match=r"checkpoint-6: optimizer\.safetensors cannot be read \(PermissionError"):
        resume(killed)
    assert_same_run(killed, uninterrupted)


def test_the_sampler_continues_the_count_of_weight_versions(killed, monkeypatch):
    versions, original = [], DecodeSampler.sample

    def sample(self, *arguments, **keywords):
        samples = original(self, *arguments, **keywords)
        versions.append(samples.version)
        return samples

    monkeypatch.setattr(DecodeSampler, "sample", sample)
    resume(killed, eval_steps=0)
    assert versions == [*range(6, 12), 12]  # six steps from the checkpoint, and the last evaluation


def test_a_named_checkpoint_is_resumed_in_another_folder(killed, uninterrupted, capsys):
    folder = f"{killed.output_dir}-branch"
    branch = resume(killed, resume_from_checkpoint=f"{killed.output_dir}/checkpoint-3", output_dir=folder)
    assert "checkpoint-3, step 3" in capsys.readouterr().out
    assert metrics_of(branch) == [line for line in metrics_of(uninterrupted) if line["step"] > 3]
    assert_same_weights(branch, uninterrupted)


@pytest.mark.parametrize(
    ("wanted", "problem", "suggestion"),
    [
        ("{run}", r"is not a checkpoint folder \(checkpoint-<step>\)", r"did you mean {run}/checkpoint-6\?"),
        ("checkpoint-3", "there is no such folder", r"did you mean {run}/checkpoint-3\?"),
        ("{run}/checkpoint-7", "there is no such folder", r"did you mean {run}/checkpoint-6\?"),
    ],
)
def test_a_wrong_checkpoint_name_gets_a_suggestion(killed, wanted, problem, suggestion):
    run = killed.output_dir
    with pytest.raises(ConfigError, match=f"{problem}: {suggestion.format(run=run)}"):
        resume(killed, resume_from_checkpoint=wanted.format(run=run))


def test_a_missing_checkpoint_is_named(interrupted):
    with pytest.raises(ConfigError, match="resume_from_checkpoint='runs/checkpoint-5': there is no such folder: "):
        resume(interrupted(), resume_from_checkpoint="runs/checkpoint-5")


def test_a_named_checkpoint_that_is_damaged_is_refused(killed):
    folder = Path(killed.output_dir) / "checkpoint-6"
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"checkpoint-6.*model\.safetensors is missing"):
        resume(killed, resume_from_checkpoint=str(folder))


# A checkpoint of another run


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("seed", 7),
        ("learning_rate", 1e-4),
        ("algorithm", "dpo"),
        ("max_steps", 24),
        ("per_device_train_batch_size", 2),
        ("use_peft", True),
        ("column_mapping", {"prompt": "prompt"}),
        ("model_name_or_path", None),
    ],
)
def test_another_setting_is_refused_by_its_name(killed, saved_model, field, value):
    before = snapshot(killed.output_dir)
    value = value or str(saved_model("gpt_neox"))
    with pytest.raises(ConfigError) as caught:
        resume(killed, **{field: value})
    assert str(caught.value) == (
        f"{killed.output_dir}/checkpoint-6 belongs to another run: {field} was {getattr(killed, field)!r} and is "
        f"{value!r}; set it back, or start a new run in another output_dir"
    )
    assert snapshot(killed.output_dir) == before


def test_another_data_set_is_refused(killed, tmp_path):
    other = tiny.write_rows(tmp_path / "other.jsonl", tiny.pair_rows(seed=1))
    with pytest.raises(ConfigError, match=r"another run: dataset_name was .*pairs.jsonl' and is .*other\.jsonl'"):
        resume(killed, dataset_name=str(other))


def test_another_run_is_refused_before_weights_are_read(killed, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(building, "load_policy", None)
    with pytest.raises(ConfigError, match="belongs to another run: beta was"):
        resume(killed, beta=0.5)
    command = ["--config", write_recipe(killed, tmp_path / "recipe.yaml"), "--resume", "--dry-run"]
    assert main(command) == 0
    assert main([*command, "--beta", "0.5"]) == 2
    assert "belongs to another run: beta was" in capsys.readouterr().err


def test_changed_rows_are_refused(interrupted):
    config = interrupted(max_steps=2, save_steps=1, eval_steps=0)
    kill_run(config, loop, "train_step", 2)
    before = snapshot(config.output_dir)
    rows = tiny.pair_rows()
    tiny.write_rows(Path(config.dataset_name), [rows[1], rows[0], *rows[2:]])
    message = r"checkpoint-1 belongs to other data: the tokenized train rows of dataset_name=.* changed"
    with pytest.raises(ConfigError, match=message):
        resume(config)
    assert snapshot(config.output_dir) == before


@pytest.mark.parametrize(
    "trained",
    [{}, pytest.param(LORA, marks=slow), pytest.param({"num_layers_unfrozen": 1}, marks=slow)],
    ids=["full", "LoRA", "last layer"],
)
def test_changed_base_weights_are_refused(interrupted, saved_model, tmp_path, trained):
    model = shutil.copytree(saved_model(), tmp_path / "model")
    config = interrupted(model=model, max_steps=2, save_steps=1, eval_steps=0, **trained)
    kill_run(config, loop, "train_step", 2)
    weights = load_file(model / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"][0, 0] += 1
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(ConfigError, match=r"checkpoint-1 belongs to another model: the weights in .* have changed"):
        resume(config)


def test_settings_that_only_observe_may_change(killed, uninterrupted):
    changes = {
        "save_steps": 5,
        "save_total_limit": 1,
        "report_to": ["tensorboard"],
        "num_eval_prompts": 2,
        "eval_steps": 7,
    }
    resume(killed, **changes)
    lines = [line for line in metrics_of(killed) if "loss" in line]
    assert lines == [line for line in metrics_of(uninterrupted) if "loss" in line]
    assert_same_weights(killed, uninterrupted)


def rewrite_extra(config, change):
    """Edit the JSON of every checkpoint, as an older version would have written it."""
    for folder in Path(config.output_dir).glob("checkpoint-*"):
        trainer = json.loads((folder / "trainer.json").read_text())
        change(trainer["extra"])
        (folder / "trainer.json").write_text(json.dumps(trainer))
        manifest = json.loads((folder / "checkpoint.json").read_text())
        content = (folder / "trainer.json").read_bytes()
        manifest["files"]["trainer.json"] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        (folder / "checkpoint.json").write_text(json.dumps(manifest))


def test_a_checkpoint_older_than_a_setting_has_its_default(killed):
    rewrite_extra(killed, lambda extra: extra["config"].pop("length_penalty"))
    with pytest.raises(ConfigError, match=r"length_penalty was 0\.0 and is 0\.5"):
        resume(killed, length_penalty=0.5)


def test_a_checkpoint_older_than_settings_and_hashes_resumes(killed, uninterrupted):
    rewrite_extra(killed, lambda extra: (extra["config"].pop("length_penalty"), extra.pop("origin")))
    assert_same_run(resume(killed), uninterrupted)


# A used folder


@pytest.mark.parametrize("ending", ["killed", "finished"])
def test_a_used_output_dir_is_refused_and_untouched(killed, uninterrupted, ending):
    config = killed if ending == "killed" else uninterrupted
    before = snapshot(config.output_dir)
    with pytest.raises(ConfigError, match="already holds a run: choose another folder, or continue") as caught:
        train(config.model_copy(update={"seed": 7}), progress=False)
    assert repr(config.output_dir) in str(caught.value)
    assert snapshot(config.output_dir) == before


def test_a_checkpoint_is_not_resumed_in_another_runs_folder(killed, uninterrupted):
    folder, checkpoint = uninterrupted.output_dir, f"{killed.output_dir}/checkpoint-6"
    before = snapshot(folder)
    with pytest.raises(ConfigError, match=r"run' already holds another run than .*checkpoint-6'"):
        resume(killed, resume_from_checkpoint=checkpoint, output_dir=folder)
    assert snapshot(folder) == before


def test_a_lora_checkpoint_holds_only_the_adapter(interrupted):
    config = interrupted(max_steps=1, save_steps=0, **LORA)
    folder = Path(config.output_dir)
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    train(config, progress=False)
    assert (folder / "notes.txt").read_text() == "mine", "other files in output_dir are left alone"
    assert all("lora_" in name for name in load_file(folder / "checkpoint-1" / "model.safetensors"))
    extra = json.loads((folder / "checkpoint-1" / "trainer.json").read_text())["extra"]
    assert extra["config"] == config.model_dump()
