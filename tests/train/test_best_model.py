"""The best checkpoint as the final model, and training that ends early."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import tiny
import torch
from ranks import launch
from resumed import assert_same_weights, final_weights, kill_run, metrics_of
from resumed import resumed as resume
from safetensors.torch import load_file

import hypo_train.train as loop
from hypo_train.checkpoint.best import BestModel
from hypo_train.checkpoint.files import prune
from hypo_train.config import Config, ConfigError
from hypo_train.train import train

# The margin grows with every step, so by the smallest margin the best checkpoint is the first.
SHAPE = {"algorithm": "dpo", "max_steps": 8, "eval_steps": 2, "save_steps": 2, "num_eval_rows": 4}
BY_MARGIN = {**SHAPE, "metric_for_best_model": "rewards/margins", "greater_is_better": False}
BEST = {**BY_MARGIN, "load_best_model_at_end": True, "save_total_limit": 1}
LORA = {"use_peft": True, "lora_r": 4, "lora_target_modules": "all-linear"}


def checkpoints(config):
    return sorted(path.name for path in Path(config.output_dir).glob("checkpoint-*"))


def weights_of(config, step):
    return load_file(Path(config.output_dir) / f"checkpoint-{step}" / "model.safetensors")


def assert_final_is(config, step):
    """Compare the final model's weights with the checkpoint's; their names differ by a prefix."""
    final, saved = final_weights(config), weights_of(config, step)
    for name, weight in final.items():
        [same] = [tensor for key, tensor in saved.items() if key.replace(".default", "").endswith(name)]
        assert torch.equal(weight, same), name


# The rule


def lines(*values, kl=1.0):
    return [{"step": 10 * i, "eval_loss": value, "eval_kl": kl} for i, value in enumerate(values, start=1)]


def rule(**changes):
    defaults = {"metric": "eval_loss", "greater_is_better": False, "max_kl": None, "patience": 2, "threshold": 0.0}
    return BestModel(**{**defaults, **changes})


@pytest.mark.parametrize(
    ("changes", "values", "step"),
    [
        ({}, [3.0, 1.0, 2.0], 20),
        ({}, [1.0, 1.0], 10),
        ({"greater_is_better": True}, [3.0, 1.0, 2.0], 10),
        ({}, [math.nan, 2.0], 20),
        ({"max_kl": 0.5}, [3.0, 1.0], None),
    ],
    ids=["smallest", "the earliest of equal ones", "largest", "NaN does not count", "over the KL budget"],
)
def test_the_best_evaluation(changes, values, step):
    best = rule(**changes).best(lines(*values), lambda step: True)
    assert (best and best["step"]) == step


def test_the_best_checkpoint_is_one_that_is_kept():
    assert rule().best(lines(1.0, 2.0, 3.0), lambda step: step != 10)["step"] == 20


@pytest.mark.parametrize(
    ("changes", "values", "ends"),
    [
        ({}, [1.0, 2.0], False),
        ({}, [1.0, 2.0, 1.5], True),
        ({}, [2.0, 3.0, 1.0, 3.0], False),
        ({"threshold": 0.5}, [2.0, 1.8, 1.6], True),
        ({"max_kl": 0.5}, [2.0, 1.0], True),
        ({"patience": None}, [1.0, 2.0, 3.0, 4.0], False),
    ],
    ids=["waits", "ends", "an improvement starts again", "too small", "over the KL budget", "no patience is asked for"],
)
def test_training_ends_without_improvement(changes, values, ends):
    assert rule(**changes).ends_training(lines(*values)) == ends


def test_the_evaluation_before_training_does_not_count():
    before = {"step": 0, "eval_loss": 0.0, "eval_kl": 0.0}
    assert rule().best([before, *lines(2.0)], lambda step: True)["step"] == 10
    assert not rule().ends_training([before, *lines(2.0, 3.0)])


# Runs


@pytest.fixture
def run_of(settings):
    def make(name="run", **changes):
        return settings(**{**changes, "output_dir": str(Path(settings().output_dir).with_name(name))})

    return make


@pytest.mark.parametrize("way", [{}, LORA], ids=["full", "lora"])
def test_the_best_checkpoint_is_the_final_model(run_of, capsys, way):
    config = run_of(**BEST, **way)
    train(config, progress=False)
    assert checkpoints(config) == ["checkpoint-2", "checkpoint-8"], "the best, and the newest for a resume"
    assert_final_is(config, 2)
    evaluated = [line for line in metrics_of(config) if "eval_loss" in line]
    assert [line.get("best_global_step") for line in evaluated] == [None, 2, 2, 2, 2]
    margins = [line["eval_rewards/margins"] for line in evaluated]
    assert evaluated[-1]["best_metric"] == margins[1] == min(margins[1:])
    assert "the final model is that of step 2: eval_rewards/margins" in capsys.readouterr().out
    card = (Path(config.output_dir) / "final" / "README.md").read_text(encoding="utf-8")
    assert "as it was after step 2" in card
    assert "After step 2:" in card
    assert "best: step 2" in (Path(config.output_dir) / "report.html").read_text(encoding="utf-8")


def test_training_ends_early_with_everything_saved(run_of, capsys):
    config = run_of(**BEST, early_stopping_patience=2)
    train(config, progress=False)
    assert metrics_of(config)[-1]["step"] == 6
    assert (
        "training ends early at step 6 of 8: 2 evaluations without a better eval_rewards/margins"
        in capsys.readouterr().out
    )
    assert checkpoints(config) == ["checkpoint-2", "checkpoint-6"]
    before = final_weights(config)
    resume(config)
    assert metrics_of(config)[-1]["step"] == 6, "a resumed run ends at the same step"
    assert all(torch.equal(before[name], weight) for name, weight in final_weights(config).items())
    longer = resume(config, early_stopping_patience=9)
    assert metrics_of(longer)[-1]["step"] == 8
    assert_final_is(longer, 2)


def test_an_early_end_between_checkpoints_saves_one(run_of):
    config = run_of(**BY_MARGIN | {"save_steps": 0}, early_stopping_patience=1)
    train(config, progress=False)
    assert checkpoints(config) == ["checkpoint-4"]
    assert_final_is(config, 4)


@pytest.mark.parametrize(("function", "nth"), [("train_step", 6), ("evaluate", 3), ("evaluate", 5), ("save_model", 1)])
def test_a_killed_search_for_the_best_is_resumed_exactly(run_of, function, nth):
    expected = run_of("expected", **BEST)
    train(expected, progress=False)
    config = kill_run(run_of("killed", **BEST), loop, function, nth)
    resume(config)
    assert metrics_of(config) == metrics_of(expected)
    assert_same_weights(config, expected)


def test_the_patience_so_far_survives_a_kill(run_of):
    config = kill_run(run_of(**BEST, early_stopping_patience=2), loop, "train_step", 6)
    assert [line["step"] for line in metrics_of(config) if "eval_loss" in line] == [0, 2, 4]
    resume(config)
    assert metrics_of(config)[-1]["step"] == 6
    assert_final_is(config, 2)


def test_without_a_checkpoint_in_the_budget_the_last_is_final(run_of, capsys):
    config = run_of(**BEST, max_kl_for_best_model=1e-9)
    train(config, progress=False)
    assert_final_is(config, 8)
    warning = "warning: no checkpoint has an eval_kl of 1e-09 or less, so the final model has the weights of the last"
    assert warning in capsys.readouterr().out


def test_a_finished_run_can_choose_its_best_later(run_of):
    config = run_of(**SHAPE, save_total_limit=9)
    train(config, progress=False)
    assert_final_is(config, 8)
    later = resume(
        config, load_best_model_at_end=True, metric_for_best_model="rewards/margins", greater_is_better=False
    )
    assert_final_is(later, 2)


def test_another_folder_is_refused(run_of):
    config = run_of(**BEST | {"max_steps": 2})
    train(config, progress=False)
    folder = str(Path(config.output_dir) / "checkpoint-2")
    with pytest.raises(ConfigError, match="the best checkpoint is found among the evaluations in output_dir"):
        train(run_of("other", **BEST, resume_from_checkpoint=folder), progress=False)


@pytest.mark.timeout(0)
def test_two_processes_end_at_the_same_step(tmp_path, saved_model):
    ways = {"DDP, LoRA": LORA, "FSDP": {"fsdp": True}}
    configs = []
    for name, way in ways.items():
        (tmp_path / name).mkdir()
        changes = {**BEST, **way, "early_stopping_patience": 2, "per_device_train_batch_size": 2}
        configs.append(tiny.make_config(tmp_path / name, saved_model(), **changes))
    launch(tmp_path / "launch", configs)
    for config in configs:
        assert metrics_of(config)[-1]["step"] == 6
        assert_final_is(config, 2)


# Settings


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"num_eval_rows": 0, "eval_steps": 0}, "nothing to evaluate on"),
        ({"eval_steps": 0}, "eval_steps=0: that evaluates only at the end"),
        ({"save_steps": 3}, "save_steps=3 and eval_steps=2: every checkpoint must be evaluated"),
        ({"save_steps": 0}, "save_steps=0 and eval_steps=2: every checkpoint must be evaluated"),
        ({"metric_for_best_model": "eval_bleu"}, "metric_for_best_model='eval_bleu': the evaluations of this run have"),
        ({"metric_for_best_model": "kl", "greater_is_better": None}, "say greater_is_better: false"),
        (
            {"algorithm": "sft", "metric_for_best_model": None, "max_kl_for_best_model": 1.0},
            "max_kl_for_best_model=1.0 with algorithm=sft: its evaluations have no eval_kl",
        ),
        ({"algorithm": "rloo", "reward": "tiny:reward_of_length", "metric_for_best_model": None}, "eval_reward"),
    ],
)
def test_settings_that_cannot_find_a_best_are_refused(changes, problem):
    with pytest.raises(ValueError, match=r"(?s).+") as error:
        Config(model_name_or_path="m", dataset_name="d", **{**BEST, **changes})
    assert problem in str(error.value)


@pytest.mark.parametrize("algorithm", ["sft", "dpo", "rloo", "reward"])
def test_the_listed_metrics_are_those_of_an_evaluation(run_of, algorithm):
    reward = {"reward": "tiny:reward_of_length"} if algorithm == "rloo" else {}
    config = run_of(algorithm=algorithm, num_eval_rows=4, max_steps=1, **reward)
    found = train(config, progress=False).evaluation.metrics
    assert sorted(name for name in found if not name.endswith("_se")) == sorted(config.eval_metrics)


@pytest.mark.parametrize(
    ("name", "greatest"), [(None, False), ("loss", False), ("eval_loss", False), ("rewards/accuracies", True)]
)
def test_greater_is_better_follows_the_rule_of_transformers(name, greatest):
    config = Config(model_name_or_path="m", dataset_name="d", metric_for_best_model=name)
    assert config.best_is_greatest is greatest


@pytest.mark.parametrize(
    ("keep", "best", "left"),
    [(1, 2, [2, 8]), (2, 2, [2, 8]), (3, 2, [2, 6, 8]), (2, 6, [6, 8]), (2, None, [6, 8])],
)
def test_the_best_checkpoint_is_not_deleted(run_of, keep, best, left):
    config = run_of(**SHAPE, save_total_limit=9)
    train(config, progress=False)
    prune(Path(config.output_dir), keep, best=best)
    assert checkpoints(config) == [f"checkpoint-{step}" for step in left]
