import copy
import json
import os
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

from hypo_train.checkpoint.files import (
    checkpoint_folder,
    latest_checkpoint,
    load_checkpoint,
    prune,
    save_checkpoint,
)
from hypo_train.optim import build_optimizer, build_scheduler
from hypo_train.utils.atomic import write_folder

FILES = ["checkpoint.json", "model.safetensors", "optimizer.safetensors", "trainer.json"]


class Run:
    """A small training run in which every step depends on the whole state: weights, moments, step count, rate."""

    def __init__(self, *, width=3, dtype=torch.float32):
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.LayerNorm(width), nn.Linear(width, 2))
        self.model.to(dtype)
        parameters = self.model.named_parameters()
        self.optimizer = build_optimizer(parameters, learning_rate=1e-2, weight_decay=0.1)
        self.scheduler = build_scheduler(self.optimizer, "cosine", warmup_steps=2, total_steps=12)
        self.steps = 0

    def train(self, steps):
        for _ in range(steps):
            generator = torch.Generator().manual_seed(self.steps)
            batch = torch.randn(5, 4, generator=generator).to(self.model[0].weight.dtype)
            self.optimizer.zero_grad()
            self.model(batch).square().sum().backward()
            self.optimizer.step()
            self.scheduler.step()
            self.steps += 1
        return self

    def save(self, output_dir, extra=None):
        folder = checkpoint_folder(output_dir, self.steps)
        save_checkpoint(
            folder,
            step=self.steps,
            model_state=self.model.state_dict(),
            optimizer=self.optimizer,
            scheduler=self.scheduler,
            extra=extra or {},
        )
        return folder

    def load(self, folder):
        checkpoint = load_checkpoint(folder, optimizer=self.optimizer, scheduler=self.scheduler)
        self.model.load_state_dict(checkpoint.model_state)
        self.steps = checkpoint.step
        return self

    def state(self):
        return copy.deepcopy(
            {
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "scheduler": self.scheduler.state_dict(),
                "steps": self.steps,
            }
        )


def assert_same(found, expected, path="state"):
    """Compare bit for bit, types included."""
    assert type(found) is type(expected), path
    if isinstance(expected, torch.Tensor):
        assert found.dtype == expected.dtype, path
        assert torch.equal(found, expected), path
    elif isinstance(expected, dict):
        assert found.keys() == expected.keys(), path
        for key in expected:
            assert_same(found[key], expected[key], f"{path}/{key}")
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected), path
        for index in range(len(expected)):
            assert_same(found[index], expected[index], f"{path}/{index}")
    else:
        assert found == expected, path


def damage(path, how):
    if how == "truncated":
        os.truncate(path, path.stat().st_size - 1)
    elif how == "flipped byte":
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 0xFF
        path.write_bytes(content)
    else:
        path.unlink()


def save_tensors(folder, tensors, step=1):
    run = Run()
    save_checkpoint(folder, step=step, model_state=tensors, optimizer=run.optimizer, scheduler=run.scheduler, extra={})


# Round trip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_checkpoint_restores_every_bit(tmp_path, dtype):
    run = Run(dtype=dtype).train(3)
    folder = run.save(tmp_path)
    assert folder == tmp_path / "checkpoint-3"
    assert_same(Run(dtype=dtype).load(folder).state(), run.state())


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path):
    uninterrupted = Run().train(9)
    folder = Run().train(4).save(tmp_path)
    resumed = Run().train(1).load(folder).train(5)  # loading discards the step that was done before it
    assert_same(resumed.state(), uninterrupted.state())


def test_a_checkpoint_before_the_first_step_can_be_resumed(tmp_path):
    folder = Run().save(tmp_path)
    assert_same(Run().load(folder).train(3).state(), Run().train(3).state())


def test_the_callers_json_is_restored(tmp_path):
    extra = {"cursor": {"epoch": 1, "row": 37}, "seed": 2**62 + 1, "best": 0.1 + 0.2, "name": "λ", "none": None}
    assert load_checkpoint(Run().save(tmp_path, extra)).extra == extra


def test_the_fp32_state_of_a_bf16_weight_is_not_rounded(tmp_path):
    run = Run(dtype=torch.bfloat16).train(1)
    for entries in run.optimizer.state.values():
        entries["exp_avg"] = torch.rand(entries["exp_avg"].shape)
    assert_same(Run(dtype=torch.bfloat16).load(run.save(tmp_path)).state(), run.state())


def test_the_state_of_sgd_is_restored(tmp_path):
    def build():
        torch.manual_seed(0)
        model = nn.Linear(3, 2)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        return model, optimizer, build_scheduler(optimizer, "constant", 0, 5)

    model, optimizer, scheduler = build()
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    optimizer.state[model.weight]["scale"] = 0.5  # not a tensor
    folder = checkpoint_folder(tmp_path, 1)
    save_checkpoint(folder, step=1, model_state={}, optimizer=optimizer, scheduler=scheduler, extra={})
    _, other, _ = build()
    load_checkpoint(folder, optimizer=other)
    assert_same(other.state_dict(), optimizer.state_dict())


