"""The experiment on ``online_fraction`` with SmolLM2: its arms, its outcomes and its table."""

import json

import pytest

from benchmarks.paper import smollm2_online_fraction as experiment


def run(kl, flops):
    evaluation = {"kl": kl, "kl_se": 0.5, "accuracy": 0.75, "margin": 0.2}
    return {"evaluation": evaluation, "per_step": {"flops": flops, "online_samples": 4.0, "seconds": 1.0}}


def test_a_row_has_the_end_and_flops_relative_to_dpo():
    *_, hypo = experiment.table({experiment.DPO: run(4.0, 2e9), "4 pairs a step, HyPO, 0.5": run(2.0, 3e9)})
    assert hypo == "| 4 pairs a step, HyPO, 0.5 | 4 | 2.00 ± 0.50 | 0.75 | 0.20 | 1.50 |"


def test_an_outcome_is_the_end_and_the_cost_of_a_step(tmp_path):
    steps = [
        {"step": step, "kl": kl, "flops/policy": 3.0, "flops/sample": flops, "time/step": 2.0, "num_online_samples": 4}
        for step, kl, flops in ((1, 0.0, 1.0), (2, 0.5, 3.0))
    ]
    end = {"step": 2, "eval_kl": 1.5, "eval_kl_se": 0.2, "eval_rewards/accuracies": 0.7, "eval_rewards/margins": 0.3}
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [*steps, end]))
    found = experiment.outcome(tmp_path)
    assert found["evaluation"] == {"kl": 1.5, "kl_se": 0.2, "accuracy": 0.7, "margin": 0.3}
    assert found["kl_of_samples"] == [0.0, 0.5]
    # num_online_samples counts from the start of the run: 4 after two steps.
    assert found["per_step"] == {"flops": 5.0, "online_samples": 2.0, "seconds": 2.0}


def test_arms_differ_in_the_algorithm_and_the_fraction_alone():
    kept = [
        {k: v for k, v in arm.items() if k not in ("algorithm", "online_fraction")} for arm in experiment.ARMS.values()
    ]
    assert all(arm == kept[0] for arm in kept)


def test_the_recorded_table_is_that_of_the_recorded_numbers():
    found = json.loads((experiment.RESULTS / f"{experiment.NAME}.json").read_text(encoding="utf-8"))
    lines = (experiment.RESULTS / f"{experiment.NAME}.md").read_text(encoding="utf-8").splitlines()
    assert lines[2:] == experiment.table(found)


def test_arms_without_dpo_are_refused(capsys):
    with pytest.raises(SystemExit):
        experiment.main(["--arms", "4 pairs a step, HyPO, 1"])
    assert "without '4 pairs a step, DPO'" in capsys.readouterr().err
