"""The exact estimator of the reverse KL: its gradient's expectation by enumeration, and its coefficients."""

import itertools

import pytest
import torch
from contract import IMPLS, assert_contract, crossed, random_batch, run_eager, run_fused, truth, variants
from loss_cases import CASES, SMALL_CASES, every_case_in_fp32, objective
from tabular import Policy, sequences
from torch import Tensor

from hypo_kernels import fused_hypo_loss
from hypo_kernels.objective import ExactOnline

# Columns beyond the vocabulary, where the interpreter's exp may overflow, are masked when they are stored.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")

EXACT = {"kl_estimator": "exact", "with_ref_hidden": True}
KL_COEF = 0.3


class World:
    """Every sequence of up to ``longest`` of 3 tokens under a policy and a reference, row by row."""

    def __init__(self, longest: int) -> None:
        self.sequences = sequences(3, longest, with_eos=True)
        self.policy, self.reference = Policy(self.sequences, seed=0), Policy(self.sequences, seed=1)
        self.logps, self.ref_logps = self.policy.logps(), self.reference.logps().detach()  # of sequences
        self.probs = self.logps.detach().exp()
        self.lengths = torch.tensor([len(s) for s in self.sequences])
        log_p, log_q = (
            torch.cat([p.rows(s) for s in self.sequences]).log_softmax(-1) for p in (self.policy, self.reference)
        )
        targets = torch.tensor([token for s in self.sequences for token in s])
        self.row_logps = log_p.gather(1, targets[:, None]).squeeze(1)
        self.divergences = (log_p.exp() * (log_p - log_q.detach())).sum(-1)

    def rows_of(self, groups: Tensor) -> Tensor:
        """Indices of the rows of the sequences in ``groups`` (G, k), one after the other."""
        starts = (self.lengths.cumsum(0) - self.lengths).tolist()
        lengths = self.lengths.tolist()
        return torch.tensor([t for s in groups.flatten().tolist() for t in range(starts[s], starts[s] + lengths[s])])

    def truth(self, length_penalty: float) -> tuple[Tensor, Tensor]:
        """λ (KL(π‖π_ref) + γ E|y|), summed over all sequences, and its gradient by the policy's logits."""
        kl = KL_COEF * (self.logps.exp() * (self.logps - self.ref_logps + length_penalty * self.lengths.double())).sum()
        (gradient,) = torch.autograd.grad(kl, self.policy.logits, retain_graph=True)
        assert gradient.abs().max() > 1e-2
        return kl.detach(), gradient


@pytest.mark.parametrize("length_penalty", [0.0, 0.2])
@pytest.mark.parametrize(("k", "longest"), [(2, 4), (3, 3)])
def test_exact_gradient_is_unbiased_and_needs_every_term(k: int, longest: int, length_penalty: float) -> None:
    """Sum over every group of k sequences, weighted by its probability: no sampling noise."""
    world = World(longest)
    value, expected = world.truth(length_penalty)
    groups = torch.cartesian_prod(*[torch.arange(len(world.sequences))] * k)  # (G, k)
    rows, lengths = world.rows_of(groups), world.lengths[groups].flatten()
    # One loss over all groups weighs them equally; their probabilities are put in afterwards.
    of_groups = len(groups) * world.probs[groups].prod(dim=1)
    of_rows = of_groups.repeat_interleave(k).repeat_interleave(lengths)

    def terms(length_penalty: float) -> ExactOnline:
        settings = {"kl_coef": KL_COEF, "num_generations": k, "num_prompts": len(groups)}
        online = objective(length_penalty=length_penalty, **settings)
        return online.exact_online(world.divergences[rows].detach(), lengths, longest)

    def gradient(by_logp: Tensor, by_divergence: float) -> Tensor:
        surrogate = of_rows * (by_logp * world.row_logps[rows] + by_divergence * world.divergences[rows])
        return torch.autograd.grad(surrogate.sum(), world.policy.logits, retain_graph=True)[0]

    online = terms(length_penalty)
    assert (gradient(online.by_logp, online.by_divergence) - expected).abs().max() < 1e-10
    assert ((of_groups[:, None] * online.loss).sum() - value).abs() < 1e-10
    wrong = {
        "no score-function term": gradient(0 * online.by_logp, online.by_divergence),
        "no gradient of the divergences": gradient(online.by_logp, 0.0),
        "a baseline with the sample itself in its mean": gradient(online.by_logp * (k - 1) / k, online.by_divergence),
    }
    if length_penalty:
        wrong["tokens to come that cost nothing"] = gradient(terms(0.0).by_logp, online.by_divergence)
    for name, other in wrong.items():
        assert (other - expected).abs().max() > 1e-3, name


