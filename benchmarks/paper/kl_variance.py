"""Measure the noise of the two estimators of the reverse KL: ``python -m benchmarks.paper.kl_variance``.

It prints the variance of a prompt's value, and the trace of the covariance of its gradient for the policy's parameters,
for groups of k samples. Besides the library's two estimators there is a third, "to come": the sampled log-ratios, but
each token's gradient is weighted with its own and later log-ratios only. It shows how much of the exact estimator's
gain that explains. With three tokens all groups are enumerated, so the numbers are exact. For a recurrent model with
500 tokens they are estimated from independent groups, with jackknife standard errors. It is seeded, uses one core, and
writes only the table on standard output (``docs/exact_kl.md`` holds it).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hypo_kernels.losses import Sigmoid
from hypo_kernels.objective import Objective

EOS = 0
ESTIMATORS = ("sampled", "to come", "exact")


@dataclass(frozen=True)
class Rows:
    """The tokens of the samples of G prompts, sample after sample."""

    logps: Tensor  # (n,) log π(a_t|s_t)
    ref_logps: Tensor  # (n,)
    divergences: Tensor  # (n,) KL(π(·|s_t)‖π_ref(·|s_t))
    lengths: Tensor  # (G·k,)

    @classmethod
    def of(cls, log_p: Tensor, log_q: Tensor, tokens: Tensor, lengths: Tensor) -> Rows:
        """Create rows from the log-probs (n, V) of the ``tokens`` (n,) and from the reference's."""
        logps, ref_logps = (x.gather(1, tokens[:, None]).squeeze(1) for x in (log_p, log_q))
        return cls(logps, ref_logps, (log_p.exp() * (log_p - log_q)).sum(-1), lengths)

    def estimate(self, estimator: str, k: int) -> tuple[Tensor, Tensor, float]:
        """Return each prompt's KL (G,), and its gradients for ``logps`` (n,) and ``divergences``."""
        # One prompt per loss: the library's coefficients, unscaled.
        objective = Objective(loss=Sigmoid(), kl_coef=1.0, num_pairs=0, num_generations=k, num_prompts=1)
        ratios, longest = (self.logps - self.ref_logps).detach(), int(self.lengths.max())
        if estimator == "exact":
            terms = objective.exact_online(self.divergences.detach(), self.lengths, longest)
            return terms.loss.sum(1), terms.by_logp, terms.by_divergence
        if estimator == "to come":
            terms = objective.exact_online(ratios, self.lengths, longest)
            return terms.loss.sum(1), terms.by_logp + terms.by_divergence * ratios, 0.0
        of_samples = torch.stack([x.sum() for x in ratios.split(self.lengths.tolist())]).view(-1, k)
        values, by_sample = objective.online(of_samples, self.lengths.view(-1, k))
        return values.sum(1), by_sample.flatten().repeat_interleave(self.lengths), 0.0


@dataclass(frozen=True)
class Noise:
    """Squared deviations (G,) of each prompt's value and gradient from their means, with the prompts' weights (G,)."""

    value: Tensor
    gradient: Tensor
    weights: Tensor

    @classmethod
    def of(cls, values: Tensor, gradients: Tensor, weights: Tensor) -> Noise:
        """Compute the noise of values (G,) and gradients (G, P) with the probabilities ``weights`` (G,)."""
        mean_value, mean_gradient = weights @ values, weights @ gradients
        return cls((values - mean_value).square(), (gradients - mean_gradient).square().sum(1), weights)


def enumerated(distance: float, k: int) -> tuple[float, dict[str, Noise]]:
    """Return the KL, and every group of k sequences of up to four of three tokens, with its probability."""
    gen = torch.Generator().manual_seed(0)
    sequences = sorted({s[: s.index(EOS) + 1] if EOS in s else s for s in itertools.product(range(3), repeat=4)})
    prefixes = {p: i for i, p in enumerate(sorted({s[:t] for s in sequences for t in range(len(s))}))}
    policy, noise = (torch.randn(len(prefixes), 3, generator=gen, dtype=torch.float64) for _ in range(2))
    log_p, log_q = policy.log_softmax(-1), (policy + distance * noise).log_softmax(-1)

    groups = torch.cartesian_prod(*[torch.arange(len(sequences))] * k)  # (G, k)
    drawn = [sequences[i] for i in groups.flatten().tolist()]
    states = torch.tensor([prefixes[s[:t]] for s in drawn for t in range(len(s))])
    tokens = torch.tensor([token for s in drawn for token in s])
    lengths = torch.tensor([len(s) for s in drawn])
    rows = Rows.of(log_p[states], log_q[states], tokens, lengths)
    logps = torch.stack([x.sum() for x in rows.logps.split(lengths.tolist())]).view(-1, k)
    weights = logps.sum(1).exp()

    of_group = torch.arange(len(groups)).repeat_interleave(lengths.view(-1, k).sum(1))
    p, log_ratio = log_p[states].exp(), (log_p - log_q)[states]
    by_logits = nn.functional.one_hot(tokens, 3) - p, p * (log_ratio - rows.divergences[:, None])
    noises, means = {}, []
    for estimator in ESTIMATORS:
        values, by_logp, by_divergence = rows.estimate(estimator, k)
        gradients = torch.zeros(len(groups) * len(prefixes), 3, dtype=torch.float64)
        gradients.index_add_(
            0, of_group * len(prefixes) + states, by_logp[:, None] * by_logits[0] + by_divergence * by_logits[1]
        )
        gradients = gradients.view(len(groups), -1)
        noises[estimator] = Noise.of(values, gradients, weights)
        means.append(torch.cat([(weights @ values)[None], weights @ gradients]))
    for mean in means:  # all estimators are unbiased, so their noise is comparable
        torch.testing.assert_close(mean, means[0], rtol=0, atol=1e-12)
    return float(means[0][0]), noises


