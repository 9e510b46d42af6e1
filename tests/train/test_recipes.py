"""The paper's recipes: what they say, and a miniature of each that trains three steps.

A miniature runs in a folder where the names of the recipe lead to small models and data sets of the real formats. What
it changes besides is in ``SMALLER``: nothing but sizes.
"""

from __future__ import annotations

import json
import math
import re
import shlex
from pathlib import Path

import huggingface_hub
import pytest
import real_formats
import tiny
import torch
import yaml
from safetensors.torch import load_file
from transformers import GenerationConfig

from hypo_train.cli import main
from hypo_train.config import Config, load_config
from hypo_train.prepare import prepare
from hypo_train.train import train

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "hypo_train" / "recipes"
TLDR = [f"tldr/{kind}-{size}" for size in ("1.4b", "2.8b") for kind in ("sft", "reward", "dpo", "ipo", "hypo", "rloo")]
CHAT = ["ultrafeedback/dpo-8b", "ultrafeedback/hypo-8b"]


@pytest.fixture
def no_memory_estimate():
    """Where a test asks for it."""


# Steps, batch and ranks of a miniature; it has no GPU that would turn bf16 on. The lengths of TL;DR stay as they are.
SMALLER = {
    "max_steps": "3",
    "per_device_train_batch_size": "2",
    "gradient_accumulation_steps": "2",
    "per_device_eval_batch_size": "8",
    "num_eval_prompts": "4",
    "eval_steps": "0",
    "save_steps": "0",
    "logging_steps": "1",
    "report_to": "none",
    "bf16": "true",
}
SMALLER_LORA = {"lora_r": "4", "lora_alpha": "8"}
SMALLER_CHAT = {"max_prompt_length": "96", "max_completion_length": "64", "max_new_tokens": "16"}


def path_of(recipe: str) -> Path:
    return RECIPES / f"{recipe}.yaml"


def configuration(recipe: str, **flags: str) -> Config:
    return load_config(["--config", str(path_of(recipe)), *(f"--{name}={value}" for name, value in flags.items())])


def keys_of(path: Path) -> dict:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


# Recipes whose miniatures are trained in every run of the tests; the others' take as long again and are slow.
QUICK = ("tldr/sft-1.4b", "tldr/reward-1.4b", "tldr/hypo-1.4b", "tldr/rloo-1.4b", "ultrafeedback/hypo-8b")


def mark_slow(recipes: list[str]) -> list:
    return [recipe if recipe in QUICK else pytest.param(recipe, marks=pytest.mark.slow) for recipe in recipes]


# What they say


# arXiv 2406.01462, appendix D.2
TLDR_PAPER = {
    "learning_rate": 3e-6,
    "lr_scheduler_type": "cosine",
    "num_train_epochs": 1.0,
    "max_prompt_length": 512,
}
LORA = {"use_peft": True, "lora_r": 1024, "lora_alpha": 2048, "lora_dropout": 0.0}
PAPER = {
    "sft": {"use_peft": False},
    "reward": {"use_peft": False},
    "dpo": {"beta": 0.05, **LORA},
    "ipo": {"beta": 0.05, **LORA},
    "hypo": {"beta": 0.05, "kl_coef": 1e-4, "num_generations": 2, "max_new_tokens": 53, **LORA},
    "rloo": {"beta": 0.05, "num_generations": 2, "max_new_tokens": 53, **LORA},
}
CHAT_PAPER = {
    "model_name_or_path": "meta-llama/Meta-Llama-3-8B-Instruct",
    "dataset_name": "HuggingFaceH4/ultrafeedback_binarized",
    "learning_rate": 3e-6,
    "lr_scheduler_type": "linear",
    "num_train_epochs": 1.0,
    "beta": 0.05,
    "num_layers_unfrozen": 4,
    "use_peft": False,
}


@pytest.mark.parametrize("recipe", TLDR)
def test_a_tldr_recipe_has_the_papers_values(recipe):
    config = configuration(recipe)
    for name, value in {**TLDR_PAPER, **PAPER[config.algorithm]}.items():
        assert getattr(config, name) == value, name
    assert config.per_device_train_batch_size * config.gradient_accumulation_steps == 64
    assert f"tldr/{config.algorithm}-" in recipe


@pytest.mark.parametrize("recipe", CHAT)
def test_a_chat_recipe_has_the_papers_values(recipe):
    config = configuration(recipe)
    online = {"kl_coef": 2e-4, "num_generations": 2, "length_penalty": 0.02} if config.algorithm == "hypo" else {}
    for name, value in {**CHAT_PAPER, **online}.items():
        assert getattr(config, name) == value, name
    assert config.per_device_train_batch_size * config.gradient_accumulation_steps == 8


