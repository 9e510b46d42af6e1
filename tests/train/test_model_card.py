"""The model card: its metadata, its text, and that no text from data or settings ends its block."""

from __future__ import annotations

import json

import pytest
import tiny
from huggingface_hub import ModelCard

from hypo_train.checkpoint.model_card import card_text
from hypo_train.config import Config
from hypo_train.train import train

SECRET = "hf_" + "a1B2" * 8


def config_of(**changes):
    settings = {"model_name_or_path": "org/model-1b", "dataset_name": "org/pairs", "output_dir": "/home/me/runs/x"}
    return Config(**{**settings, **changes})


def card_of(config, run, **options):
    return card_text(config, run, is_adapter=False, **options)


def run_folder(tmp_path, report=None, metrics=()):
    (tmp_path / "data.json").write_text(json.dumps(report or {"train": ["24 of 24 rows used"]}), encoding="utf-8")
    tiny.write_rows(tmp_path / "metrics.jsonl", metrics)
    return tmp_path


def test_the_final_model_of_a_run_has_a_card(settings):
    config = settings(algorithm="dpo", use_peft=True, lora_r=4, num_eval_rows=4)
    folder = train(config, progress=False).model_dir
    text = (folder / "README.md").read_text(encoding="utf-8")
    card = ModelCard(text)
    assert card.data.library_name == "peft"
    assert card.data.tags == ["dpo", "hypo-kernels", "lora"]
    assert "train: 20 of 20 rows used" in text
    assert "eval: the last 4 rows of split train" in text
    assert "learning_rate: 0.003" in text
    assert "| eval_loss |" in text
    assert "2305.18290" in text
    assert "[More Information Needed]" not in text, "peft's template is replaced"
    assert config.output_dir not in text.replace(config.dataset_name, "")


def test_the_hub_reads_the_cards_metadata(tmp_path):
    text = card_of(config_of(), run_folder(tmp_path))
    card = ModelCard(text)
    assert card.data.base_model == "org/model-1b"
    assert card.data.datasets == ["org/pairs"]
    assert card.data.pipeline_tag == "text-generation"
    assert card.data.library_name == "transformers"
    assert card.data.license is None
    assert "# license: the licence of these weights" in text


@pytest.mark.parametrize("export_from", ["elsewhere", "the run's folder"])
def test_folders_of_the_machine_are_named_by_their_last_part(tmp_path, monkeypatch, export_from):
    (tmp_path / "data" / "pairs").mkdir(parents=True)
    run = tmp_path / "runs" / "x"
    run.mkdir(parents=True)
    run_folder(run, {"train": ["3 rows of /home/me/private/sft-final are empty"]})
    monkeypatch.chdir(tmp_path if export_from == "the run's folder" else "/")
    config = config_of(
        model_name_or_path="/home/me/private/sft-final", dataset_name="data/pairs", reward_model_path="~/rewards/r1"
    )
    text = card_of(config, run)
    assert not any(word in text for word in ("/home", "private", "data/pairs", "~"))
    assert all(line in text for line in ("from sft-final", "dataset: pairs", "reward_model_path: r1"))
    card = ModelCard(text)
    assert (card.data.base_model, card.data.datasets) == (None, None), "data/pairs is no repository of the Hub"


def test_unknown_metadata_is_a_comment_to_fill_in(tmp_path):
    text = card_of(config_of(model_name_or_path="./runs/sft/final", dataset_name="a/b/pairs.jsonl"), tmp_path)
    card = ModelCard(text)
    assert card.data.base_model is None
    assert card.data.datasets is None
    assert "# base_model: the Hub name" in text
    assert "# datasets: the Hub names" in text


@pytest.mark.parametrize(
    ("header", "licence"),
    [
        ("---\nlicense: apache-2.0\n---\n", "apache-2.0"),
        ("---\nlicense: other\nlicense_name: llama3\nlicense_link: LICENSE\n---\n", "other"),
        ("---\nlicense: [a, b]\n---\n", None),
        ("---\n: {{ no yaml\n---\n", None),
        ("no header", None),
    ],
)
def test_the_licence_is_the_one_of_the_base_model(tmp_path, header, licence):
    start = tmp_path / "start"
    start.mkdir()
    (start / "README.md").write_text(header, encoding="utf-8")
    card = ModelCard(card_of(config_of(model_name_or_path=str(start)), tmp_path))
    assert card.data.license == licence
    assert card.data.license_name == ("llama3" if licence == "other" else None)


def test_default_and_machine_settings_are_left_out(tmp_path):
    text = card_of(config_of(beta=0.05, save_steps=10), tmp_path)
    assert "beta: 0.05" in text
    assert not any(word in text for word in ("save_steps", "/home/me", "kl_coef"))


def test_credentials_in_settings_are_not_shown(tmp_path):
    source = f"https://me:{SECRET}@host/pairs.jsonl?token={SECRET}"
    report = {"train": [f"24 rows of {source}"]}
    text = card_of(config_of(dataset_name=source, reward="a:b"), run_folder(tmp_path, report))
    assert SECRET not in text
    assert "https://***@host" in text


@pytest.mark.parametrize("text", ["```\n# breaks out\n```", "---\nlicense: mit\n---", "<script>alert(1)", "`````"])
def test_no_text_from_data_or_settings_leaves_its_block(tmp_path, text):
    run = run_folder(tmp_path, {"train": [text]})
    card = card_of(config_of(model_name_or_path=" ".join(text.split()), dataset_train_split=text), run)
    assert ModelCard(card).data.license is None
    inside, fence, outside = False, "", []
    for line in card.split("---\n", 2)[2].splitlines():
        if not inside and line.startswith("```"):
            inside, fence = True, line[: len(line) - len(line.lstrip("`"))]
        elif inside and line == fence:
            inside = False
        elif not inside:
            outside.append(line)
    assert not inside
    assert not any("script>" in line.replace("\\", "") and "\\<" not in line for line in outside)
    headings = [line for line in outside if line.startswith("#")]
    assert headings[1:] == ["## Data", "## Recipe", "## Versions", "## Citation"]


def test_metrics_are_those_of_the_saved_step(tmp_path):
    lines = [
        {"step": 2, "eval_kl": 1.25, "eval_kl_se": 0.5},
        {"step": 3, "loss": 1.0},
        {"step": 4, "eval_kl": 7.5},
    ]
    run = run_folder(tmp_path, metrics=lines)
    assert "| eval_kl | 7.5 |" in card_of(config_of(), run)
    at_3 = card_of(config_of(), run, step=3)
    assert "| eval_kl | 1.25 ± 0.5 |" in at_3
    assert "as it was after step 3" in at_3
    assert "## Evaluation" not in card_of(config_of(), run, step=1)