class Recurrent(nn.Module):
    """A random GRU language model; its responses have 21 tokens on average and at most ``max_length``."""

    vocab, width, max_length = 500, 48, 32

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(self.vocab, self.width)
        self.gru = nn.GRU(self.width, self.width, batch_first=True)
        self.head = nn.Linear(self.width, self.vocab)
        with torch.no_grad():
            self.gru.get_parameter("weight_hh_l0").mul_(2)
            self.head.weight.mul_(24)  # an entropy of 2 nats per token, as in language models
            self.head.bias.zero_()[EOS] = 4.0

    def forward(self, tokens: Tensor) -> Tensor:
        """Return log-probs (B, T, V) of each token given the earlier ones; the first follows EOS."""
        before = torch.cat([torch.full_like(tokens[:, :1], EOS), tokens[:, :-1]], dim=1)
        return self.head(self.gru(self.embedding(before))[0]).log_softmax(-1)

    @torch.no_grad()
    def sample(self, count: int) -> tuple[Tensor, Tensor]:
        """Draw ``count`` responses (count, max_length); return them and their lengths, EOS included."""
        token, state = torch.full((count, 1), EOS), torch.zeros(1, count, self.width)
        drawn = []
        for _ in range(self.max_length):
            out, state = self.gru(self.embedding(token), state)
            token = torch.multinomial(self.head(out[:, 0]).softmax(-1), 1)
            drawn.append(token)
        tokens = torch.cat(drawn, dim=1)
        ended = torch.cat([tokens, torch.full((count, 1), EOS)], dim=1) == EOS
        return tokens, (ended.int().argmax(dim=1) + 1).clamp(max=self.max_length)


def sampled(distance: float, k: int, groups: int = 200) -> tuple[float, dict[str, Noise]]:
    """Return the KL, and independent groups of k responses of a random recurrent model."""
    torch.manual_seed(0)
    policy, reference = Recurrent(), Recurrent()
    reference.load_state_dict(policy.state_dict())
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.add_(distance * parameter.std() * torch.randn_like(parameter))
    tokens, lengths = policy.sample(groups * k)
    parameters = list(policy.parameters())
    values: dict[str, list[Tensor]] = {name: [] for name in ESTIMATORS}
    gradients: dict[str, list[Tensor]] = {name: [] for name in ESTIMATORS}
    for drawn, sizes in zip(tokens.split(k), lengths.split(k), strict=True):
        counted = torch.arange(tokens.shape[1]) < sizes[:, None]
        with torch.no_grad():
            log_q = reference(drawn)[counted]
        rows = Rows.of(policy(drawn)[counted], log_q, drawn[counted], sizes)
        for name in ESTIMATORS:
            value, by_logp, by_divergence = rows.estimate(name, k)
            surrogate = (by_logp * rows.logps + by_divergence * rows.divergences).sum()
            gradient = torch.autograd.grad(surrogate, parameters, retain_graph=True)
            values[name].append(value)
            gradients[name].append(torch.cat([x.flatten() for x in gradient]))
    weights = torch.full((groups,), 1 / groups)
    noises = {n: Noise.of(torch.cat(values[n]), torch.stack(gradients[n]), weights) for n in ESTIMATORS}
    return float(torch.cat(values["exact"]).mean()), noises


def ratio(a: Tensor, b: Tensor) -> tuple[float, float]:
    """Return Σa / Σb of paired a and b (G,), and its jackknife standard error."""
    without = (a.sum() - a) / (b.sum() - b)
    error = ((len(a) - 1) * without.var(correction=0)).sqrt()
    return float(a.sum() / b.sum()), float(error)


def table() -> Iterator[str]:
    """Yield the lines of a Markdown table as they are measured."""
    yield "| policy | k | KL | value: sampled | exact | ratio | gradient: sampled | to come | exact | ratio |"
    yield "|---|---|---|---|---|---|---|---|---|---|"
    cases = [(enumerated, distance, 2) for distance in (0.1, 0.5, 1.0, 2.0)]
    cases += [(sampled, distance, k) for k in (2, 4) for distance in (0.02, 0.1, 0.2)]
    for world, distance, k in cases:
        kl, noises = world(distance, k)
        cells = ["3 tokens, enumerated" if world is enumerated else "500 tokens, GRU", str(k), f"{kl:.3g}"]
        for name, estimators in (("value", ("sampled", "exact")), ("gradient", ESTIMATORS)):
            parts = {e: noises[e].weights * getattr(noises[e], name) for e in estimators}
            times, error = ratio(parts["sampled"], parts["exact"])
            cells += [f"{float(part.sum()):.2e}" for part in parts.values()]
            cells.append(f"**{times:.3g}**" if world is enumerated else f"**{times:.3g}** ± {error:.2g}")
        yield f"| {' | '.join(cells)} |"


def main() -> None:
    torch.set_num_threads(1)
    for line in table():
        print(line, flush=True)


if __name__ == "__main__":
    main()