@pytest.mark.parametrize("size", ["1.4b", "2.8b"])
def test_chained_recipes_use_separate_folders(size):
    runs = {kind: configuration(f"tldr/{kind}-{size}") for kind in ("sft", "reward", "dpo", "ipo", "hypo", "rloo")}
    sft, reward = runs["sft"], runs["reward"]
    assert sft.model_name_or_path == f"EleutherAI/pythia-{size}-deduped"
    for kind, config in runs.items():
        assert config.output_dir == f"runs/tldr/{kind}-{size}"
        if kind != "sft":
            assert config.model_name_or_path == f"{sft.output_dir}/final"
    assert runs["rloo"].reward_model_path == f"{reward.output_dir}/final"


def test_every_recipe_is_tested_here_or_the_base_of_one():
    files = {path for folder in ("tldr", "ultrafeedback") for path in (RECIPES / folder).glob("*.yaml")}
    runs = {path_of(recipe) for recipe in TLDR + CHAT}
    bases = {path.parent / base for path in files if (base := keys_of(path).get("base"))}
    assert files == runs | bases


@pytest.mark.parametrize("recipe", TLDR + CHAT)
def test_no_recipe_repeats_its_base(recipe):
    path = path_of(recipe)
    own = keys_of(path)
    inherited: dict = {}
    while base := keys_of(path).get("base"):
        path = path.parent / base
        inherited = {**keys_of(path), **inherited}
    assert [name for name, value in own.items() if name != "base" and inherited.get(name, own) == value] == []


def commands(text: str) -> list[list[str]]:
    """The arguments of each command that trains."""
    joined = text.replace("\\\n", " ")
    return [shlex.split(line, comments=True) for line in re.findall(r"python -m hypo_train (--config .*)", joined)]


def test_readme_commands_name_existing_recipes_and_flags(monkeypatch):
    monkeypatch.chdir(ROOT)
    readme = (RECIPES / "README.md").read_text(encoding="utf-8")
    configs = {config.output_dir.removeprefix("runs/"): config for config in map(load_config, commands(readme))}
    figure_1 = {f"tldr/{algorithm}-2.8b-5-epochs" for algorithm in ("dpo", "hypo")}
    assert set(configs) == {recipe for recipe in TLDR + CHAT if not recipe.endswith(("2.8b", "ipo-1.4b"))} | figure_1
    for run in figure_1:
        config = configs[run]
        assert (config.num_train_epochs, config.num_eval_prompts) == (5, 300)
        assert config.dataset_test_split == "validation[:300]"
    for recipe in TLDR + CHAT:
        assert f"`{recipe.replace('2.8b', '1.4b')}.yaml`" in readme


@pytest.mark.parametrize("recipe", [recipe for recipe in TLDR + CHAT if "2.8b" not in recipe])
def test_a_recipe_says_how_it_is_run(recipe, monkeypatch):
    monkeypatch.chdir(ROOT)
    [arguments] = commands(path_of(recipe).read_text(encoding="utf-8"))
    assert load_config(arguments) == configuration(recipe)


# Dry runs, at full size


@pytest.fixture(scope="module")
def data_alone(tmp_path_factory):
    """A folder with the data sets that the recipes name, of which no model is there."""
    folder = tmp_path_factory.mktemp("data")
    real_formats.write_all(folder)
    return folder


TRAINED = {"1.4b": 201_326_592, "2.8b": 335_544_320, "8b": 1_397_788_672}
EVERYTHING = {"1.4b": 1_414_647_808, "2.8b": 2_775_208_960, "8b": 8_030_261_248}


@pytest.mark.slow
@pytest.mark.parametrize("recipe", TLDR + CHAT)
def test_a_recipe_runs_dry_without_weights_and_without_the_hub(recipe, data_alone, monkeypatch, capsys):
    monkeypatch.chdir(data_alone)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert main(["--config", str(path_of(recipe)), "--dry-run", "--dry_run_device", "cuda"]) == 0
    page, problems = capsys.readouterr()
    assert problems == ""
    config, size = configuration(recipe), recipe.rpartition("-")[2]
    # A reward model has a score in place of the head.
    everything = EVERYTHING[size] if config.algorithm != "reward" else None
    trained = TRAINED[size] if config.use_peft or config.num_layers_unfrozen else everything
    if everything is not None:
        assert f"{everything:,} parameters" in page
        assert f"training {trained:,} " in page
    assert "built in, the Hub was not reached" in page
    assert re.search(r"train: 24 of 2\d rows used", page)
    assert re.search(r"at least \d+\.\d\d GiB: fits a device of (24|48|80|141) GiB", page)
    assert not Path("runs").exists()


