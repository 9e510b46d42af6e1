"""``loss_type``: TRL's losses in the training loop, with and without a reference, with HyPO's samples on top."""

from dataclasses import fields

import pytest
from short_runs import LAST_LAYER, LORA, metrics_of, slow_unless, trained

from hypo_kernels.losses import LOSSES
from hypo_train.algorithms.losses import pair_loss
from hypo_train.config import ConfigError, checked
from hypo_train.loss_names import LOSS_NAMES, OWN_SETTINGS
from hypo_train.prepare import prepare
from hypo_train.train import train

FREE = [name for name, entry in LOSS_NAMES.items() if not entry.needs_reference]
SMOOTHED = {"exo_pair": {"label_smoothing": 0.01}}  # it divides by the smoothing
BASE = {"model_name_or_path": "m", "dataset_name": "d"}


@pytest.fixture
def named(settings, tmp_path):
    """``named("a", algorithm="dpo")`` is a config like that of ``settings``, with a folder of its own."""
    return lambda name, **changes: settings(output_dir=str(tmp_path / name), **changes)


@pytest.mark.parametrize("name", LOSS_NAMES)
def test_the_table_agrees_with_the_losses(name):
    entry = LOSS_NAMES[name]
    loss = pair_loss(checked({**BASE, "algorithm": "dpo", "loss_type": name, **SMOOTHED.get(name, {})}))
    assert isinstance(loss, LOSSES[entry.loss])
    assert entry.needs_reference == loss.needs_reference
    assert set(entry.settings) == {field.name for field in fields(loss)}


def test_every_loss_but_rebel_has_a_name():
    """REBEL needs rewards of the pairs, which a run's rows do not have."""
    assert {entry.loss for entry in LOSS_NAMES.values()} == LOSSES.keys() - {"rebel"}
    assert OWN_SETTINGS.keys() == {name for entry in LOSS_NAMES.values() for name in entry.settings} - {"beta"}


# One of each kind: a difference of means, one that needs a statistic of the batch, several.
@pytest.mark.parametrize("name", slow_unless(["ipo", "kto_pair"], LOSS_NAMES))
def test_each_loss_falls_in_training(settings, name):
    config = settings(algorithm="dpo", loss_type=name, max_steps=12, learning_rate=2e-3, **SMOOTHED.get(name, {}))
    losses = [line["loss"] for line in trained(config) if "loss" in line]
    assert min(losses[1:]) < losses[0]  # SPPO is a square: it overshoots


def test_the_papers_ipo_is_the_algorithm_of_that_name(named):
    whole, by_name = (
        trained(named(name, algorithm=algorithm, loss_type=loss_type))
        for name, algorithm, loss_type in (("a", "ipo", None), ("b", "dpo", "ipo_sum"))
    )
    assert whole == by_name


@pytest.mark.parametrize("name", FREE)
def test_reference_free_losses_run_no_reference(settings, name, monkeypatch):
    monkeypatch.setattr("hypo_train.model.policy.Policy.reference", None)  # calling it would fail
    config = settings(algorithm="dpo", loss_type=name, num_eval_rows=4)
    run = prepare(config)
    assert not run.has_reference
    assert run.train_ref_logps is None
    train(config, progress=False)
    lines = metrics_of(config)
    assert "kl" not in lines[0]
    # What says which checkpoint is the best is there: every evaluation has a loss.
    assert lines[-1]["eval_loss"] > 0


@pytest.mark.parametrize("way", [{}, LORA, LAST_LAYER], ids=["full", "LoRA", "last layer"])
@pytest.mark.parametrize("name", ["simpo", "bco_pair"])
def test_a_kl_of_samples_goes_with_any_loss(settings, name, way):
    lines = trained(settings(algorithm="hypo", loss_type=name, kl_coef=0.5, **way))
    assert all(line["kl"] == line["kl"] for line in lines if "loss" in line)


def test_weights_of_losses_are_a_sum(named):
    lines = {
        name: trained(named(name, algorithm="dpo", max_steps=1, **given))[0]["loss"]
        for name, given in {
            "both": {"loss_type": ["sigmoid", "sft"], "loss_weights": [0.5, 2.0]},
            "dpo": {"loss_type": "sigmoid"},
            "sft": {"loss_type": "sft"},
        }.items()
    }
    assert lines["both"] == pytest.approx(0.5 * lines["dpo"] + 2 * lines["sft"], rel=1e-5)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"loss_type": "aot"}, "'aot' sorts the whole batch and has no fused form: use TRL's DPOTrainer"),
        ({"loss_type": "dpo"}, "'dpo': should be one of sigmoid, hinge"),
        ({"loss_type": []}, "loss_type"),
        ({"loss_type": "simpo", "algorithm": "sft"}, r"with algorithm=sft: only dpo and hypo take it"),
        ({"loss_type": "simpo", "algorithm": "ipo"}, r"with algorithm=ipo: only dpo and hypo take it"),
        ({"loss_type": "hinge", "label_smoothing": 0.1}, "label_smoothing=0.1: loss_type=.*hinge.* does not read it"),
        ({"simpo_gamma": 1.0}, "simpo_gamma=1.0: algorithm=dpo does not read it"),
        ({"loss_type": "exo_pair"}, "set label_smoothing: 0.001, as its paper does"),
        ({"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0]}, "need one weight for each of loss_type"),
        ({"loss_type": ["sigmoid", "sft"], "loss_weights": 1}, "need one weight for each of loss_type"),
        ({"loss_type": "simpo", "precompute_ref_log_probs": True}, "its loss uses no reference log-probs of pairs"),
    ],
)
def test_wrong_losses_are_named(given, message):
    with pytest.raises(ConfigError, match=message):
        checked({**BASE, "algorithm": "dpo", **given})
