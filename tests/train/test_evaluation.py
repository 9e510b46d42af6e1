"""Evaluation of finished runs and of models without one: the numbers of training, and a KL that says what it is of."""

from __future__ import annotations

import csv
import json
import shutil
import statistics
from itertools import chain
from pathlib import Path

import pytest
import tiny
import torch
from short_runs import ROUNDING
from transformers import AutoModelForCausalLM

from hypo_train.cli import main
from hypo_train.metrics.log import read_metrics
from hypo_train.metrics.standard_error import standard_error
from hypo_train.train import train

LORA = {"use_peft": True, "lora_r": 4, "lora_target_modules": "all-linear"}
HELD_OUT = {"num_eval_rows": 6, "num_eval_prompts": 4, "num_eval_samples": 2}
WAYS = {
    "hypo": {"algorithm": "hypo", "reward": "tiny:reward_of_length"},
    "dpo": {"algorithm": "dpo", "temperature": 0.7},
    "sft": {"algorithm": "sft"},
    "rloo": {"algorithm": "rloo", "reward": "tiny:reward_of_length", "missing_eos_penalty": 0.5},
    "lora": {"algorithm": "dpo", **LORA},
    "lora sft": {"algorithm": "sft", **LORA},
    "last layer": {"algorithm": "hypo", "num_layers_unfrozen": 1},
    "reward": {"algorithm": "reward"},
    "lora reward": {"algorithm": "reward", **LORA},
}


def trained(settings, **changes):
    config = settings(**HELD_OUT, **changes)
    train(config, progress=False)
    return Path(config.output_dir)


@pytest.fixture
def evaluated(capsys):
    """``evaluated(run, "--flag", ...)`` is what metrics.json and samples.jsonl hold after the command."""

    def evaluate(*argv):
        assert main(["evaluate", *map(str, argv)]) == 0, capsys.readouterr().err
        folder = Path(capsys.readouterr().out.splitlines()[-1].removeprefix("written to "))
        samples = folder / "samples.jsonl"
        lines = samples.read_text(encoding="utf-8").splitlines() if samples.exists() else []
        return json.loads((folder / "metrics.json").read_text(encoding="utf-8")), [json.loads(line) for line in lines]

    return evaluate


