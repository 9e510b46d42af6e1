"""What others wrote is data: no model, data set or recipe runs code, nothing is sent, and no secret is written down."""

from __future__ import annotations

import json
import pickle
import shutil
import socket
import sys

import datasets
import huggingface_hub
import pytest
import yaml

from hypo_train.cli import main
from hypo_train.config import ConfigError, load_config
from hypo_train.data.errors import DataError
from hypo_train.dry_run import DryRun
from hypo_train.model.tree_model import ModelError
from hypo_train.preflight import check
from hypo_train.prepare import prepare
from hypo_train.train import train

TOKEN = "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"


@pytest.fixture
def marker(tmp_path):
    """What foreign code would write."""
    return tmp_path / "code-was-run"


def code_of(marker, body=""):
    return f"import pathlib\npathlib.Path({str(marker)!r}).touch()\n{body}"


@pytest.fixture
def model_with_code(saved_model, tmp_path, marker):
    """A folder whose config asks for classes of its own, of a kind that transformers does not know."""
    folder = tmp_path / "with-code"
    shutil.copytree(saved_model(), folder)
    config = json.loads((folder / "config.json").read_text())
    auto_map = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "own", "auto_map": auto_map}))
    body = "from transformers import LlamaConfig, LlamaForCausalLM\n"
    body += 'class OwnConfig(LlamaConfig):\n    model_type = "own"\n'
    body += "class OwnModel(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    (folder / "own.py").write_text(code_of(marker, body))
    return folder


@pytest.fixture
def own_modules(monkeypatch, tmp_path):
    """Where transformers copies the code of models that are trusted."""
    from transformers import dynamic_module_utils

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", list(sys.path))


def test_a_models_remote_code_is_refused_and_not_run(settings, model_with_code, marker, own_modules):
    with pytest.raises(ModelError, match="trust_remote_code"):
        prepare(settings(model=model_with_code))
    assert not marker.exists()


def test_trusted_remote_code_runs(settings, model_with_code, marker, own_modules):
    train(settings(model=model_with_code, trust_remote_code=True, max_steps=1), progress=False)
    assert marker.exists()


def test_reading_a_run_folder_does_not_trust_remote_code(settings, model_with_code, own_modules, tmp_path, capsys):
    config = settings(algorithm="dpo", model=model_with_code, trust_remote_code=True, max_steps=1, num_eval_rows=4)
    train(config, progress=False)
    for source in (config.output_dir, f"{config.output_dir}/checkpoint-1"):
        export = ["export", source, "--output_dir", str(tmp_path / "out")]
        capsys.readouterr()
        assert main(export) == 2
        assert "add --trust_remote_code if you have read that code and trust it" in capsys.readouterr().err
    assert main(["evaluate", config.output_dir]) == 2
    assert "add --trust_remote_code if" in capsys.readouterr().err
    assert main([*export, "--trust_remote_code"]) == 0


def test_code_beside_a_model_that_transformers_knows_is_not_run(settings, saved_model, tmp_path, marker):
    folder = tmp_path / "model"
    shutil.copytree(saved_model(), folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps({**config, "auto_map": {"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M"}})
    )
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(
        json.dumps({**tokenizer, "auto_map": {"AutoTokenizer": ["own.T", None]}})
    )
    for name in ("own.py", "modeling_llama.py", "tokenization_llama.py", "__init__.py"):
        (folder / name).write_text(code_of(marker))
    try:
        prepare(settings(model=folder))
    except ModelError as error:
        assert "trust_remote_code" in str(error)  # noqa: PT017 either it is refused or its own code is left alone
    assert not marker.exists()


class _Touch:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        import pathlib

        return pathlib.Path.touch, (pathlib.Path(self.path),)


def test_weights_that_are_a_pickle_with_code_are_refused(settings, saved_model, tmp_path, marker):
    folder = tmp_path / "model"
    shutil.copytree(saved_model(), folder, ignore=shutil.ignore_patterns("*.safetensors"))
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"lm_head.weight": _Touch(marker)}))
    with pytest.raises(ModelError, match="has its weights as a pickle"):
        prepare(settings(model=folder))
    assert not marker.exists()


def test_a_data_set_with_a_script_does_not_run_it(settings, tmp_path, marker):
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "data.py").write_text(code_of(marker))
    with pytest.raises(DataError):
        prepare(settings(dataset_name=str(folder)))
    assert not marker.exists()


@pytest.mark.parametrize(
    "tag", ["python/object/apply:os.system", "python/object/new:os.system", "python/name:os.system"]
)
def test_a_recipe_cannot_run_code(tmp_path, marker, tag):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"model_name_or_path: m\ndataset_name: d\nseed: !!python/{tag} ['touch {marker}']\n")
    with pytest.raises(ConfigError, match="not valid YAML: line 3: could not determine a constructor"):
        load_config(["--config", str(recipe)])
    assert not marker.exists()


@pytest.mark.parametrize("dry", [False, True])
def test_a_run_on_local_files_opens_no_connection(settings, monkeypatch, dry):
    """No telemetry: not ours, and not that of the libraries, which are online here."""
    asked = []

    def refuse(self, address, *_):
        asked.append(address)
        raise OSError("no network in tests")

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *arguments, **_: refuse(None, arguments))
    config = settings(max_steps=1, num_eval_rows=4, report_to=["tensorboard"])
    if dry:
        check(config, DryRun())
    else:
        train(config, progress=False)
    assert asked == []


@pytest.mark.parametrize("dry", [False, True])
def test_a_token_is_neither_printed_nor_written(settings, tmp_path, monkeypatch, capfd, dry):
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY", "JUDGE_API_KEY"):
        monkeypatch.setenv(name, TOKEN)
    monkeypatch.setattr("hypo_train.preflight.hub._is_unreachable", lambda: True)
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(settings(max_steps=1, report_to=["tensorboard"]).model_dump(exclude_defaults=True)))
    assert main(["--config", str(path), *(["--dry-run"] if dry else [])]) == 0
    assert main(["--config", str(path), "--output_dir", str(tmp_path / "x"), "--dataset_name", "no/such"]) == 2
    assert TOKEN not in "".join(capfd.readouterr())
    written = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert dry or any(file.name == "config.yaml" for file in written)
    assert not [file for file in written if TOKEN.encode() in file.read_bytes()]
