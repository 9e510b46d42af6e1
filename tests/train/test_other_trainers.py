"""Recipes of other trainers: each of their settings has its counterpart here, or a line that says what to do."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
import yaml
from markdown_blocks import blocks, text_of
from pydantic import ValidationError
from transformers import Seq2SeqTrainingArguments

from hypo_train.config import Config, ConfigError, load_config
from hypo_train.other_trainers import TABLES, advice_on
from hypo_train.other_trainers.values import VALUES

PUBLISHED = yaml.safe_load((Path(__file__).parent / "published_fields.yaml").read_text(encoding="utf-8"))
REQUIRED = "model_name_or_path: m\ndataset_name: d\n"
PARTNERS = {
    "algorithm: rloo": {"reward": "module:function"},
    "load_in_4bit: true": {"use_peft": True},
    "load_best_model_at_end: true": {"num_eval_rows": 8, "eval_steps": 100},
    "push_to_hub: true": {"hub_model_id": "organisation/name"},
}
ENTRIES = [(trainer, advice) for trainer, table in TABLES.items() for advice in table]


def lines_of(tmp_path, text):
    """Return the lines of the error about a recipe, without the name of its file."""
    path = tmp_path / "recipe.yaml"
    path.write_text(("" if "model_name_or_path" in text else REQUIRED) + text, encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        load_config(["--config", str(path)])
    lines = str(caught.value).removeprefix("1 problem in the configuration: ").split("\n  ")
    return [line.replace(f" in {path}", "") for line in lines]


def unanswered(names):
    return sorted(name for name in names if name not in Config.model_fields and advice_on(name) is None)


@pytest.mark.parametrize("trainer", PUBLISHED)
def test_every_published_setting_is_ours_or_is_answered(trainer):
    assert unanswered(PUBLISHED[trainer]["names"].split()) == []


def test_every_setting_of_the_installed_trl_is_answered():
    trl = pytest.importorskip("trl")
    kinds = ["DPO", "SFT", "Reward", "GRPO", "RLOO", "KTO"]
    configs = [*(getattr(trl, f"{kind}Config") for kind in kinds), trl.ScriptArguments, trl.ModelConfig]
    configs.append(Seq2SeqTrainingArguments)  # which LLaMA-Factory's are made of
    names = {field.name for config in configs for field in dataclasses.fields(config)}
    assert len(names) > 200
    assert unanswered(names) == []


def test_a_name_has_one_entry_and_is_no_field_of_ours():
    names = [name for _, advice in ENTRIES for name in advice]
    assert len(names) == len(set(names))
    assert not set(names) & set(Config.model_fields)


def test_counterparts_are_fields_of_ours():
    texts = [text for _, advice in ENTRIES for text in (advice.text, *advice.values.values())]
    quoted = [quote for text in texts for quote in re.findall(r"`([^`]*)`", text)]
    assert len(quoted) > 150
    unknown = [quote for quote in quoted if quote.partition(":")[0] not in Config.model_fields]
    assert unknown == []


def test_a_value_that_is_recommended_is_one_that_is_taken():
    texts = [text for _, advice in ENTRIES for text in (advice.text, *advice.values.values())]
    settings = {quote for text in texts for quote in re.findall(r"`(\w+: [\w./-]+)`", text)}
    assert "use_peft: true" in settings
    required = yaml.safe_load(REQUIRED)
    for setting in settings:
        Config.model_validate(required | PARTNERS.get(setting, {}) | yaml.safe_load(setting))


def test_advice_is_one_line_that_says_what_to_do():
    for _, advice in ENTRIES:
        for name in advice:
            for value in (..., None, False, True, "x"):
                text = advice_on(name, value)
                assert "\n" not in text
                assert re.match(r"(use|set) |.*(leave it out|, \w+)", text), (name, text)


@pytest.mark.parametrize(
    ("line", "answer"),
    [
        ("rpo_alpha: 1.0", "use loss_type: [sigmoid, sft] with loss_weights: [1, rpo_alpha]"),
        ("rpo_alpha: null", "with this value nothing is different here, leave it out"),
        ("repetition_penalty: 1.0", "with this value nothing is different here, leave it out"),
        ("packing: true", "rows are always packed, leave it out"),
        ("rl: dpo", "use algorithm: dpo"),
        ("use_muon: true", "use optim: muon for true"),
        ("use_muon: false", "with this value nothing is different here, leave it out"),
        ("rl: grpo", "GRPO is not served, use algorithm: rloo, or algorithm: hypo for pairs and samples"),
        ("stage: rm", "use algorithm: reward"),
        ("finetuning_type: lora", "set use_peft: true"),
        ("adapter: qlora", "set use_peft: true and load_in_4bit: true"),
        ("eval_strategy: steps", "eval_steps alone says it, leave it out"),
        ("save_strategy: 'no'", "use save_steps: 0"),
        ("save_strategy: no", "use save_steps: 0"),
        ("val_set_size: 0.05", "use num_eval_rows, a number of rows and not a share"),
        ("micro_batch_size: 2", "use per_device_train_batch_size"),
        ("torch_dtype: bfloat16", "use dtype, which is that of the frozen weights: trained weights are float32"),
    ],
)
def test_an_answer_is_about_the_name_and_the_value(tmp_path, line, answer):
    assert lines_of(tmp_path, line) == [f"unknown key {line.partition(':')[0]!r}: {answer}"]


PAGE = "docs/coming_from.md"


@pytest.mark.parametrize("block", blocks("text", PAGE), ids=str)
def test_a_recipe_on_the_page_is_answered_line_by_line(tmp_path, block):
    names = yaml.safe_load(block.text).keys()
    lines = lines_of(tmp_path, block.text)
    answered = {re.match(r"unknown key '(\w+)': ", line)[1] for line in lines if line.startswith("unknown")}
    assert answered == {name for name in names if name not in Config.model_fields}


@pytest.mark.parametrize("block", blocks("yaml", PAGE), ids=str)
def test_a_translated_recipe_says_what_the_answers_say(block):
    """test_docs.py reads it as a configuration. Here: each field that an answer names is in it, or is a default."""
    theirs = next(b for b in reversed(blocks("text", PAGE)) if b.line < block.line)
    ours = yaml.safe_load(block.text)
    for name, value in yaml.safe_load(theirs.text).items():
        if name in Config.model_fields:
            assert name in ours or name in ("attn_implementation", "bf16", "weight_decay"), name
        elif (answer := advice_on(name, value)).startswith(("use ", "set ")) and "leave it out" not in answer:
            assert any(word in ours for word in re.findall(r"\w+", answer)), (name, answer)


def test_defaults_that_differ_from_trl_are_on_the_page():
    trl = pytest.importorskip("trl")
    page = text_of(PAGE).partition("## Other defaults")[2].partition("## All settings")[0]
    configs = (getattr(trl, f"{kind}Config") for kind in ("DPO", "SFT", "RLOO", "GRPO"))
    kinds = [trl.ScriptArguments, trl.ModelConfig, *configs]
    fields = {(field.name, repr(field.default)) for kind in kinds for field in dataclasses.fields(kind)}
    ours = {name: field.default for name, field in Config.model_fields.items() if not field.is_required()}
    differing = {name for name, default in fields if name in ours and default not in (repr(ours[name]), "None")}
    assert {"num_train_epochs", "lora_dropout"} < differing
    assert {name for name in differing if f"`{name}`" not in page} == set()


def test_every_line_of_a_recipe_is_answered_at_once(tmp_path):
    text = "rl: dpo\ndatasets:\n  - path: a/b\n    split: train\nsequence_len: 2048\nlerning_rate: 1e-6\nxyzzy: 1\n"
    lines = lines_of(tmp_path, text)
    assert lines[0] == "5 problems in the configuration:"
    assert [re.search(r"'(\w+)'", line)[1] for line in lines[1:]] == [
        "rl", "datasets", "sequence_len", "lerning_rate", "xyzzy",
    ]  # fmt: skip
    assert lines[2].startswith("unknown key 'datasets': use dataset_name for its path")
    assert lines[4].endswith("did you mean learning_rate?")
    assert lines[5].endswith("(--help lists the fields)")


def test_a_flag_is_answered_like_a_key():
    with pytest.raises(ConfigError, match="unknown flag --rl: use algorithm: dpo"):
        load_config(["--model_name_or_path", "m", "--dataset_name", "d", "--rl", "dpo"])


@pytest.mark.parametrize("name", ["lora_beta", "ref_model_path", "loss_alpha", "num_rollouts"])
def test_a_name_that_only_resembles_ours_gets_no_suggestion(tmp_path, name):
    [line] = lines_of(tmp_path, f"{name}: 1")
    assert "did you mean" not in line


@pytest.mark.parametrize(
    ("line", "field", "value"),
    [
        ("bf16: true", "bf16", True),
        ("learning_rate: 1e-6", "learning_rate", 1e-6),
        ("learning_rate: '5.0e-7'", "learning_rate", 5e-7),
        ("lr_scheduler_type: 'cosine'", "lr_scheduler_type", "cosine"),
        ("optim: adamw_torch", "optim", "adamw_torch"),
        ("report_to: [wandb]", "report_to", ["wandb"]),
        ("report_to: none", "report_to", []),
        ("use_peft: 'true'", "use_peft", True),
        ("attn_implementation: flash_attention_2", "attn_implementation", "flash_attention_2"),
        ("lora_target_modules: q_proj,v_proj", "lora_target_modules", ["q_proj", "v_proj"]),
        ("lora_target_modules: 'q_proj, v_proj'", "lora_target_modules", ["q_proj", "v_proj"]),
        ("lora_target_modules: [all-linear]", "lora_target_modules", "all-linear"),
        ("lora_target_modules: '.*(q|v)_proj'", "lora_target_modules", ".*(q|v)_proj"),
        ("lora_target_modules: '.*\\d{1,2}.q_proj'", "lora_target_modules", ".*\\d{1,2}.q_proj"),
        ("num_train_epochs: 3", "num_train_epochs", 3.0),
        ("max_steps: -1", "max_steps", -1),
    ],
)
def test_a_value_in_their_spelling_is_read_as_ours(tmp_path, line, field, value):
    path = tmp_path / "recipe.yaml"
    path.write_text(REQUIRED + line, encoding="utf-8")
    assert getattr(load_config(["--config", str(path)]), field) == value


@pytest.mark.parametrize(
    ("line", "answer"),
    [
        ("dtype: auto", "dtype='auto': use float32 or bfloat16 for frozen weights"),
        ("bf16: auto", "bf16='auto': leave it out: CUDA computes under bfloat16"),
        ("save_steps: 0.5", "save_steps=0.5: a share of the steps is not served, use a number of steps"),
        ("fsdp: full_shard auto_wrap", "fsdp='full_shard auto_wrap': use true or false"),
        ("fsdp: [full_shard, auto_wrap]", "fsdp=['full_shard', 'auto_wrap']: use true or false"),
        ("optim: paged_adamw_32bit", "optim='paged_adamw_32bit': use adamw_torch"),
        ("report_to: all", "report_to='all': name the trackers"),
        ("report_to: [wandb, swanlab]", "report_to='swanlab': name the trackers"),
        ("lora_target_modules: all", "lora_target_modules='all': use all-linear"),
        ("top_k: -1", "top_k=-1: use 0 for all tokens"),
        ("algorithm: grpo", "algorithm='grpo': GRPO is not served, use rloo"),
    ],
)
def test_a_value_of_theirs_is_refused_with_ours(tmp_path, line, answer):
    [found] = lines_of(tmp_path, line)
    assert found.startswith(answer)


def test_a_list_for_one_name_is_not_told_to_be_quoted(tmp_path):
    text = REQUIRED.replace("dataset_name: d", "dataset_name: [a, b]")
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match="should be one name or value, not a list or a mapping") as caught:
        load_config(["--config", str(path)])
    assert "quotes" not in str(caught.value)


def test_values_that_are_answered_are_values_that_are_refused():
    for name, answers in VALUES.items():
        for value in answers:
            values = yaml.safe_load(REQUIRED) | {name: yaml.safe_load(value)}
            with pytest.raises(ValidationError):
                Config.model_validate(values)