# Miniatures


class World:
    """A folder in which the names of the recipes lead to small things, and the runs that were made there."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.logs: dict[str, str] = {}
        for size, layers in (("1.4b", 2), ("2.8b", 3)):
            _save_pythia(folder / "EleutherAI" / f"pythia-{size}-deduped", layers)
        _save_llama(folder / "meta-llama" / "Meta-Llama-3-8B-Instruct")
        real_formats.write_all(folder)

    def config(self, recipe: str, **changes: str) -> Config:
        lora = SMALLER_LORA if configuration(recipe).use_peft else {}
        chat = SMALLER_CHAT if recipe in CHAT else {}
        return configuration(recipe, **{**SMALLER, **lora, **chat, **changes})

    def trained(self, recipe: str, capsys) -> tuple[Config, list[dict]]:
        """The metrics of a recipe's run, after those it starts from; each is run once."""
        config = self.config(recipe)
        for needed in (config.model_name_or_path, config.reward_model_path or ""):
            if needed.startswith("runs/"):
                self.trained(needed.removeprefix("runs/").removesuffix("/final"), capsys)
        if recipe not in self.logs:
            capsys.readouterr()
            train(config, progress=False)
            self.logs[recipe] = capsys.readouterr().out
        return config, [json.loads(line) for line in Path(config.output_dir, "metrics.jsonl").read_text().splitlines()]


def _save_pythia(folder: Path, layers: int) -> None:
    tokenizer = real_formats.pythia_tokenizer()
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": None}
    size = {"vocab_size": len(tokenizer), "num_hidden_layers": layers, "max_position_embeddings": 2048}
    tiny.new_model("gpt_neox", **ends, **size, initializer_range=0.05).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _save_llama(folder: Path) -> None:
    """Six layers: two are frozen below the recipe's four."""
    tokenizer = real_formats.llama_3_tokenizer()
    bos, end, turn = tokenizer.convert_tokens_to_ids(["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"])
    ends = {"bos_token_id": bos, "eos_token_id": [end, turn], "pad_token_id": None}
    size = {"vocab_size": len(tokenizer), "num_hidden_layers": 6, "max_position_embeddings": 8192}
    tiny.new_model("llama", **ends, **size, initializer_range=0.05, tie_word_embeddings=False).save_pretrained(folder)
    GenerationConfig(bos_token_id=bos, eos_token_id=[end, turn]).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.fixture(scope="module")
def whole_world(tmp_path_factory):
    return World(tmp_path_factory.mktemp("world"))


@pytest.fixture
def world(whole_world, monkeypatch):
    monkeypatch.chdir(whole_world.folder)
    return whole_world


STATISTICS = {
    "sft": {"loss"},
    "reward": {"loss", "accuracy", "margin"},
    "dpo": {"loss", "rewards/margins", "rewards/accuracies", "logps/chosen"},
    "ipo": {"loss", "rewards/margins", "rewards/accuracies", "logps/chosen"},
    "hypo": {"loss", "rewards/margins", "rewards/accuracies", "kl", "completions/mean_length"},
    "rloo": {"loss", "reward", "reward_std", "kl", "completions/mean_length"},
}
ONLINE = {"kl", "completions/mean_length"}


@pytest.mark.parametrize("recipe", mark_slow(TLDR + CHAT))
def test_each_recipes_miniature_trains_three_steps(world, capsys, recipe):
    config, [*lines, evaluation] = world.trained(recipe, capsys)
    assert config.algorithm in recipe
    assert [line["step"] for line in lines] == [1, 2, 3]
    for line in lines:
        assert line.keys() >= STATISTICS[config.algorithm]
        assert config.draws_samples or not line.keys() & ONLINE
        assert all(math.isfinite(value) for value in line.values())
    assert any(name.startswith("eval_") for name in evaluation)
    written = load_config(["--config", f"{config.output_dir}/config.yaml"])
    assert written == config
    assert Path(config.output_dir, "final", "config.json").is_file() or config.use_peft


@pytest.mark.parametrize("recipe", mark_slow(TLDR))
def test_a_tldr_miniature_reads_the_splits_and_cuts_long_posts(world, capsys, recipe):
    config, _ = world.trained(recipe, capsys)
    log = [line.strip() for line in world.logs[recipe].splitlines()]
    dropped = "train: 2 of 26 rows dropped: 2 with a news article (CNN/DM) where the post should be (rows 24, 25)"
    if config.algorithm in ("sft", "rloo"):
        assert "train: 24 of 24 rows used" in log
    else:
        assert "train: 24 of 26 rows used" in log
        assert dropped in log
    assert "eval: 8 of 8 rows used" in log
    assert "train: 2 of 24 (8.3%) prompts with their text shortened to have max_prompt_length tokens" in log
    assert not any("reads texts" in line or "a row of its own" in line for line in log)