@pytest.mark.parametrize("setting", ["fused", "foreach"])
def test_machine_settings_are_not_restored(tmp_path, setting):
    folder = Run().train(1).save(tmp_path)
    run = Run()
    for group in run.optimizer.param_groups:
        group[setting] = True
        group["lr"] = 123.0
    run.load(folder)
    for group in run.optimizer.param_groups:
        assert group[setting] is True
        assert group["lr"] != 123.0


def test_only_the_passed_tensors_are_saved(tmp_path):
    folder = checkpoint_folder(tmp_path, 1)
    save_tensors(folder, {"adapter": torch.ones(2)})
    assert load_checkpoint(folder).model_state.keys() == {"adapter"}


def test_tied_tensors_are_saved_once_and_restored_twice(tmp_path):
    weight = torch.randn(200, 50)
    folder = checkpoint_folder(tmp_path, 1)
    save_tensors(folder, {"embed.weight": weight, "norm": torch.ones(3), "lm_head.weight": weight})
    assert (folder / "model.safetensors").stat().st_size < 1.5 * weight.nbytes
    state = load_checkpoint(folder).model_state
    assert torch.equal(state["embed.weight"], weight)
    assert state["lm_head.weight"] is state["embed.weight"]


def test_views_of_one_storage_are_restored(tmp_path):
    base = torch.arange(24.0).view(4, 6)
    views = {
        "base": base,
        "flat": base.view(-1),
        "transposed": base.t(),
        "rows": base[1:3],
        "columns": base[:, ::2],
        "empty": base[:0],
        "empty too": base[:0],
        "scalar": base[2, 3],
    }
    folder = checkpoint_folder(tmp_path, 1)
    save_tensors(folder, views)
    state = load_checkpoint(folder).model_state
    assert state.keys() == views.keys()
    for name, expected in views.items():
        assert torch.equal(state[name], expected), name


def test_a_checkpoint_holds_safetensors_and_json_only(tmp_path):
    folder = Run().train(1).save(tmp_path)
    assert sorted(path.name for path in folder.iterdir()) == FILES
    for name in ("checkpoint.json", "trainer.json"):
        json.loads((folder / name).read_text())


# Another optimizer


def test_other_parameter_shapes_are_refused_before_loading(tmp_path):
    folder = Run(width=3).train(2).save(tmp_path)
    other = Run(width=5).train(1)
    before = other.state()
    with pytest.raises(ValueError, match=r"parameter 0 .* shape \(3, 4\) in the checkpoint and \(5, 4\)"):
        load_checkpoint(folder, optimizer=other.optimizer, scheduler=other.scheduler)
    assert_same(other.state(), before)


def test_other_parameter_counts_are_refused(tmp_path):
    folder = Run().train(2).save(tmp_path)
    other = build_optimizer(nn.Linear(4, 3).named_parameters(), learning_rate=1e-3)
    with pytest.raises(ValueError, match=r"has 2 \+ 4 parameters and this one 1 \+ 1"):
        load_checkpoint(folder, optimizer=other)


# Damage


def test_the_latest_checkpoint_has_the_highest_step(tmp_path):
    run = Run()
    for _ in range(11):
        run.train(1).save(tmp_path)
    assert latest_checkpoint(tmp_path) == tmp_path / "checkpoint-11"  # not checkpoint-9, last by name


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("how", ["truncated", "flipped byte", "missing"])
def test_a_damaged_checkpoint_is_named_and_skipped(tmp_path, how, name):
    run = Run()
    older, newer = run.train(1).save(tmp_path), run.train(1).save(tmp_path)
    damage(newer / name, how)
    with pytest.warns(UserWarning, match=rf"skipping the checkpoint {newer}: {name}"):
        assert latest_checkpoint(tmp_path) == older
    with pytest.raises(ValueError, match=name):
        load_checkpoint(newer)


def test_a_renamed_checkpoint_is_skipped(tmp_path):
    older = Run().train(1).save(tmp_path)
    shutil.copytree(older, tmp_path / "checkpoint-7")
    with pytest.warns(UserWarning, match="belongs to step 1"):
        assert latest_checkpoint(tmp_path) == older


def test_another_format_version_is_refused(tmp_path):
    folder = Run().save(tmp_path)
    manifest = json.loads((folder / "checkpoint.json").read_text())
    (folder / "checkpoint.json").write_text(json.dumps({**manifest, "format_version": 99}))
    with pytest.raises(ValueError, match="format version is 99"):
        load_checkpoint(folder)


def test_without_checkpoints_the_latest_is_none(tmp_path):
    (tmp_path / "checkpoint-notes").mkdir()
    (tmp_path / "checkpoint-5").write_text("a file")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert latest_checkpoint(tmp_path) is None
        assert latest_checkpoint(tmp_path / "not there") is None


def test_loading_a_missing_folder_names_it(tmp_path):
    with pytest.raises(ValueError, match="checkpoint-3 cannot be loaded"):
        load_checkpoint(tmp_path / "checkpoint-3")