@pytest.mark.parametrize(("kl_estimator", "impl"), [("sampled", "torch"), ("exact", "torch"), ("exact", "reference")])
def test_both_kl_estimators_are_unbiased(kl_estimator: str, impl: str) -> None:
    """Through the public function: the policies' logits are hidden states, under an identity head."""
    world, length_penalty = World(3), 0.2
    expected_value, expected = world.truth(length_penalty)
    total, value, kl = torch.zeros_like(expected), 0.0, 0.0
    eye = torch.eye(3, dtype=torch.float64)
    for i, j in itertools.product(range(len(world.sequences)), repeat=2):
        pair = [world.sequences[i], world.sequences[j]]
        out = fused_hypo_loss(
            torch.cat([world.policy.rows(s) for s in pair]),
            eye,
            torch.tensor([token for s in pair for token in s]),
            torch.tensor([0, len(pair[0]), len(pair[0]) + len(pair[1])]),
            num_pairs=0,
            ref_hidden=torch.cat([world.reference.rows(s) for s in pair]),
            ref_lm_head_weight=eye,
            beta=0.1,
            kl_coef=KL_COEF,
            length_penalty=length_penalty,
            kl_estimator=kl_estimator,
            impl=impl,
        )
        weight = float(world.probs[i] * world.probs[j])
        total += weight * torch.autograd.grad(out.loss, world.policy.logits)[0]
        value += weight * float(out.loss.detach())
        kl += weight * float(out.kl.mean())
    assert (total - expected).abs().max() < 1e-10
    assert value == pytest.approx(float(expected_value), abs=1e-10)
    assert kl == pytest.approx(float(world.truth(0.0)[0]) / KL_COEF, abs=1e-10)


# The coefficients, group by group

RAGGED = {
    # A group with an empty sample, one of empty samples alone, a long sample beside one token, powers of two.
    2: [3, 0, 0, 0, 9, 1, 4, 8],
    3: [5, 2, 0, 1, 1, 1, 17, 16, 3],
    4: [2, 7, 0, 5, 1, 33, 32, 31],
}


