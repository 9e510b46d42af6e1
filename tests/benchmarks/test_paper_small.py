"""The paper's Table 1 and Figure 1 in small: their tables, and a miniature of the experiment."""

from __future__ import annotations

import json
import math
import re

import pytest

from benchmarks.paper.small import arms, report, stages
from benchmarks.paper.small.__main__ import main
from benchmarks.paper.small.outcome import Evaluation, Outcome
from hypo_train.demo import world


@pytest.fixture
def few_arms(monkeypatch):
    """Reduce the experiment to one arm per algorithm."""
    monkeypatch.setitem(arms.FRONTIERS, "DPO", {"β 0.1": arms.METHODS["DPO"]})
    monkeypatch.setitem(arms.FRONTIERS, "IPO", {"β 0.1": arms.METHODS["IPO"]})
    monkeypatch.setitem(arms.FRONTIERS, "HyPO", {"λ 0.003": arms.METHODS["HyPO"]})
    monkeypatch.delitem(arms.ESTIMATES, "4 samples")
    monkeypatch.delitem(arms.ESTIMATES, "8 samples")


def cells(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_every_arm_is_trained_once_from_the_same_start():
    names = [arm.name for arm in arms.arms()]
    assert len(set(names)) == len(names)
    assert {arm.algorithm for arm in arms.arms()} == {"dpo", "ipo", "rloo", "hypo"}
    shared = {"per_device_train_batch_size", "num_train_epochs", "learning_rate", "seed"}
    assert not any(shared & set(arm.settings) for arm in arms.arms()), "all arms have the same steps and learning rate"


def test_tables_hold_means_and_standard_errors_over_seeds(few_arms):
    def outcome(shift):
        start = Evaluation(epoch=0.0, kl=0.0, reward=0.0, win_rate=0.5)
        end = Evaluation(epoch=5.0, kl=10.0 + shift, reward=2.0 + shift, win_rate=0.75)
        return Outcome([start, end], learned=(-0.5, 1.0), flops=1e9 + 1e9 * shift)

    found = {arm.name: [outcome(0.0), outcome(2.0)] for arm in arms.arms()}
    _, _, sft, dpo, *others = report.table_1(found)
    assert cells(sft) == ["SFT", "0.500 ± 0.000", "-0.50 ± 0.00", "0.00 ± 0.00", "0"]
    # Seeds 10 and 12: mean 11, standard deviation √2, standard error 1.
    assert cells(dpo) == ["DPO", "0.750 ± 0.000", "1.00 ± 0.00", "3.00 ± 1.00", "11.00 ± 1.00"]
    assert [cells(line)[0] for line in others] == ["IPO", "RLOO", "HyPO"]
    assert [cells(line)[:2] for line in report.frontier_table(found)][2:] == [
        ["DPO", "β 0.1"],
        ["IPO", "β 0.1"],
        ["RLOO", "β 0.05"],
        ["HyPO", "λ 0.003"],
    ]
    assert cells(list(report.estimates_table(found))[2]) == ["2 samples", "3.00 ± 1.00", "11.00 ± 1.00", "1.00"]


@pytest.mark.slow
def test_a_miniature_writes_tables_and_resumes(few_arms, tmp_path, capsys):
    options = ["--quick", "--seeds", "1", "--workers", "2"]
    options += ["--runs_dir", str(tmp_path / "runs"), "--results_dir", str(tmp_path / "results")]
    assert main(options) == 0
    out = capsys.readouterr().out
    table = (tmp_path / "results" / "small.md").read_text(encoding="utf-8")
    assert table in out
    assert [cells(line)[0] for line in table.splitlines() if line.startswith("|")][2:7] == [
        "SFT",
        *arms.METHODS,
    ]
    for name in ("figure1.png", "frontier.png"):
        assert (tmp_path / "results" / name).read_bytes().startswith(b"\x89PNG")
    everything = json.loads((tmp_path / "results" / "small.json").read_text())
    assert set(everything) == {arm.name for arm in arms.arms()}
    for [outcome] in everything.values():
        numbers = [value for evaluation in outcome["evaluations"] for value in evaluation.values()]
        assert all(map(math.isfinite, numbers))
        assert [evaluation["epoch"] for evaluation in outcome["evaluations"]] == [0.0, 1.0]
    starts = [seeds[0]["evaluations"][0] for seeds in everything.values()]
    assert all(start == starts[0] for start in starts), "all arms start from the same model"

    seed = tmp_path / "runs" / "seed-0"
    references = [json.loads(line) for line in (seed / "references.jsonl").read_text().splitlines()]
    assert len(references) == stages.QUICK.sizes.num_held_out
    assert all(row["reward"] == world.reward(row["prompt"], row["completion"]) for row in references)

    # An arm killed between its last checkpoint and its final model is resumed; no other arm is trained again.
    arm = arms.METHODS["HyPO"].name
    (seed / arm / "final").rename(tmp_path / "gone")
    assert main(options) == 0
    again = capsys.readouterr().out
    assert re.findall(r"seed 0: (\S+): ", again) == [arm]
    assert (tmp_path / "results" / "small.md").read_text(encoding="utf-8") == table


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (["--seeds", "0"], "--seeds 0: at least 1"),
        (["--workers", "0"], "--workers 0: at least 1"),
        (["--quick"], "--quick needs a --results_dir of its own"),
    ],
)
def test_wrong_options_are_refused(options, why, capsys):
    with pytest.raises(SystemExit) as caught:
        main(options)
    assert caught.value.code == 2
    assert why in capsys.readouterr().err
