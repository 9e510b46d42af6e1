"""The experiment on ``online_fraction``: its table, its recorded numbers, and a miniature of it."""

import json

import pytest

from benchmarks.paper import online_fraction


def seed(kl, reward, flops):
    evaluations = [{"step": 1, "kl": kl + 2, "reward": 0.0}, {"step": 2, "kl": kl, "reward": reward}]
    return {"evaluations": evaluations, "per_step": {"flops": flops, "online_samples": 8.0}}


def test_the_table_has_means_errors_and_ratios_to_dpo():
    found = {"DPO": [seed(10.0, 1.0, 1e9), seed(12.0, 3.0, 1e9)], "HyPO, 0.5": [seed(3.0, 2.0, 2e9)] * 2}
    _, _, dpo, hypo = online_fraction.table(found)
    # Seeds 10 and 12: mean 11, standard deviation √2, standard error 1.
    assert dpo == "| DPO | 2.00 ± 1.00 | 11.00 ± 1.00 | 13.00 ± 1.00 | 8 | 1.00 |"
    assert hypo == "| HyPO, 0.5 | 2.00 ± 0.00 | 3.00 ± 0.00 | 5.00 ± 0.00 | 8 | 2.00 |"


def test_the_recorded_table_is_that_of_the_recorded_numbers():
    found = json.loads((online_fraction.RESULTS / "online_fraction.json").read_text(encoding="utf-8"))
    assert list(found) == list(online_fraction.ARMS)
    lines = (online_fraction.RESULTS / "online_fraction.md").read_text(encoding="utf-8").splitlines()
    assert lines[2:] == online_fraction.table(found)


@pytest.mark.slow
def test_a_miniature_runs_and_repeats_nothing(tmp_path, monkeypatch):
    kept = {name: online_fraction.ARMS[name] for name in ("DPO", "HyPO, 0.125, a draw for 8 steps")}
    monkeypatch.setattr(online_fraction, "ARMS", kept)
    options = ["--quick", "--seeds", "1", "--workers", "1", f"--runs_dir={tmp_path / 'runs'}"]
    assert online_fraction.main([*options, f"--results_dir={tmp_path / 'first'}"]) == 0
    assert online_fraction.main([*options, f"--results_dir={tmp_path / 'second'}"]) == 0
    first, second = (json.loads((tmp_path / n / "online_fraction.json").read_text()) for n in ("first", "second"))
    assert first == second
    assert first["DPO"][0]["per_step"]["online_samples"] == 0
    assert first["HyPO, 0.125, a draw for 8 steps"][0]["per_step"]["online_samples"] == 8
