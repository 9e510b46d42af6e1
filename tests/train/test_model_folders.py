"""Folders that are given as a model and are none that can be trained: what a run and a dry run say of them at once."""

from __future__ import annotations

import json
import shutil
import sys

import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from hypo_train import preflight
from hypo_train.config import ConfigError
from hypo_train.dry_run import DryRun
from hypo_train.model.load import load_policy
from hypo_train.model.source import list_turn_end
from hypo_train.model.tree_model import ModelError
from hypo_train.prepare import prepare


@pytest.fixture
def folder(saved_model, tmp_path):
    """A copy of a saved model, for a test to spoil."""
    return shutil.copytree(saved_model(), tmp_path / "model")


@pytest.fixture
def said(settings, folder, monkeypatch):
    """``said(field=value)``: the one problem that a run on ``folder`` and its dry run name, without reading weights."""

    def find(*, dry=True, **changes):
        monkeypatch.setattr("hypo_train.build.load_policy", None)
        config = settings(model=folder, **changes)
        with pytest.raises((ModelError, ConfigError)) as caught:
            prepare(config)
        if dry:
            [problem] = preflight.check(config, DryRun()).problems
            assert str(caught.value) in str(problem)
        return str(caught.value)

    return find


def changed_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def loaded(settings, folder):
    with pytest.raises(ModelError) as caught:
        load_policy(settings(model=folder), autocast=False)
    return str(caught.value)


def test_an_adapter_is_told_to_be_merged(said, folder):
    for path in folder.glob("*.*"):
        path.unlink()
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "nowhere"}')
    message = said(dry=False)
    assert message.startswith(f"model_name_or_path: '{folder}' is an adapter and not a whole model: merge it")
    assert "python -m hypo_train export RUN --merge" in message


def test_a_gguf_file_is_told_to_be_converted(said, folder):
    (folder / "config.json").unlink()
    (folder / "model.gguf").touch()
    assert said(dry=False).endswith("convert it first, python -m hypo_train.convert_gguf FILE FOLDER")


def test_a_folder_without_weights_is_named(said, folder):
    (folder / "model.safetensors").unlink()
    assert said(dry=False).startswith(f"model_name_or_path: the folder '{folder}' has no weights (model.safetensors)")


@pytest.mark.parametrize("keep", [0, 5, 1000, -1])
def test_weights_that_are_cut_off_are_named(said, folder, keep):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    assert said() == f"model_name_or_path: '{path}' is damaged or cut off: download or copy it again"


def test_a_part_of_the_weights_that_is_not_there_is_named(said, folder):
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder, max_shard_size="20KB")
    (folder / "model.safetensors").unlink()
    parts = sorted(folder.glob("model-*.safetensors"))
    parts[1].unlink()
    assert f"1 of the {len(parts)} files of weights in '{folder}' are not there ({parts[1].name})" in said()


def test_a_model_in_parts_is_read(settings, folder):
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder, max_shard_size="20KB")
    (folder / "model.safetensors").unlink()
    load_policy(settings(model=folder), autocast=False)


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes", "fp8"])
def test_a_quantised_checkpoint_is_named(said, folder, method):
    changed_config(folder, quantization_config={"quant_method": method, "bits": 4, "load_in_4bit": True})
    assert f"'{folder}' is a quantised checkpoint ({method}): name the model that it was made from" in said()


def test_a_folder_without_a_tokenizer_is_told_where_to_get_one(said, folder):
    for path in folder.glob("token*"):
        path.unlink()
    assert "the folder has none; save it there as well" in said()


def test_what_a_library_says_in_its_second_line_is_said(said, folder):
    changed_config(folder, num_attention_heads=5)
    assert "is not a multiple of the number of attention heads (5)" in said()


def test_a_tokenizer_larger_than_the_model_is_refused(said, saved_model, folder):
    shutil.copytree(saved_model(vocab_size=20), folder, dirs_exist_ok=True)
    message = said()
    assert "the model knows 20 tokens, and its tokenizer has ids up to 36, of which 'and' (32) is needed" in message


def test_a_padding_token_that_the_model_does_not_know_is_named(said, folder):
    tokenizer = tiny.word_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(folder)
    assert "of which '[PAD]' (37) is needed" in said()


def test_unused_tokens_may_exceed_the_models_vocabulary(settings, folder):
    tokenizer = tiny.word_tokenizer()
    tokenizer.add_tokens(["<image>"])
    tokenizer.save_pretrained(folder)
    prepare(settings(model=folder))


def test_weights_of_another_shape_are_named_with_both(settings, folder):
    changed_config(folder, vocab_size=64)
    assert "lm_head.weight is (37, 32) there, and the config makes it (64, 32)" in loaded(settings, folder)


def test_a_config_with_too_few_layers_is_refused(settings, folder):
    """transformers would read the first of them in silence."""
    changed_config(folder, num_hidden_layers=1)
    message = loaded(settings, folder)
    assert "it has model.layers.1.input_layernorm.weight, and the config has 1 layers" in message


def test_weights_that_are_not_finite_are_named_as_such(settings, folder):
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.lm_head.weight[3, 4] = float("nan")
    model.save_pretrained(folder)
    assert "gives NaN or infinity on a few plain tokens: its weights are damaged" in loaded(settings, folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"impl": "triton"}, "impl=triton on a cpu: it needs a GPU, use impl: auto"),
        ({"use_liger_kernel": True}, "use_liger_kernel=true on a cpu: Liger's kernels need a GPU, leave it out"),
        ({"attn_implementation": "flashattention"}, "attn_implementation='flashattention': Specified "),
        ({"use_peft": True, "lora_target_modules": "("}, "lora_target_modules='(' is no regular expression: missing )"),
        (
            {"use_peft": True, "lora_target_modules": "q_proj|v_proj"},
            "lora_target_modules='q_proj|v_proj': this regular expression matches the whole name of no module",
        ),
        (
            {"use_peft": True, "lora_target_modules": ["q_prj", "v_proj"]},
            "lora_target_modules=['q_prj', 'v_proj']: LlamaForCausalLM has no module 'q_prj'; its linear ones are ",
        ),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="some of these are about a machine without a GPU")
def test_unsupported_settings_are_refused_before_weights_load(said, monkeypatch, changes, message):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert said(**changes).startswith(message)


def test_a_missing_engine_is_refused_before_weights_load(said, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    assert said(sampler="vllm") == "sampler=vllm needs vLLM: pip install 'hypo-kernels[vllm]' (or use sampler: auto)"


def test_a_saved_model_tells_servers_how_a_turn_ends(tmp_path):
    tokenizer = tiny.word_tokenizer(chat=True)
    tokenizer.eos_token = "<eos>"
    tiny.new_model("llama").save_pretrained(tmp_path)
    list_turn_end(tmp_path, tokenizer)
    ends = tokenizer.convert_tokens_to_ids(["<eos>", "<|im_end|>"])
    assert GenerationConfig.from_pretrained(tmp_path).eos_token_id == ends
    before = (tmp_path / "generation_config.json").stat().st_mtime_ns
    list_turn_end(tmp_path, tokenizer)
    assert (tmp_path / "generation_config.json").stat().st_mtime_ns == before