def refusal(capsys, *argv):
    capsys.readouterr()
    assert main(["evaluate", *map(str, argv)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1, err
    return err.removeprefix("hypo_train: ").strip()


def completion_ids(sample):
    """A sample's tokens, or None where its text lacks some: a model may draw a special token in the middle."""
    ids = tiny.word_tokenizer()(sample["completion"]).input_ids + [tiny.EOS] * sample["ended"]
    return ids if len(ids) == sample["length"] else None


# A finished run


@pytest.mark.parametrize("way", WAYS)
def test_a_finished_run_evaluates_as_at_the_end_of_training(settings, evaluated, way):
    run = trained(settings, **WAYS[way])
    last = {name: v for name, v in read_metrics(run / "metrics.jsonl")[-1].items() if name != "step"}
    found, samples = evaluated(run)
    again = {name: found["metrics"][name] for name in last}
    assert again == pytest.approx(last, abs=ROUNDING)
    more = set(found["metrics"]) - set(last)
    assert bool(more) == (way == "rloo"), "the implicit rewards of the pairs, which its training did not read"
    steps = run / "samples" / "step-3.jsonl"
    expected = [json.loads(line) for line in steps.read_text(encoding="utf-8").splitlines()] if steps.exists() else []
    assert [s["completion"] for s in samples] == [s["completion"] for s in expected]
    assert ("eval_kl" in found["metrics"]) == ("sft" not in way and "reward" not in way)


def test_trained_bfloat16_weights_evaluate_as_in_training(settings, evaluated):
    run = trained(settings, algorithm="dpo", num_layers_unfrozen=1, dtype="bfloat16", bf16=True)
    found, _ = evaluated(run)
    assert found["metrics"]["eval_kl"] == read_metrics(run / "metrics.jsonl")[-1]["eval_kl"]


def test_samples_hold_the_reference_response_of_their_row(settings, evaluated):
    run = trained(settings, algorithm="dpo")
    _, samples = evaluated(run)
    rows = tiny.pair_rows()
    assert [sample["row"] for sample in samples] == [18, 18, 19, 19, 20, 20, 21, 21]
    assert all(sample["reference"] == rows[sample["row"]]["chosen"].strip() for sample in samples)
    with (run / "evaluation" / "samples.csv").open(encoding="utf-8-sig", newline="") as file:
        assert [row["completion"] for row in csv.DictReader(file)] == [sample["completion"] for sample in samples]


def test_other_rows_reward_and_sampling_can_be_given(settings, evaluated, tmp_path):
    run = trained(settings, algorithm="rloo", reward="tiny:reward_of_length")
    rows = [{"prompt": f"tell me about the {noun}", "completion": f"the {noun} was good"} for noun in tiny.NOUNS]
    data = tiny.write_rows(tmp_path / "references.jsonl", rows)
    flags = {
        "--dataset_name": data, "--dataset_test_split": "train", "--num_eval_prompts": 5, "--num_eval_samples": 1,
        "--max_new_tokens": 3, "--temperature": 0.5, "--reward": "test_evaluation:two",
        "--output_dir": tmp_path / "else",
    }  # fmt: skip
    found, samples = evaluated(run, *chain.from_iterable(flags.items()))
    assert len(samples) == 5
    assert max(sample["length"] for sample in samples) <= 3
    assert [sample["reference"] for sample in samples] == [row["completion"] for row in rows[:5]]
    assert found["metrics"]["eval_reward"] == 2
    assert (found["temperature"], found["kl_temperature"], found["logps_temperature"]) == (0.5, 0.5, 1.0)
    assert not (run / "evaluation").exists()


def two(prompt, completion):
    return 2.0


# The reverse KL


def check_log_ratios(run, initial, samples, temperature):
    """Against plain forward passes of both models."""
    models = [AutoModelForCausalLM.from_pretrained(folder).eval() for folder in (run / "final", initial)]
    whole = [sample for sample in samples if completion_ids(sample) is not None]
    assert len(whole) >= 3
    for sample in whole:
        prompt, completion = tiny.word_tokenizer()(sample["prompt"]).input_ids, completion_ids(sample)
        logps = []
        for model in models:
            logits = tiny.plain_logits(model, [*prompt, *completion])[len(prompt) - 1 : -1] / temperature
            logps.append(logits.log_softmax(-1).gather(1, torch.tensor(completion).unsqueeze(1)).sum())
        assert sample["kl"] == pytest.approx(float(logps[0] - logps[1]), abs=1e-4)
        assert abs(sample["kl"]) > 1e-3


@pytest.mark.parametrize("flags", [[], ["--kl_temperature", "1.0"], ["--kl_temperature", "0.3"]], ids=str)
def test_the_kl_is_taken_at_the_reported_temperature(settings, evaluated, saved_model, flags):
    run = trained(settings, algorithm="dpo", temperature=0.7)
    found, samples = evaluated(run, *flags)
    temperature = float(flags[-1]) if flags else 0.7
    assert (found["temperature"], found["kl_temperature"], found["kl_mask"]) == (0.7, temperature, "eos")
    check_log_ratios(run, saved_model(), samples, temperature)
    ratios = [sample["kl"] for sample in samples]
    assert found["metrics"]["eval_kl"] == pytest.approx(statistics.fmean(ratios))
    assert found["metrics"]["eval_kl_se"] == pytest.approx(standard_error(ratios, [s["row"] for s in samples]))


def test_kl_mask_all_counts_positions_past_the_eos(settings, evaluated, tmp_path):
    run = trained(settings, algorithm="dpo")
    through_eos, samples = evaluated(run, "--num_eval_samples", 16)
    everywhere, same = evaluated(run, "--num_eval_samples", 16, "--kl_mask", "all", "--output_dir", tmp_path / "all")
    assert everywhere["kl_mask"] == "all"
    said = ("row", "completion", "length", "ended", "reference")
    assert [[s[name] for name in said] for s in same] == [[s[name] for name in said] for s in samples]
    assert 0 < sum(s["ended"] for s in samples) < len(samples), "some go on past their EOS, some are cut"
    for one, other in zip(samples, same, strict=True):
        stops_early = one["ended"] and one["length"] < 8
        assert (one["kl"] == pytest.approx(other["kl"], abs=1e-5)) == (not stops_early)
    assert everywhere["metrics"]["eval_kl"] != pytest.approx(through_eos["metrics"]["eval_kl"], abs=1e-3)


@pytest.mark.parametrize("way", ["dpo", "lora", "sft"])
def test_another_reference_can_be_named(settings, evaluated, saved_model, way):
    run = trained(settings, **WAYS[way] | {"temperature": 1.0})
    other = saved_model(seed=5)
    found, samples = evaluated(run, "--reference_model_path", other)
    assert found["reference"] == str(other)
    check_log_ratios(run, other, samples, 1.0)


def test_a_model_without_a_run_is_evaluated_against_any_other(settings, evaluated, saved_model, tmp_path):
    run = trained(settings, algorithm="dpo")
    of_run, _ = evaluated(run, "--num_eval_rows", 6)
    alone = (
        "--model_name_or_path", run / "final", "--dataset_name", tmp_path / "pairs.jsonl", "--num_eval_rows", 6,
        "--num_eval_prompts", 4, "--num_eval_samples", 2, "--max_prompt_length", 16, "--max_completion_length", 8,
        "--per_device_eval_batch_size", 4, "--bf16", "false",
    )  # fmt: skip
    found, _ = evaluated(*alone, "--reference_model_path", saved_model(), "--output_dir", tmp_path / "two")
    assert found["metrics"] == pytest.approx(of_run["metrics"], abs=1e-5)
    found, samples = evaluated(*alone, "--output_dir", tmp_path / "one")
    assert found["reference"] is None
    assert "eval_kl" not in found["metrics"]
    assert all(sample["kl"] is None for sample in samples)


def test_a_biased_kl_is_reported_with_a_warning(settings, evaluated, capsys):
    run = trained(settings, algorithm="dpo")
    found, _ = evaluated(run, "--temperature", 0.01, "--kl_temperature", 1, "--top_k", 5)
    first, second = found["warnings"]
    assert first.startswith("kl_temperature=1 on samples at temperature=0.01: the mean log-ratio of these samples")
    assert second.startswith("top_k=5, top_p=1: samples are truncated, so the KL is biased")


# Mistakes


def test_models_with_different_tokenizers_have_no_kl(settings, saved_model, tmp_path, capsys):
    run = trained(settings, algorithm="dpo")
    other = shutil.copytree(saved_model(), tmp_path / "other")
    words = json.loads((other / "tokenizer.json").read_text())
    words["model"]["vocab"] = {word.replace("film", "movie"): i for word, i in words["model"]["vocab"].items()}
    (other / "tokenizer.json").write_text(json.dumps(words))
    assert "have different tokenizers: there is no KL between them" in refusal(
        capsys, run, "--reference_model_path", other
    )


def test_a_folder_that_is_no_finished_run_is_one_line(settings, tmp_path, capsys):
    assert refusal(capsys, tmp_path / "no").startswith(f"'{tmp_path}/no' is no run: it has no config.yaml")
    assert refusal(capsys).startswith("nothing to evaluate: name a run's folder first")
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "config.yaml").write_text(settings().to_yaml())
    assert refusal(capsys, tmp_path / "half").startswith(f"'{tmp_path}/half' has no final model")


def test_every_wrong_flag_is_one_line(settings, capsys):
    run = trained(settings, algorithm="dpo")
    assert refusal(capsys, run, "--learning_rate", "1").startswith("--learning_rate: about training, which is over")
    assert "unknown flag --temprature: did you mean --temperature?" in refusal(capsys, run, "--temprature", "1")
    assert "kl_mask='none': should be 'eos' or 'all'" in refusal(capsys, run, "--kl_mask", "none")
    assert "kl_temperature='-1': should be greater than 0" in refusal(capsys, run, "--kl_temperature", "-1")
    assert refusal(capsys, run, "--dataset_name", "x.jsonl").startswith(
        "--dataset_name without its rows to evaluate on"
    )
    assert "no rows to evaluate on" in refusal(capsys, run, "--num_eval_rows", "0")
    assert not (run / "evaluation").exists()


def test_an_evaluation_is_not_written_over(settings, evaluated, capsys):
    run = trained(settings, algorithm="dpo")
    evaluated(run)
    assert "already holds an evaluation: choose another --output_dir" in refusal(capsys, run)


def test_a_reward_model_is_evaluated_on_preferences_alone(settings, tmp_path, capsys, saved_model):
    run = trained(settings, algorithm="reward")
    data = tiny.write_rows(tmp_path / "other.jsonl", [{"prompt": "film", "completion": "good"}])
    flags = ("--dataset_name", data, "--dataset_test_split", "train")
    assert "preference data needs the columns 'chosen' and 'rejected'" in refusal(capsys, run, *flags)
    assert "a reward model has no reference" in refusal(capsys, run, "--reference_model_path", saved_model())


def test_a_reward_model_takes_the_place_of_the_runs_reward(settings, evaluated, tmp_path):
    scorer = tmp_path / "scorer"
    train(settings(algorithm="reward", output_dir=str(scorer)), progress=False)
    run = trained(settings, algorithm="dpo", reward="tiny:reward_of_length")
    found, samples = evaluated(run, "--reward_model_path", scorer / "final", "--missing_eos_penalty", 100)
    assert found["reward"] == str(scorer / "final")
    assert all((sample["reward"] < -50) == (not sample["ended"]) for sample in samples)
    rewards = [sample["reward"] for sample in samples]
    assert found["metrics"]["eval_reward"] == pytest.approx(statistics.fmean(rewards))
    assert found["metrics"]["eval_reward_se"] == pytest.approx(standard_error(rewards, [s["row"] for s in samples]))


def test_a_changed_start_model_is_refused(settings, saved_model, tmp_path, capsys):
    start = tiny.save(tiny.new_model("llama"), tmp_path / "start")
    run = trained(settings, algorithm="dpo", num_layers_unfrozen=1, model=start)
    tiny.save(tiny.new_model("llama", seed=3), start)
    assert "which was not trained: the model that the run started from has changed since" in refusal(capsys, run)


def test_a_reference_of_another_shape_is_one_line(settings, saved_model, capsys):
    run = trained(settings, algorithm="dpo")
    assert "is a model of another shape than its reference" in refusal(
        capsys, run, "--reference_model_path", saved_model(num_hidden_layers=3)
    )


def test_help_lists_the_fields_that_an_evaluation_takes(capsys):
    assert main(["evaluate", "--help"]) == 0
    out = capsys.readouterr().out
    assert "--kl_mask" in out
    assert "--num_eval_prompts" in out
    assert "--learning_rate" not in out