@pytest.mark.parametrize(
    "recipe", mark_slow([recipe for recipe in TLDR if not recipe.startswith(("tldr/sft", "tldr/reward"))])
)
def test_a_tldr_policy_trains_lora_on_query_key_value_alone(world, capsys, recipe):
    config, _ = world.trained(recipe, capsys)
    adapter = json.loads(Path(config.output_dir, "final", "adapter_config.json").read_text())
    assert adapter["target_modules"] == ["query_key_value"]
    assert adapter["base_model_name_or_path"] == config.model_name_or_path
    weights = load_file(Path(config.output_dir, "final", "adapter_model.safetensors"))
    assert all(".attention.query_key_value.lora_" in name for name in weights)
    layers = {"1.4b": 2, "2.8b": 3}[recipe[-4:]]
    assert len(weights) == 2 * layers
    assert any(weight.abs().max() > 0 for name, weight in weights.items() if "lora_B" in name)


@pytest.mark.parametrize(
    "recipe", mark_slow([recipe for recipe in TLDR if recipe.startswith(("tldr/sft", "tldr/reward"))])
)
def test_sft_and_the_reward_model_train_every_weight(world, capsys, recipe):
    config, _ = world.trained(recipe, capsys)
    before = load_file(Path(config.model_name_or_path, "model.safetensors"))
    after = load_file(Path(config.output_dir, "final", "model.safetensors"))
    shared = before.keys() & after.keys()
    still = {name for name in shared if torch.equal(before[name].float(), after[name].float())}
    assert after.keys() - before.keys() == ({"score.weight"} if config.algorithm == "reward" else set())
    # Bradley–Terry leaves the zero of a reward open: what all rewards have in common learns nothing.
    assert still <= ({"gpt_neox.final_layer_norm.bias"} if config.algorithm == "reward" else set())


def test_rloo_uses_the_reward_model_that_was_trained_before(world, capsys):
    world.trained("tldr/rloo-1.4b", capsys)
    run = prepare(world.config("tldr/rloo-1.4b", output_dir="runs/again"))
    row = run.plan.train_rows[0]
    cut = list(row.prompt[-3:])
    ended = [*cut, run.tokenizer.eos_token_id]
    rewards = run.reward([row.prompt], [ended, cut]).tolist()
    assert rewards[0] - rewards[1] == pytest.approx(1.0)


@pytest.mark.parametrize("recipe", mark_slow(CHAT))
def test_a_chat_miniature_trains_the_last_layers_norm_and_head(world, capsys, recipe):
    config, _ = world.trained(recipe, capsys)
    before = load_file(Path(config.model_name_or_path, "model.safetensors"))
    after = load_file(Path(config.output_dir, "final", "model.safetensors"))
    assert before.keys() == after.keys()
    frozen = ("model.embed_tokens", "model.layers.0.", "model.layers.1.")
    for name, weight in before.items():
        same = torch.equal(weight.to(torch.bfloat16).float(), after[name].float())
        assert same is name.startswith(frozen), name


@pytest.mark.parametrize("recipe", mark_slow(CHAT))
def test_a_chat_miniature_uses_llamas_template(world, capsys, recipe):
    world.trained(recipe, capsys)
    log = [line.strip() for line in world.logs[recipe].splitlines()]
    assert "train: 24 of 24 rows used" in log
    assert "eval: 6 of 6 rows used" in log
    run = prepare(world.config(recipe, output_dir="runs/again"))
    row = run.plan.train_rows[0]
    prompt, chosen = (run.tokenizer.decode(ids) for ids in (row.prompt, row.chosen))
    assert prompt.startswith("<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nMy [24F] flatmate")
    assert prompt.endswith("<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n")
    assert chosen.endswith("<|eot_id|>")
    assert chosen.count("<|") == 1


def test_the_length_penalty_of_chat_is_in_the_loss(world, capsys):
    config, [first, *_] = world.trained("ultrafeedback/hypo-8b", capsys)
    # Of the reference itself all log-ratios are 0, and what is left is DPO's log 2 and the lengths' part.
    lengths = config.kl_coef * config.length_penalty * first["completions/mean_length"]
    assert lengths > 1e-6
    assert first["loss"] == pytest.approx(math.log(2) + lengths, abs=1e-6)
