"""What is exported from a run, or from what a crashed one left, loads with transformers and peft as it was trained."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import tiny
import torch
from huggingface_hub import ModelCard
from peft import PeftModel
from safetensors.torch import load_file
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import hypo_train.export.command as command
from hypo_train.checkpoint.state import save, save_model
from hypo_train.cli import main
from hypo_train.export.source import Source
from hypo_train.metrics.meter import Meter
from hypo_train.prepare import prepare

LORA = {"use_peft": True, "lora_r": 4, "lora_target_modules": "all-linear"}
LORA_HEAD = {**LORA, "lora_target_modules": ".*(q_proj|query_key_value|lm_head|embed_out)"}
WAYS = {
    "full": {},
    "last layer": {"num_layers_unfrozen": 1},
    "lora": LORA,
    "lora, head": LORA_HEAD,
    "dora": {**LORA, "use_dora": True},
}
IDS = torch.tensor([[5, 7, 9, 11, 20, 6]])
MODELS = {
    "llama": ("llama", {}),
    "llama, tied": ("llama", {"tie_word_embeddings": True}),
    "gpt_neox": ("gpt_neox", {}),
    "gpt2": ("gpt2", {}),  # Conv1D layers, and a head tied to the embeddings
    "gpt2, dora": ("gpt2", {}),
}


def trained_run(config):
    """A run whose weights have moved as far as training moves them, without its steps."""
    run = prepare(config)
    tiny.perturb(run.trained.trained_parameters().values(), size=0.1)
    run.trained.eval()
    (run.output_dir).mkdir(parents=True, exist_ok=True)
    (run.output_dir / "config.yaml").write_text(config.to_yaml(), encoding="utf-8")
    return run


def logits_of(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def loaded_whole(folder, kind=AutoModelForCausalLM):
    model, info = kind.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    return model.eval()


def export(source, folder, *flags):
    assert main(["export", str(source), "--output_dir", str(folder), *flags]) == 0
    assert not folder.with_name(folder.name + ".tmp").exists()
    return folder


@pytest.mark.parametrize("which", ["final", "checkpoint"])
@pytest.mark.parametrize("way", WAYS)
def test_an_exported_model_has_the_trained_models_logits(settings, tmp_path, saved_model, way, which):
    config = settings(algorithm="dpo", model=saved_model("gpt_neox", chat=True), **WAYS[way])
    run = trained_run(config)
    save_model(run) if which == "final" else save(run, Meter(), 2)
    merge = ["--merge"] if config.use_peft else []
    folder = export(run.output_dir, tmp_path / "out", "--dtype", "float32", *merge)
    assert_close(logits_of(loaded_whole(folder)), logits_of(run.policy.base), atol=1e-5, rtol=1e-5)
    start = Path(config.model_name_or_path)
    [file], [original] = folder.glob("*.safetensors"), start.glob("*.safetensors")
    assert load_file(file).keys() == load_file(original).keys()
    assert AutoTokenizer.from_pretrained(folder).chat_template == tiny.CHATML
    card = ModelCard.load(folder / "README.md")
    assert (card.data.library_name, card.data.tags) == ("transformers", ["dpo", "hypo-kernels"])
    assert {path.suffix for path in folder.iterdir()} <= {".json", ".safetensors", ".md", ".jinja"}


@pytest.mark.parametrize("name", MODELS)
def test_every_kind_of_head_is_written_with_the_adapter_in_it(settings, tmp_path, saved_model, name):
    architecture, changes = MODELS[name]
    targets = {"lora_target_modules": ["c_attn", "c_fc"]} if name.startswith("gpt2") else LORA_HEAD
    dora = {"use_dora": name == "gpt2, dora"}
    config = settings(algorithm="dpo", model=saved_model(architecture, **changes), **LORA | targets | dora)
    run = trained_run(config)
    save(run, Meter(), 2)
    folder = export(run.output_dir / "checkpoint-2", tmp_path / "out", "--merge", "--dtype", "float32")
    assert_close(logits_of(loaded_whole(folder)), logits_of(run.policy.base), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("tied", [False, True])
def test_merging_an_embedding_adapter_leaves_a_tied_head_alone(settings, tmp_path, saved_model, tied):
    targets = {"lora_target_modules": ["q_proj", "embed_tokens"]}
    model = saved_model("llama", tie_word_embeddings=tied)
    run = trained_run(settings(algorithm="dpo", model=model, **LORA | targets))
    save_model(run)
    folder = export(run.output_dir, tmp_path / "out", "--merge", "--dtype", "float32")
    assert_close(logits_of(loaded_whole(folder)), logits_of(run.policy.base), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("which", ["final", "checkpoint"])
def test_an_adapter_loads_in_peft(settings, tmp_path, which):
    run = trained_run(settings(algorithm="dpo", **LORA_HEAD))
    save_model(run) if which == "final" else save(run, Meter(), 2)
    folder = export(run.output_dir, tmp_path / "out")
    assert not (folder / "model.safetensors").exists()
    base = AutoModelForCausalLM.from_pretrained(run.config.model_name_or_path)
    loaded = PeftModel.from_pretrained(base, folder).eval()
    assert ModelCard.load(folder / "README.md").data.library_name == "peft"
    assert_close(logits_of(loaded), logits_of(run.policy.base), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("way", ["full", "lora"])
def test_a_reward_model_is_exported_from_a_checkpoint_too(settings, tmp_path, way):
    run = trained_run(settings(algorithm="reward", **WAYS[way]))
    save(run, Meter(), 2)
    folder = export(run.output_dir, tmp_path / "out", "--dtype", "float32", *["--merge"] * (way == "lora"))
    loaded = loaded_whole(folder, AutoModelForSequenceClassification)
    assert_close(logits_of(loaded), logits_of(run.trained.base), atol=1e-5, rtol=1e-5)


def test_the_sum_is_made_in_fp32_and_rounded_once(settings, tmp_path):
    run = trained_run(settings(algorithm="dpo", **LORA))
    save_model(run)
    exact = load_file(export(run.output_dir, tmp_path / "exact", "--merge", "--dtype", "float32") / "model.safetensors")
    folder = export(run.output_dir, tmp_path / "rounded", "--merge", "--dtype", "bfloat16")
    rounded = load_file(folder / "model.safetensors")
    assert all(torch.equal(rounded[name], weight.bfloat16()) for name, weight in exact.items())
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"


def test_exported_weights_have_the_dtype_of_the_start_by_default(settings, tmp_path):
    start = tiny.save(tiny.new_model("llama").bfloat16(), tmp_path / "start")
    run = trained_run(settings(algorithm="sft", model=start))
    save_model(run)
    assert loaded_whole(export(run.output_dir, tmp_path / "out")).dtype == torch.bfloat16


def test_saved_files_have_the_permissions_of_the_umask(settings, tmp_path):
    before = os.umask(0o027)
    try:
        run = trained_run(settings(algorithm="dpo", **LORA))
        save(run, Meter(), 1)
        final = save_model(run)
        folders = [final, run.output_dir / "checkpoint-1", export(run.output_dir, tmp_path / "out", "--merge")]
    finally:
        os.umask(before)
    files = [file for folder in folders for file in folder.iterdir()]
    assert sum(file.suffix == ".safetensors" for file in files) == 4
    assert {oct(file.stat().st_mode & 0o777) for file in files} == {"0o640"}


def test_an_export_holds_the_files_that_vllm_reads(settings, tmp_path):
    run = trained_run(settings(algorithm="dpo", **LORA))
    save_model(run)
    folder = export(run.output_dir, tmp_path / "out", "--merge")
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["dtype"] == "float32"
    assert "quantization_config" not in config
    assert (folder / "tokenizer.json").is_file()
    assert (folder / "generation_config.json").is_file()


def test_weights_of_4_bits_are_merged_as_they_were_trained(settings, tmp_path, saved_model):
    pytest.importorskip("bitsandbytes")
    config = settings(algorithm="dpo", model=saved_model(hidden_size=64), load_in_4bit=True, **LORA)
    run = trained_run(config)
    save_model(run)
    folder = export(run.output_dir, tmp_path / "out", "--merge", "--dtype", "float32")
    assert_close(logits_of(loaded_whole(folder)), logits_of(run.policy.base), atol=1e-4, rtol=1e-4)


def refused(capsys, *argv):
    assert main(["export", *map(str, argv)]) == 2
    [line] = capsys.readouterr().err.splitlines()
    return line


def test_nothing_is_ever_overwritten(settings, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    assert "exists already: choose a new folder" in refused(capsys, tmp_path, "--output_dir", tmp_path / "out")


def test_flags_that_do_not_fit_the_run_are_refused(settings, tmp_path, capsys):
    run = trained_run(settings(algorithm="dpo"))
    capsys.readouterr()  # drops the progress bars of loading
    out = ["--output_dir", tmp_path / "out"]
    assert "neither a final model nor a complete checkpoint" in refused(capsys, run.output_dir, *out)
    save_model(run)
    assert "--merge: the run trained no adapter" in refused(capsys, run.output_dir, *out, "--merge")
    assert "is no run (it has no config.yaml) and no checkpoint" in refused(capsys, tmp_path, *out)
    assert "there is no folder" in refused(capsys, tmp_path / "nowhere", *out)
    lora = trained_run(settings(algorithm="dpo", output_dir=str(tmp_path / "lora"), **LORA))
    save_model(lora)
    assert "an adapter keeps the float32" in refused(capsys, lora.output_dir, *out, "--dtype", "bfloat16")


def test_a_run_without_final_exports_its_newest_checkpoint(settings):
    run = trained_run(settings(algorithm="dpo"))
    for step in (1, 2):
        save(run, Meter(), step)
    assert Source.find(run.output_dir).folder.name == "checkpoint-2"
    save_model(run)
    assert Source.find(run.output_dir / "final").folder.name == "final"
    assert Source.find(run.output_dir / "checkpoint-1").is_checkpoint


def test_an_export_that_fails_leaves_nothing(settings, tmp_path, monkeypatch, capsys):
    run = trained_run(settings(algorithm="dpo"))
    save_model(run)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(command, "write_card", full)
    assert "No space left on device" in refused(capsys, run.output_dir, "--output_dir", tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def test_a_value_beyond_the_dtype_is_refused(settings, tmp_path, capsys):
    run = trained_run(settings(algorithm="dpo"))
    with torch.no_grad():
        next(iter(run.trained.trained_parameters().values()))[0] = 1e6
    save_model(run)
    line = refused(capsys, run.output_dir, "--output_dir", tmp_path / "out", "--dtype", "float16")
    assert "is not finite in float16: use --dtype float32" in line