# Killed while saving


def test_the_next_save_removes_a_killed_save(tmp_path):
    run = Run().train(1)
    complete = run.save(tmp_path)
    leftover = tmp_path / "checkpoint-2.tmp"
    shutil.copytree(complete, leftover)
    (leftover / "checkpoint.json").unlink()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert latest_checkpoint(tmp_path) == complete
    run.train(1).save(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-1", "checkpoint-2"]


class Killed(BaseException):
    """Stands for SIGKILL: no code of the package may catch it or clean up after it."""


def kill_at(monkeypatch, nth):
    """Raise Killed in place of the nth call that changes the disk."""
    calls, remove_tree = 0, shutil.rmtree

    def deadly(function):
        def wrapped(*arguments, **keywords):
            nonlocal calls
            calls += 1
            if calls == nth:
                if function is remove_tree:
                    for path in [*Path(arguments[0]).glob("*")][:1]:
                        path.unlink()  # midway through a removal
                raise Killed
            return function(*arguments, **keywords)

        return wrapped

    for module, name in [(os, "fsync"), (os, "rename"), (os, "mkdir"), (shutil, "rmtree")]:
        monkeypatch.setattr(module, name, deadly(getattr(module, name)))


def test_a_save_killed_anywhere_leaves_a_complete_checkpoint(tmp_path, monkeypatch):
    states = [Run().train(steps).state() for steps in range(4)]
    for nth in range(1, 100):
        output_dir = tmp_path / str(nth)
        run = Run().train(1)
        run.save(output_dir)
        run.train(1).save(output_dir)
        with monkeypatch.context() as patch:
            kill_at(patch, nth)
            try:
                run.save(output_dir)  # replaces the checkpoint of step 2
                run.train(1).save(output_dir)
                break
            except Killed:
                pass
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # nothing half-written under a final name
            resumed = Run().load(latest_checkpoint(output_dir))
        assert_same(resumed.state(), states[resumed.steps])
        resumed.train(1).save(output_dir)
        assert all(path.name.split("-")[1].isdigit() for path in output_dir.iterdir()), "leftovers"
    assert nth > 15, "every step of a save must be tried"


def test_saving_a_step_again_replaces_its_checkpoint(tmp_path):
    run = Run().train(2)
    run.save(tmp_path, {"attempt": 1})
    folder = run.save(tmp_path, {"attempt": 2})
    assert load_checkpoint(folder).extra == {"attempt": 2}
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]


def test_a_folder_with_the_wrong_step_is_refused(tmp_path):
    with pytest.raises(ValueError, match="name it checkpoint-1"):
        save_tensors(tmp_path, {}, step=1)


# Pruning


def test_prune_keeps_the_newest(tmp_path):
    run = Run()
    for _ in range(11):
        run.train(1).save(tmp_path)
    prune(tmp_path, keep=3)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"checkpoint-9", "checkpoint-10", "checkpoint-11"}


def test_prune_does_not_count_damaged_checkpoints(tmp_path):
    run = Run()
    folders = [run.train(1).save(tmp_path) for _ in range(4)]
    damage(folders[3] / "model.safetensors", "truncated")
    prune(tmp_path, keep=1)
    assert folders[2].exists()
    assert not folders[1].exists()
    assert not folders[0].exists()


def test_prune_leaves_other_folders_alone(tmp_path):
    Run().train(1).save(tmp_path)
    (tmp_path / "tensorboard").mkdir()
    (tmp_path / "checkpoint-best").mkdir()
    prune(tmp_path, keep=1)
    assert len(list(tmp_path.iterdir())) == 3


def test_a_link_is_replaced_and_its_target_left_alone(tmp_path):
    run, elsewhere = Run(), tmp_path / "other disk"
    first = run.train(1).save(tmp_path)
    shutil.move(first, elsewhere)
    first.symlink_to(elsewhere)
    assert latest_checkpoint(tmp_path) == first
    second = run.train(1).save(tmp_path)
    prune(tmp_path, 1)
    model = tmp_path / "final"
    model.symlink_to(elsewhere)
    write_folder(model, lambda folder: (folder / "config.json").write_text("{}"))
    assert sorted(tmp_path.iterdir()) == [second, model, elsewhere]
    assert [path.name for path in model.iterdir()] == ["config.json"]
    assert sorted(path.name for path in elsewhere.iterdir()) == FILES


def test_prune_keeps_at_least_one(tmp_path):
    with pytest.raises(ValueError, match="keep is 0"):
        prune(tmp_path, keep=0)


def test_a_subfolder_keeps_its_mode(tmp_path):
    """A tokenizer saves its other chat templates in a subfolder."""

    def write(folder):
        (folder / "additional_chat_templates").mkdir(mode=0o755)
        (folder / "additional_chat_templates" / "tool_use.jinja").write_text("{{ messages }}")

    write_folder(tmp_path / "final", write)
    assert (tmp_path / "final" / "additional_chat_templates").stat().st_mode & 0o111 == 0o111
