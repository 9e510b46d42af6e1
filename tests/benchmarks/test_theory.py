"""Check the paper's theory, its bounds and the numbers that the documentation quotes of it."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch.testing import assert_close

from benchmarks.paper import constants, theory
from benchmarks.paper.bandit import linear_world

THREE = theory.three_response_rows()


def random_policies(count, responses, seed=0):
    logits = 3 * torch.randn(count, responses, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return logits.log_softmax(-1)


def kl(log_pi, log_ref):
    return (log_pi.exp() * (log_pi - log_ref)).sum(-1)


# The quantities


def test_no_policy_has_more_of_the_objective_than_the_optimum():
    log_ref, policies = random_policies(1, 6)[0], random_policies(500, 6, seed=1)
    rewards = torch.randn(6, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    best = constants.optimal(rewards, log_ref, beta=0.3)
    top = constants.objective(best, rewards, log_ref, beta=0.3)
    values = constants.objective(policies, rewards, log_ref, beta=0.3)
    assert (values < top).all()
    assert_close(constants.gap(policies, rewards, log_ref, beta=0.3), top - values)


def test_a_policy_without_mass_somewhere_has_a_finite_objective():
    log_ref = torch.full((2,), 0.5, dtype=torch.float64).log()
    rewards, log_pi = torch.tensor([1.0, 5.0]).double(), torch.tensor([0.0, -math.inf]).double()
    assert constants.objective(log_pi, rewards, log_ref, beta=0.1) == pytest.approx(1 - 0.1 * math.log(2))


def test_a_pair_error_is_the_sum_over_all_pairs():
    log_p, errors = random_policies(3, 5), torch.randn(3, 5, generator=torch.Generator().manual_seed(1)).double()
    weights = log_p.exp()[:, :, None] * log_p.exp()[:, None, :]
    truth = (weights * (errors[:, :, None] - errors[:, None, :]).square()).sum((1, 2))
    assert_close(constants.pair_error(errors, log_p), truth)
    assert_close(constants.pair_error(errors + 7, log_p), truth, rtol=1e-6, atol=0)


def test_local_coverage_is_reached_and_not_exceeded():
    log_ref, ball = random_policies(1, 4)[0], 0.4
    found = constants.local_coverage(log_ref, ball)
    # No policy of the ball has more, of many that are made by moving towards random policies.
    towards = random_policies(2000, 4, seed=1)
    for share in (0.1, 0.3, 0.6, 1.0):
        mixed = ((1 - share) * log_ref.exp() + share * towards.exp()).log()
        within = mixed[kl(mixed, log_ref) <= ball]
        assert len(within) > 0
        assert (constants.realised_coverage(within, log_ref) <= found).all()
    # The policy that puts the most on the rarest response reaches it at the ball's surface.
    rarest, q = log_ref.argmin(), constants.heaviest(log_ref, ball)
    others = torch.arange(4) != rarest
    pi = log_ref.exp() * (1 - q[rarest]) / log_ref.exp()[others].sum()
    pi[rarest] = q[rarest]
    assert kl(pi.log(), log_ref) == pytest.approx(ball, rel=1e-9)
    assert constants.realised_coverage(pi.log(), log_ref) == pytest.approx(float(found), rel=1e-9)


def test_a_ball_of_all_policies_has_global_coverage():
    log_ref = random_policies(3, 5)
    farthest = -log_ref.min(1).values
    assert_close(constants.local_coverage(log_ref, farthest), constants.global_coverage(log_ref))
    assert (constants.local_coverage(log_ref, farthest / 2) < constants.global_coverage(log_ref)).all()
    assert_close(constants.local_coverage(log_ref, 0.0), torch.ones(3, dtype=torch.float64), atol=1e-5, rtol=0)


def test_linear_coverage_bounds_errors_that_are_linear():
    world = linear_world([0], responses=20, features=3, pairs=500)
    phi, shares, n = world.features[0], world.pairs.shares[0], world.num_paired
    found = constants.linear_coverage(phi, shares)
    errors = phi @ torch.randn(3, 1000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    between = errors[:, None] - errors[None, :]
    on_pairs = (shares[..., None] * between[:n, :n].square()).sum((0, 1)).sqrt()
    ratios = between.abs().amax((0, 1)) / on_pairs
    assert (ratios <= found).all()
    assert ratios.max() > 0.9 * found, "and the bound is reached"


def test_linear_coverage_is_infinite_without_shared_features():
    shares = torch.tensor([[0.0, 0.5], [0.5, 0.0]], dtype=torch.float64)
    assert constants.linear_coverage(torch.eye(3, dtype=torch.float64), shares) == math.inf


# The statements of the paper: propositions, theorems, remarks and examples


def test_proposition_4_1_the_gap_grows_as_the_error_vanishes():
    gaps, errors = ([row[f"dpo_{name}"] for row in THREE] for name in ("gap", "error"))
    assert [round(gap, 1) for gap in gaps] == [1.2, 1.6, 2.5, 4.1, 14.1]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-60
    # No bound: 0.9 β more with each nat of log 1 / ε.
    slope = (gaps[-1] - gaps[-2]) / (math.log(1e-16) - math.log(1e-64))
    assert slope == pytest.approx(0.9 * 0.1, rel=1e-6)


def test_rlhf_and_hypo_have_a_vanishing_gap_in_the_same_world():
    assert THREE[-1]["rlhf_gap"] < 1e-60
    assert THREE[-1]["hypo_gap"] < 1e-8
    for method in ("rlhf", "hypo"):
        gaps = [row[f"{method}_gap"] for row in THREE]
        assert gaps == sorted(gaps, reverse=True)


@pytest.mark.parametrize("method", ["dpo", "rlhf", "hypo"])
def test_the_theorems_bounds_hold_in_three_responses(method):
    for row in THREE:
        assert row[f"{method}_gap"] <= row[f"{method}_realised_bound"] <= row[f"{method}_bound"] * (1 + 1e-9)


def test_lemmas_hold_in_random_worlds():
    found = theory.random_worlds(300, seed=1)
    assert 0.1 < found["kl"] <= 1
    assert 0.1 < found["gap"] <= 1


def test_lemma_a1_leaves_out_the_kl_of_the_optimum_to_the_policy():
    log_ref, log_pi = random_policies(2, 7)
    rewards, beta = torch.randn(7, generator=torch.Generator().manual_seed(5), dtype=torch.float64), 0.4
    best, error = (
        constants.optimal(rewards, log_ref, beta=beta),
        rewards - constants.implicit_rewards(log_pi, log_ref, beta=beta),
    )
    bound = ((best.exp() - log_pi.exp()) * error).sum()
    assert_close(bound - constants.gap(log_pi, rewards, log_ref, beta=beta), beta * kl(best, log_pi))


def test_lemma_4_1_is_nearly_reached_by_two_responses():
    shares = [row["kl"] / row["bound"] for row in theory.tightest_lemma_4_1()]
    assert shares == sorted(shares)
    assert 0.9 < shares[-1] <= 1


def test_remark_4_1_is_right_up_to_a_factor_of_e():
    for row in theory.remark_4_1():
        assert row["log_reading"] <= row["log_local"] <= row["log_reading"] + 1
    assert row["log_local"] > 100, "a ball of 1 nat does not bound the ratio"


def test_example_6_1_raises_only_the_response_without_pairs():
    for row in theory.example_6_1():
        for method in ("dpo", "rlhf"):
            assert row[f"{method}_1"] < row[f"{method}_2"] < 1 / 3 < row[f"{method}_3"]
        assert all(row[f"dpo_{i}"] == pytest.approx(row[f"rlhf_{i}"], abs=1e-3) for i in (1, 2, 3))
    world = theory.example_world()
    assert math.isfinite(constants.linear_coverage(world.features, world.pairs.shares)), "the features are covered"


def test_the_linear_bound_holds_in_figure_2():
    for method, rows in theory.figure_2_rows([0]).items():
        [row] = rows
        assert row["gap"] <= row["linear_bound"] < row["local_bound"] <= row["bound"] * (1 + 1e-9), method


def test_e1_is_the_best_response_only_under_the_l1_norm():
    for norm, holds in ((1, 10), (2, 1)):
        world = linear_world(range(10), norm=norm, last="e₁")
        assert int((world.best == 99).sum()) == holds
    with pytest.raises(ValueError, match="last='e2': choose"):
        linear_world([0], last="e2")


# The recorded numbers


def recorded():
    return json.loads((theory.RESULTS / "theory.json").read_text(encoding="utf-8"))


def test_the_recorded_page_is_that_of_the_recorded_numbers():
    lines = (theory.RESULTS / "theory.md").read_text(encoding="utf-8").splitlines()
    assert lines == list(theory.report(recorded()))


def test_the_recorded_numbers_are_computed_again():
    found = recorded()
    for name, again in {
        "three_responses": THREE,
        "remark_4_1": theory.remark_4_1(),
        "lemma_4_1": theory.tightest_lemma_4_1(),
        "example_6_1": theory.example_6_1(),
    }.items():
        for before, row in zip(found[name], again, strict=True):
            assert row == pytest.approx(before, rel=1e-4), name
    assert theory.random_worlds(2000) == pytest.approx(found["random_worlds"], rel=1e-6)


@pytest.mark.slow
def test_the_recorded_numbers_of_figure_2_are_computed_again():
    found = recorded()
    assert theory.readings_rows(range(10)) == found["readings"]
    for part, rows_of in (("figure_2", theory.figure_2_rows), ("figure_2_right", theory.figure_2_right_rows)):
        for method, rows in rows_of(range(10)).items():
            for before, row in zip(found[part][method], rows, strict=True):
                assert row == pytest.approx(before, rel=1e-3), method


def test_the_theorems_bounds_hold_without_features():
    for method, rows in recorded()["figure_2_right"].items():
        for row in rows:
            assert row["gap"] <= row["local_bound"] < row["bound"], method
            assert row["error"] > 4 * row["error_on_pairs"], "the pairs leave half of the responses open"


def test_the_command_writes_what_it_prints(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(theory, "compute", lambda seeds: recorded())
    theory.main(["--output_dir", str(tmp_path)])
    assert (tmp_path / "theory.md").read_text(encoding="utf-8") in capsys.readouterr().out
    assert json.loads((tmp_path / "theory.json").read_text(encoding="utf-8")) == recorded()
    with pytest.raises(SystemExit):
        theory.main(["--seeds", "0"])
    assert "--seeds 0: at least 1" in capsys.readouterr().err
