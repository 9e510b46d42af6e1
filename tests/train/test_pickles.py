"""Weights and checkpoints are read from safetensors and JSON: what is in a pickle never runs."""

from __future__ import annotations

import ast
import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch

import hypo_train
from hypo_train.checkpoint.files import load_checkpoint
from hypo_train.checkpoint.state import resume, save, save_model
from hypo_train.metrics.meter import Meter
from hypo_train.model.load import load_policy
from hypo_train.model.trained_weights import put_trained_weights
from hypo_train.model.tree_model import ModelError
from hypo_train.prepare import prepare
from hypo_train.train import train


class Malicious:
    """Unpickled anywhere, it makes a file."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return (Path.touch, (self.marker,))


@pytest.fixture
def marker(tmp_path):
    """The file that a pickle would make; that there is none is checked after the test."""
    path = tmp_path / "it-ran"
    yield path
    assert not path.exists()


def plant(path, marker):
    path.write_bytes(pickle.dumps({"weight": Malicious(marker)}))


def without_safetensors(folder, target):
    shutil.copytree(folder, target)
    for path in target.glob("*.safetensors"):
        path.unlink()
    return target


def test_a_pickle_of_these_tests_runs_where_it_is_read(tmp_path):
    plant(tmp_path / "pytorch_model.bin", tmp_path / "marker")
    pickle.loads((tmp_path / "pytorch_model.bin").read_bytes())
    assert (tmp_path / "marker").exists()


@pytest.mark.parametrize("field", ["model_name_or_path", "reward_model_path"])
@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "model.pt"])
def test_a_model_that_is_a_pickle_is_refused_with_the_fix(settings, saved_model, tmp_path, marker, name, field):
    folder = without_safetensors(saved_model(), tmp_path / "start")
    plant(folder / name, marker)
    with pytest.raises(ModelError, match=rf"{field}: .* as a pickle \({name}\): only safetensors .*save_pretrained"):
        train(settings(**{"model" if field == "model_name_or_path" else field: str(folder)}))


def test_a_pickle_beside_safetensors_is_left_alone(settings, saved_model, tmp_path, marker):
    folder = tmp_path / "start"
    shutil.copytree(saved_model(), folder)
    plant(folder / "pytorch_model.bin", marker)
    load_policy(settings(model=folder), autocast=False)


@pytest.mark.parametrize("beside", [True, False])
def test_a_config_that_sends_to_a_pickle_is_refused(settings, saved_model, tmp_path, marker, beside):
    folder = tmp_path / "start"
    if beside:
        shutil.copytree(saved_model(), folder)
    else:
        without_safetensors(saved_model(), folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "transformers_weights": "weights.txt"}))
    plant(folder / "weights.txt", marker)
    with pytest.raises(ModelError, match=r"neither a safetensors file .* nor a safetensors index file|has no weights"):
        load_policy(settings(model=folder), autocast=False)


def test_an_adapter_that_is_a_pickle_is_refused(settings, tmp_path, marker):
    config = settings(algorithm="dpo", use_peft=True, lora_r=4)
    run = prepare(config)
    run.output_dir.mkdir(parents=True)
    final = save_model(run)
    (final / "adapter_model.safetensors").unlink()
    plant(final / "adapter_model.bin", marker)
    policy = load_policy(config, autocast=False)
    with pytest.raises(ModelError, match=r"as a pickle \(adapter_model.bin\)"):
        put_trained_weights(policy, final, trust_remote_code=False)


def test_pickles_in_a_checkpoint_are_not_read(settings, marker):
    run = prepare(settings(algorithm="dpo"))
    save(run, Meter(), 1)
    folder = run.output_dir / "checkpoint-1"
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin", "pytorch_model.bin"):
        plant(folder / name, marker)
    again = prepare(settings(algorithm="dpo", resume_from_checkpoint="auto"))
    assert resume(again, Meter()) == 1


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors"])
def test_a_pickle_under_the_name_of_safetensors_does_not_run(settings, marker, name):
    run = prepare(settings(algorithm="dpo"))
    save(run, Meter(), 1)
    folder = run.output_dir / "checkpoint-1"
    plant(folder / name, marker)
    manifest = json.loads((folder / "checkpoint.json").read_text())
    manifest["files"][name]["bytes"] = (folder / name).stat().st_size
    (folder / "checkpoint.json").write_text(json.dumps(manifest))
    with pytest.raises(Exception, match=r"(?i)header"):
        load_checkpoint(folder, optimizer=run.optimizer, verify=False)


def test_no_module_reads_pickles():
    """Neither by ``pickle`` nor by ``torch.load`` and its like, nor weights without asking for safetensors."""
    found = []
    for path in sorted(Path(hypo_train.__file__).parent.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [str(node.module)] if isinstance(node, ast.ImportFrom) else []
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                names.append(f"{node.value.id}.{node.attr}")
            found += [f"{path.name}: {n}" for n in names if n.split(".")[0] in READERS or n in READERS]
    assert found == []


READERS = {"pickle", "dill", "joblib", "shelve", "marshal", "torch.load", "torch.jit.load", "np.load", "numpy.load"}


def test_torch_saves_what_these_tests_call_a_pickle(tmp_path, saved_model, settings):
    """A checkpoint as torch.save writes one, and nothing made by hand, is refused as well."""
    folder = without_safetensors(saved_model(), tmp_path / "start")
    torch.save({"model.norm.weight": torch.ones(32)}, folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match="as a pickle"):
        load_policy(settings(model=folder), autocast=False)
