"""The objective on sequence log-probs: the paper's equations, and the gradient RLOO is an estimate of."""

import itertools

import pytest
import torch
from loss_cases import objective
from tabular import Policy, sequences
from torch import Tensor

from hypo_kernels import fused_hypo_loss
from hypo_kernels.losses import IPOSum, Sigmoid
from hypo_kernels.objective import Objective
from hypo_kernels.pairs import PairLoss


@pytest.mark.parametrize("loss", [Sigmoid(0.1), Sigmoid(0.1, label_smoothing=0.2), IPOSum(0.1)])
def test_a_pairs_coefficients_are_the_derivative_of_its_loss(loss: PairLoss) -> None:
    terms = objective(num_pairs=4, loss=loss)
    # From far apart one way, where a sigmoid saturates, to far apart the other.
    logps = torch.tensor([-5.0, -905.0, -30.0, -31.0, -40.0, -38.0, -900.0, -2.0], dtype=torch.float64)
    logps.requires_grad_()
    value, coefficients = terms(logps, torch.full_like(logps, -20.0).detach(), torch.ones(8), 4)
    (expected,) = torch.autograd.grad(value, logps)
    torch.testing.assert_close(coefficients, expected)
    assert value.isfinite()


def test_the_pairs_loss_is_a_mean_and_the_samples_is_one_too() -> None:
    """A batch that repeats its pairs and groups has the same loss: recipes hold for other batch sizes."""
    gen = torch.Generator().manual_seed(0)
    ratio = torch.randn(4, generator=gen, dtype=torch.float64)
    lengths = torch.tensor([3, 4, 5, 6])
    once, _ = objective(num_pairs=1, num_prompts=1)(ratio, torch.zeros(4), lengths, 1)
    order = torch.tensor([0, 1, 0, 1, 2, 3, 2, 3])
    twice, _ = objective(num_pairs=2, num_prompts=2)(ratio[order], torch.zeros(8), lengths[order], 2)
    torch.testing.assert_close(twice, once)
    expected = -torch.nn.functional.logsigmoid(0.1 * (ratio[0] - ratio[1])) + 0.5 * ratio[2:].mean()
    torch.testing.assert_close(once, expected)


def test_label_smoothing_mixes_in_the_flipped_pairs_loss() -> None:
    logps = torch.tensor([-5.0, -9.0], dtype=torch.float64)
    ref = torch.tensor([-6.0, -6.0], dtype=torch.float64)

    def loss(terms: Objective, logps: Tensor) -> float:
        return float(terms(logps, ref, torch.ones(2), 1)[0])

    plain, smooth = objective(num_pairs=1), objective(num_pairs=1, loss=Sigmoid(0.1, label_smoothing=0.2))
    assert loss(smooth, logps) == pytest.approx(0.8 * loss(plain, logps) + 0.2 * loss(plain, logps.flip(0)))


def test_ipo_is_least_where_the_ratios_differ_by_half_over_beta() -> None:
    terms = objective(num_pairs=1, loss=IPOSum(0.25))
    loss, coefficients = terms(torch.tensor([-3.0, -5.0]), torch.tensor([-5.0, -5.0]), torch.ones(2), 1)
    assert loss.item() == 0.0
    assert coefficients.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("k", [2, 3, 4])
def test_sample_coefficient_is_ratio_minus_others_mean(k: int) -> None:
    gen = torch.Generator().manual_seed(0)
    logps, ref = (torch.randn(3 * k, generator=gen, dtype=torch.float64) for _ in range(2))
    lengths = torch.arange(3 * k) + 1
    _, coefficients = objective(num_generations=k, num_prompts=3, length_penalty=0.1)(logps, ref, lengths, 0)
    r = logps - ref + 0.1 * lengths.double()
    for prompt, i in itertools.product(range(3), range(k)):
        group = r[prompt * k : (prompt + 1) * k].tolist()
        others = [x for j, x in enumerate(group) if j != i]
        expected = 0.5 / (3 * k) * (group[i] - sum(others) / (k - 1))
        assert float(coefficients[prompt * k + i]) == pytest.approx(expected, abs=1e-12)
    torch.testing.assert_close(coefficients.view(3, k).sum(1), torch.zeros(3, dtype=torch.float64))


