"""Check the paper's qualitative claims on the exact experiments."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from benchmarks.paper import coverage
from benchmarks.paper.bandit import (
    Linear,
    Weights,
    expected,
    hypo,
    independent_world,
    linear_world,
    online_rl,
    preference,
    train,
)
from benchmarks.paper.counterexamples import BETA, EPSILONS, KL_COEF, forward_kl, three_responses, uncovered


@pytest.fixture(scope="module", params=[1, pytest.param(10, marks=pytest.mark.slow)], ids="{} seeds".format)
def linear(request):
    return coverage.extrapolation(range(request.param))


@pytest.fixture(scope="module")
def bandit():
    return coverage.outside_the_data(range(10))


@pytest.mark.parametrize("method", ["online RL", "DPO"])
def test_with_features_the_best_rises_and_the_preferred_fall(linear, method):
    curves = linear[method]
    assert (curves["best"][-1] > curves["best"][0]).all()
    assert (curves["preferred"][-1] < curves["preferred"][0]).all()


def test_hypo_stays_nearer_to_its_reference_than_dpo(linear):
    assert (linear["HyPO"]["kl"][-1] < linear["DPO"]["kl"][-1]).all()


@pytest.mark.slow
def test_mass_outside_the_data_rises_with_learned_weights(bandit):
    outside = bandit["DPO, weights"]["outside"]
    assert (outside[-1] > outside[0]).all()


@pytest.mark.slow
def test_mass_outside_the_data_falls_under_a_softmax(bandit):
    # The sum of the data's logits is constant, so by Jensen's inequality the sum of their exponentials grows.
    outside = bandit["DPO, softmax"]["outside"]
    assert (outside[-1] < outside[0]).all()


@pytest.mark.slow
def test_hypo_does_not_depend_on_the_parametrisation(bandit):
    for figure in ("outside", "kl"):
        assert_close(bandit["HyPO, weights"][figure][-1], bandit["HyPO, softmax"][figure][-1], atol=0.01, rtol=0.01)


@pytest.mark.parametrize(
    ("policy", "conserved"),
    [(lambda w: Linear(w.features), lambda p: p.sum(1)), (lambda w: Weights(w.rewards), lambda p: p.square().sum(1))],
    ids=["softmax: sum of logits", "weights: sum of squares"],
)
def test_dpos_gradient_conserves_the_mass_outside(policy, conserved):
    world = independent_world(range(3))
    made, gradient = policy(world), preference(world, beta=1.0)
    before = conserved(made.parameters.clone())
    for _ in range(200):
        made.descend(gradient(made.log_probs()), 1e-4)
    assert made.parameters.std() > 1e-4
    assert_close(conserved(made.parameters), before, atol=1e-5, rtol=0)


# The gradients


@pytest.mark.parametrize(
    "policy", [lambda w: Linear(w.features), lambda w: Weights(w.rewards)], ids=["linear", "weights"]
)
@pytest.mark.parametrize("loss", ["dpo", "ipo", "hypo", "online RL"])
def test_gradients_equal_autograds(policy, loss):
    world = linear_world(range(2), responses=12, features=4, pairs=200)
    rewards, log_ref, n, beta, lam = world.rewards, world.log_ref, world.num_paired, 0.3, 0.7

    def plain(log_pi):
        ratio = log_pi - log_ref
        kl = (log_pi.exp() * ratio).sum()
        if loss == "online RL":
            return beta * kl - (log_pi.exp() * rewards).sum()
        delta = ratio[:, :n, None] - ratio[:, None, :n]
        terms = (delta - 1 / (2 * beta)).square() if loss == "ipo" else -torch.nn.functional.logsigmoid(beta * delta)
        return (world.pairs.shares * terms).sum() + (lam * kl if loss == "hypo" else 0)

    gradients = {
        "dpo": preference(world, beta=beta),
        "ipo": preference(world, beta=beta, loss="ipo"),
        "hypo": hypo(world, beta=beta, kl_coef=lam),
        "online RL": online_rl(rewards, log_ref, beta=beta),
    }
    made = policy(world)
    generator = torch.Generator().manual_seed(0)
    made.parameters += 0.3 * torch.rand(made.parameters.shape, generator=generator, dtype=torch.float64)
    found = made.gradient(gradients[loss](made.log_probs()))
    made.parameters.requires_grad_(True)
    (truth,) = torch.autograd.grad(plain(made.log_probs()), made.parameters)
    assert_close(found, truth, atol=1e-12, rtol=1e-10)


def test_a_constant_cost_has_a_zero_gradient():
    log_pi = torch.randn(2, 5, dtype=torch.float64).log_softmax(1)
    assert_close(expected(torch.ones_like)(log_pi), torch.zeros_like(log_pi))


# The worlds


def test_pairs_span_the_features_of_half_the_responses():
    world = linear_world(range(3))
    assert world.num_paired == 50
    assert (torch.linalg.matrix_rank(world.features[:, :50]) == 16).all()
    assert (world.best == 99).all()
    assert_close(world.features.norm(dim=2), torch.ones(3, 100, dtype=torch.float64))
    assert_close(world.pairs.shares.sum((1, 2)), torch.ones(3, dtype=torch.float64))
    assert (world.pairs.shares.diagonal(dim1=1, dim2=2) == 0).all()


def test_pairs_are_labelled_by_bradley_terry():
    world = independent_world([0], pairs=200_000)
    shares, gap = world.pairs.shares[0], world.rewards[0, :50, None] - world.rewards[0, None, :50]
    near = (gap.abs() < 1) & (gap != 0)
    wins = (shares / (shares + shares.T))[near]
    assert (wins - torch.sigmoid(gap[near])).abs().mean() < 0.05


def test_a_seeds_world_does_not_depend_on_other_seeds():
    alone, together = independent_world([3]), independent_world(range(5))
    assert torch.equal(alone.rewards[0], together.rewards[3])
    assert torch.equal(alone.pairs.shares[0], together.pairs.shares[3])


# The counterexamples


def test_only_hypos_reverse_kl_is_bounded_at_the_minimum():
    found = uncovered()
    for name in ("dpo", "ipo"):
        assert_close(found.loss[name], found.least_loss[name], atol=1e-12, rtol=0)
        steps = found.kl[name].diff() / -found.epsilons.log().diff()
        assert_close(steps, torch.full_like(steps, 0.9), atol=0.02, rtol=0)  # 0.9 nats per nat of log 1/ε: no bound
    assert (found.kl["hypo"] <= found.kl_bound).all()
    assert found.kl_bound.max() < 0.7
    assert (found.hypo_log_probs[:, 2].exp() < 2.001 * found.epsilons).all()


def test_the_counterexamples_have_the_least_loss():
    found, gaps = uncovered(), torch.linspace(-20, 20, 400_001, dtype=torch.float64)
    p = torch.sigmoid(torch.tensor(1.0, dtype=torch.float64))
    log_sigmoid = torch.nn.functional.logsigmoid
    losses = {
        "dpo": -p * log_sigmoid(BETA * gaps) - (1 - p) * log_sigmoid(-BETA * gaps),
        "ipo": p * (gaps - 1 / (2 * BETA)).square() + (1 - p) * (gaps + 1 / (2 * BETA)).square(),
    }
    for name, loss in losses.items():
        assert_close(found.least_loss[name], loss.min().expand(len(EPSILONS)), atol=1e-6, rtol=0)


def test_hypos_minimum_has_a_zero_gradient():
    found = uncovered()
    world = three_responses(found.epsilons)
    by_logits = hypo(world, beta=BETA, kl_coef=KL_COEF)(found.hypo_log_probs)
    assert_close(by_logits, torch.zeros_like(by_logits), atol=1e-8, rtol=0)
    assert_close(found.hypo_log_probs.exp().sum(1), torch.ones(len(EPSILONS), dtype=torch.float64))
    start = preference(world, beta=BETA)(world.log_ref)
    assert start.abs().max() > 1e-2, "elsewhere the gradient is not zero"


def test_a_forward_kl_grows_as_the_reward_error_vanishes():
    lines = [forward_kl(n) for n in (1e4, 1e8, 1e12, 1e16)]
    errors, kls = [line.mean_squared_error for line in lines], [line.forward_kl for line in lines]
    assert errors == sorted(errors, reverse=True)
    assert kls == sorted(kls)
    assert errors[-1] < 1e-7
    assert kls[-1] > 1000


def test_a_forward_kl_is_the_sum_over_all_responses():
    n, beta = 1000, 0.7
    reward = torch.zeros(n, dtype=torch.float64)
    reward[0] = n**0.25
    log_ref = torch.full((n,), 1 / n, dtype=torch.float64).log()
    log_pi = (log_ref + reward / beta).log_softmax(0)
    assert forward_kl(n, beta).forward_kl == pytest.approx(float((log_ref.exp() * (log_ref - log_pi)).sum()), rel=1e-9)


# The command


def test_the_command_writes_its_tables_and_pictures(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(coverage, "train", lambda *a, steps, **k: train(*a, steps=200, **k))
    coverage.main(["--output_dir", str(tmp_path), "--seeds", "2"])
    assert {path.name for path in tmp_path.iterdir()} == {"coverage.md", "figure2.png", "counterexamples.png"}
    text = (tmp_path / "coverage.md").read_text()
    assert "2 of 2 seeds" in text
    assert text.splitlines()[0] in capsys.readouterr().out


def test_no_seeds_are_refused(capsys):
    with pytest.raises(SystemExit):
        coverage.main(["--seeds", "0"])
    assert "--seeds 0: at least 1" in capsys.readouterr().err