@pytest.mark.parametrize("k", RAGGED)
def test_token_coefficient_is_later_cost_minus_others_mean(k: int) -> None:
    lengths, gamma = RAGGED[k], 0.1
    prompts = len(lengths) // k
    d = torch.rand(sum(lengths), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    terms = objective(num_generations=k, num_prompts=prompts, length_penalty=gamma)
    online = terms.exact_online(d, torch.tensor(lengths), max(lengths))
    samples = [part.tolist() for part in d.split(lengths)]
    scale = 0.5 / (prompts * k)

    def to_come(sample: int, t: int) -> float:
        return sum(cost + gamma for cost in samples[sample][t + 1 :])

    expected = []
    for i, sample in enumerate(samples):
        others = [j for j in range(i - i % k, i - i % k + k) if j != i]
        for t in range(len(sample)):
            expected.append(scale * (to_come(i, t) - sum(to_come(j, t) for j in others) / (k - 1)))
    torch.testing.assert_close(online.by_logp, torch.tensor(expected, dtype=torch.float64))
    assert online.by_divergence == pytest.approx(scale)
    for i, sample in enumerate(samples):
        assert float(online.kl.flatten()[i]) == pytest.approx(sum(sample))
        assert float(online.loss.flatten()[i]) == pytest.approx(scale * (sum(sample) + gamma * len(sample)))


def test_parts_of_a_batch_have_the_batchs_coefficients() -> None:
    lengths = torch.tensor([5, 2, 0, 1, 1, 1, 17, 16, 3])
    gen = torch.Generator().manual_seed(0)
    logps, ref = (torch.randn(13, generator=gen) for _ in range(2))
    d, lengths = torch.rand(int(lengths.sum()), generator=gen), torch.cat([torch.tensor([2, 3, 4, 5]), lengths])
    terms = objective(num_pairs=2, num_prompts=3, num_generations=3, length_penalty=0.1)
    loss, of_pairs, online = terms.exact(logps, ref, lengths, 2, d, longest=17)
    parts = [(slice(0, 2), 1, slice(0, 0)), (slice(2, 7), 1, slice(0, 7)), (slice(7, 13), 0, slice(7, None))]
    of_parts = [
        terms.exact(logps[s], ref[s], lengths[s], pairs, d[rows], longest=int(lengths[s].max()))
        for s, pairs, rows in parts
    ]
    losses, pairs, onlines = zip(*of_parts, strict=True)
    torch.testing.assert_close(sum(losses), loss)
    torch.testing.assert_close(torch.cat(pairs), of_pairs, rtol=0, atol=0)
    torch.testing.assert_close(torch.cat([x.by_logp for x in onlines]), online.by_logp, rtol=0, atol=0)
    torch.testing.assert_close(torch.cat([x.kl for x in onlines]), online.kl, rtol=0, atol=0)
    sampled_loss, coefficients = terms(logps, ref, lengths, 2)
    torch.testing.assert_close(coefficients[:4], of_pairs, rtol=0, atol=0)
    assert sampled_loss != loss


def test_a_divergence_that_is_not_finite_stays_within_its_group() -> None:
    lengths = torch.tensor([2, 3, 3, 2])
    d = torch.ones(10)
    clean = objective(num_prompts=2).exact_online(d, lengths, 3)
    d[6] = torch.inf
    dirty = objective(num_prompts=2).exact_online(d, lengths, 3)
    torch.testing.assert_close(dirty.by_logp[:5], clean.by_logp[:5], rtol=0, atol=0)
    assert dirty.kl.isfinite().tolist() == [[True, True], [False, True]]


# The loss


@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_gradient_by_logits_has_its_closed_form(impl: str, device: torch.device) -> None:
    """``∂log p(a)/∂z = onehot − p`` and ``∂D/∂z = p ⊙ (log p − log q − D)``."""
    vocab, lengths = 7, [4, 6, 3, 5, 1, 8]
    gen = torch.Generator().manual_seed(0)
    z, ref_z = (torch.randn(sum(lengths), vocab, generator=gen, dtype=torch.float64).to(device) for _ in range(2))
    targets, eye = torch.randint(vocab, (len(z),), generator=gen), torch.eye(vocab, dtype=torch.float64, device=device)
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    terms = objective(num_generations=3, num_prompts=2, length_penalty=0.1)
    out = fused_hypo_loss(
        z.requires_grad_(), eye, targets, bounds, num_pairs=0, num_generations=3, ref_hidden=ref_z,
        ref_lm_head_weight=eye, beta=0.1, kl_coef=terms.kl_coef, length_penalty=0.1, kl_estimator="exact",
        impl=impl,
    )  # fmt: skip
    (gradient,) = torch.autograd.grad(out.loss, z)
    log_p, log_q = z.detach().log_softmax(-1), ref_z.log_softmax(-1)
    p, log_ratio = log_p.exp(), log_p - log_q
    d = (p * log_ratio).sum(-1)
    online = terms.exact_online(d, torch.tensor(lengths, device=device), max(lengths))
    onehot = torch.nn.functional.one_hot(targets.to(device), vocab)
    expected = online.by_logp[:, None] * (onehot - p) + online.by_divergence * p * (log_ratio - d[:, None])
    torch.testing.assert_close(gradient, expected)
    torch.testing.assert_close(out.kl, online.kl.flatten())
    torch.testing.assert_close(out.loss.detach(), online.loss.sum())


@pytest.mark.parametrize(
    ("impl", "dtype", "case"),
    crossed(
        variants(torch.float32, torch.bfloat16, torch.float16, torch.float64, impls=IMPLS),
        SMALL_CASES,
        every_case_in_fp32,
    ),
)
def test_exact_kl_is_within_the_contract(impl: str, dtype: torch.dtype, case: str, device: torch.device) -> None:
    assert_contract(random_batch(**{**CASES[case], **EXACT}, device=device, dtype=dtype), impl)


def test_the_specification_is_plain_autograd_of_the_formula(device: torch.device) -> None:
    """Compare the truth of the contract with the formulas that these tests write out, in float64."""
    for name in SMALL_CASES:
        batch = random_batch(**{**CASES[name], "length_penalty": 0.2, **EXACT}, device=device, dtype=torch.float64)
        exact, plain = truth(batch), run_eager(batch.to(torch.float64))
        assert exact.keys() == plain.keys()
        for key, value in exact.items():
            torch.testing.assert_close(value, plain[key], msg=lambda text, at=f"{name}, {key}": f"{at}: {text}")


@pytest.mark.parametrize("impl", IMPLS)
def test_the_estimator_changes_nothing_about_the_pairs(impl: str, device: torch.device) -> None:
    batch = random_batch([5, 9, 3, 7, 6, 1, 8, 4], 67, num_pairs=2, with_ref_hidden=True, device=device)

    def call(**options: object):
        options = {**batch.options, **options}
        return fused_hypo_loss(batch.hidden, batch.weight, batch.targets, batch.cu_seqlens, impl=impl, **options)

    sampled, exact = call(), call(kl_estimator="exact")
    for name in ("logps", "ref_logps", "chosen_rewards", "rejected_rewards", "margins", "lengths"):
        torch.testing.assert_close(getattr(exact, name), getattr(sampled, name))
    assert not any(value.requires_grad for value in exact[1:-1])
    assert exact.kl.shape == sampled.kl.shape
    assert (exact.kl > 0).all(), "a divergence is never negative, as a log-ratio can be"
    pairs_alone = call(kl_coef=0.0).loss
    expected = pairs_alone + batch.options["kl_coef"] * exact.kl.mean()
    torch.testing.assert_close(exact.loss, expected)


@pytest.mark.parametrize("impl", IMPLS)
def test_ignored_sample_has_no_kl_and_no_gradient(impl: str, device: torch.device) -> None:
    batch = random_batch([4, 5, 6, 3], 67, ignored_sequences=[2], device=device, **EXACT)
    results = run_fused(batch, impl)
    assert results["kl"][2] == 0
    assert not results["gradient of hidden"][9:15].any()
    assert results["gradient of hidden"].isfinite().all()


@pytest.mark.parametrize("impl", IMPLS)
def test_policy_equal_to_reference_learns_only_from_lengths(impl: str, device: torch.device) -> None:
    batch = random_batch([4, 4, 6, 3], 67, ignored=0.0, device=device, **EXACT)
    same = {"ref_hidden": batch.hidden.detach(), "ref_lm_head_weight": batch.weight.detach()}
    results = run_fused(batch.with_options(**same), impl)
    assert results["kl"].tolist() == [0.0] * 4
    assert results["loss"] == 0
    assert results["gradient of hidden"].abs().max() < 1e-7
    # With a cost of a token: the first two samples are equally long and have nothing to learn.
    rows = run_fused(batch.with_options(**same, length_penalty=0.1).to(torch.float32), impl)["gradient of hidden"]
    assert rows[:8].abs().max() < 1e-7
    assert rows[8:].abs().amax() > 1e-4