def test_parts_of_a_batch_add_up_to_the_batch() -> None:
    """Chunks are whole pairs and groups: their losses and coefficients are those of one call on all."""
    gen = torch.Generator().manual_seed(0)
    logps, ref = (torch.randn(12, generator=gen, dtype=torch.float64) for _ in range(2))
    lengths = torch.randint(1, 9, (12,), generator=gen)
    terms = objective(num_pairs=3, num_prompts=2, num_generations=3, length_penalty=0.1)
    loss, coefficients = terms(logps, ref, lengths, 3)
    parts = [(slice(0, 4), 2), (slice(4, 9), 1), (slice(9, 12), 0)]
    losses, rows = zip(*(terms(logps[s], ref[s], lengths[s], pairs) for s, pairs in parts), strict=True)
    torch.testing.assert_close(sum(losses), loss)
    torch.testing.assert_close(torch.cat(rows), coefficients)


@pytest.mark.parametrize("with_eos", [False, True], ids=["three tokens", "up to three tokens and an EOS"])
@pytest.mark.parametrize("k", [2, 3])
def test_rloo_gradient_is_unbiased(k: int, with_eos: bool) -> None:
    """Sum over every group of k sequences, weighted by its probability: no sampling noise."""
    all_sequences = sequences(3, 3, with_eos=with_eos)
    policy, reference = Policy(all_sequences, seed=0), Policy(all_sequences, seed=1)
    logps, ref_logps = policy.logps(), reference.logps().detach()
    lengths = torch.tensor([float(len(s)) for s in all_sequences], dtype=torch.float64)
    kl_coef, length_penalty = 0.3, 0.2 if with_eos else 0.0
    probs = logps.exp()
    assert probs.sum().item() == pytest.approx(1.0, abs=1e-12)
    kl = kl_coef * (probs * (logps - ref_logps + length_penalty * lengths)).sum()
    (expected,) = torch.autograd.grad(kl, policy.logits, retain_graph=True)

    groups = torch.cartesian_prod(*[torch.arange(len(all_sequences))] * k)  # (G, k)
    terms = objective(kl_coef=kl_coef, length_penalty=length_penalty, num_generations=k, num_prompts=len(groups))
    # One loss over all groups weighs them equally; their probabilities are put in afterwards.
    _, coefficients = terms(logps[groups].flatten(), ref_logps[groups].flatten(), lengths[groups].flatten(), 0)
    weights = len(groups) * probs[groups].prod(dim=1).detach()
    surrogate = (weights[:, None] * coefficients.view(-1, k).detach() * logps[groups]).sum()
    (got,) = torch.autograd.grad(surrogate, policy.logits)
    assert (got - expected).abs().max() < 1e-10
    assert expected.abs().max() > 1e-3


@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_fused_hypo_loss_gradient_is_unbiased(impl: str) -> None:
    """Through the public function: the policy's logits are hidden states, under an identity head."""
    all_sequences = sequences(3, 3, with_eos=True)
    policy, reference = Policy(all_sequences, seed=0), Policy(all_sequences, seed=1)
    logps, ref_logps = policy.logps(), reference.logps().detach()
    kl_coef, length_penalty = 0.3, 0.2
    probs = logps.exp()
    lengths = torch.tensor([float(len(s)) for s in all_sequences], dtype=torch.float64)
    kl = kl_coef * (probs * (logps - ref_logps + length_penalty * lengths)).sum()
    (expected,) = torch.autograd.grad(kl, policy.logits, retain_graph=True)

    total, value = torch.zeros_like(expected), 0.0
    for i, j in itertools.product(range(len(all_sequences)), repeat=2):
        pair = [all_sequences[i], all_sequences[j]]
        hidden = torch.cat([policy.rows(s) for s in pair])
        out = fused_hypo_loss(
            hidden,
            torch.eye(3, dtype=torch.float64),
            torch.tensor([token for s in pair for token in s]),
            torch.tensor([0, len(pair[0]), len(pair[0]) + len(pair[1])]),
            num_pairs=0,
            ref_logps=ref_logps[[i, j]],
            beta=0.1,
            kl_coef=kl_coef,
            length_penalty=length_penalty,
            impl=impl,
        )
        weight = float((probs[i] * probs[j]).detach())
        (gradient,) = torch.autograd.grad(out.loss, policy.logits)
        total += weight * gradient
        value += weight * float(out.loss.detach())
    assert (total - expected).abs().max() < 1e-10
    assert value == pytest.approx(float(kl.detach()), abs=1e-10)
