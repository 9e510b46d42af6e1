"""Methods, the settings that are swept, and their training: all settings and seeds of a method side by side.

A policy is π(y|x) ∝ π_ref(y) exp f(x, y) with f the inner product of two small networks, of the prompt and of the
response, so it generalises over both. Everything is float32 in one thread, and random numbers depend on the seed alone:
a repetition on the same machine is bit-identical, and all methods see the same pairs and the same draws.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.paper.interaction.world import COVERED, HELD_OUT, HIGHEST, LOWEST, PAIRS, Pairs, Worlds

LEARNING_RATE, BATCH_SIZE, NUM_GENERATIONS, IMPORTANCE_CAP = 3e-3, 32, 2, 2.0
CHECKPOINTS = (25, 50, 100, 200, 300, 400, 600, 800)  # steps; there are 25 in an epoch
HIDDEN, INNER = 32, 16
REWARD_MODEL_STEPS, REWARD_MODEL_EVERY = 400, 20


@dataclass(frozen=True)
class Setting:
    """A method and its hyper-parameters."""

    method: str
    beta: float
    weight: float = 0.0  # λ of HyPO's KL, or that of the NLL of the chosen response

    @property
    def name(self) -> str:
        symbol = {"HyPO": " λ", "DPO + NLL": " NLL"}.get(self.method)
        return f"{self.method} β {self.beta:g}" + (f"{symbol} {self.weight:g}" if symbol else "")


# Nine settings a method: no method wins a sweep by being tried more often.
BETAS = (0.03, 0.06, 0.1, 0.15, 0.2, 0.3, 0.4, 0.6, 1.0)
PAIRED_BETAS = (0.03, 0.1, 0.3)  # of methods that have a second hyper-parameter
SWEEPS: dict[str, list[Setting]] = {
    "DPO": [Setting("DPO", beta) for beta in BETAS],
    "IPO": [Setting("IPO", beta) for beta in BETAS],
    "DPO + NLL": [Setting("DPO + NLL", beta, alpha) for beta in PAIRED_BETAS for alpha in (0.003, 0.01, 0.03)],
    "χPO": [Setting("χPO", beta) for beta in BETAS],
    "HyPO": [Setting("HyPO", beta, kl_coef) for beta in PAIRED_BETAS for kl_coef in (0.01, 0.03, 0.06)],
    "RLOO": [Setting("RLOO", beta) for beta in BETAS],
}
METRICS = ("reward", "kl", "uncovered", "ratio", "accuracy")


class Network:
    """f(x, y) of R rows, 0 at the start; row r starts like the network of seed ``seeds[r % S]``."""

    def __init__(self, seeds: Sequence[int], copies: int, features: int) -> None:
        self.parameters = []
        shapes = ((features, HIDDEN), (1, HIDDEN), (HIDDEN, INNER)) * 2
        scales = (features**-0.5, 0.0, 0.0, features**-0.5, 0.0, HIDDEN**-0.5)
        for i, (shape, scale) in enumerate(zip(shapes, scales, strict=True)):
            each = [torch.randn(shape, generator=_generator(seed, 1 + i)) * scale for seed in seeds]
            self.parameters.append(torch.stack(each).repeat(copies, 1, 1).requires_grad_())

    def __call__(self, x: Tensor, phi: Tensor, parameters: Sequence[Tensor] | None = None) -> Tensor:
        """Return f, (R, B, RESPONSES), of prompts ``x`` (R, B, FEATURES) and responses ``phi``."""
        a, b, c, d, e, g = parameters or self.parameters
        return torch.tanh(x @ a + b) @ c @ (torch.tanh(phi @ d + e) @ g).transpose(1, 2)


def _generator(seed: int, purpose: int) -> torch.Generator:
    return torch.Generator().manual_seed(1_000_003 * (purpose + 1) + seed)


def train(
    worlds: Worlds,
    seeds: Sequence[int],
    settings: Sequence[Setting],
    *,
    online_fraction: float = 1.0,
    rollout_steps: int = 1,
    checkpoints: Sequence[int] = CHECKPOINTS,
) -> dict[str, Tensor]:
    """Train settings of one method on all worlds; return each of ``METRICS`` as (checkpoints, settings, S).

    Args:
        worlds: One a seed.
        seeds: They set the networks' start, the order of the pairs and the draws.
        settings: Of the same method.
        online_fraction: The share of a step's prompts that get samples.
        rollout_steps: The number of steps whose samples are drawn from the same, the first one's, policy. Later steps
            weight a sample by π / π of the draw, at most ``IMPORTANCE_CAP``.
        checkpoints: Numbers of steps, rising.
    """
    (method,) = {setting.method for setting in settings}
    copies, count = len(settings), len(seeds)
    beta, weight = (
        torch.tensor([getattr(s, name) for s in settings]).repeat_interleave(count)[:, None]
        for name in ("beta", "weight")
    )
    phi, seed_rows = worlds.phi.repeat(copies, 1, 1), torch.arange(count)[:, None]
    learned = learned_rewards(worlds, seeds) if method == "RLOO" else None
    network = Network(seeds, copies, phi.shape[2])
    optimizer = torch.optim.Adam(network.parameters, lr=LEARNING_RATE)
    batches, draws = _order(seeds, checkpoints[-1]), [_generator(seed, 9) for seed in seeds]
    sampled = max(1, round(online_fraction * BATCH_SIZE))
    of_draw = network.parameters
    found = []
    for step in range(checkpoints[-1]):
        prompts, chosen, rejected = (part[seed_rows, batches[:, step]] for part in worlds.train)
        x = worlds.x[seed_rows, prompts].repeat(copies, 1, 1)
        log_pi = (worlds.log_ref + network(x, phi)).log_softmax(2)  # (R, B, RESPONSES)
        loss = torch.zeros(())
        if method != "RLOO":
            of_pair = (log_pi - worlds.log_ref).gather(2, torch.stack([chosen, rejected], 2).repeat(copies, 1, 1))
            loss = loss + preference_loss(method, of_pair[..., 0], of_pair[..., 1], beta).mean(1).sum()
        if method == "DPO + NLL":
            nll = -log_pi.gather(2, chosen.repeat(copies, 1)[..., None])[..., 0]
            loss = loss + (weight * nll).mean(1).sum()
        if method in ("HyPO", "RLOO"):
            log_pi = log_pi[:, :sampled]
            cost = (log_pi - worlds.log_ref).detach() * (weight if learned is None else beta)[..., None]
            if learned is not None:
                cost = cost - learned[seed_rows, prompts[:, :sampled]].repeat(copies, 1, 1)
            if step % rollout_steps == 0:
                of_draw = [parameter.detach().clone() for parameter in network.parameters]
            with torch.no_grad():
                drawn_from = log_pi
                if step % rollout_steps:
                    drawn_from = (worlds.log_ref + network(x[:, :sampled], phi, of_draw)).log_softmax(2)
                uniform = torch.stack([torch.rand(sampled, NUM_GENERATIONS, generator=g) for g in draws])
                samples = _draw(drawn_from, uniform.repeat(copies, 1, 1))
            loss = loss + _leave_one_out(log_pi, drawn_from, cost, samples).mean((1, 2)).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step + 1 in checkpoints:
            found.append(evaluate(worlds, network, copies))
    return {name: torch.stack([point[name] for point in found]).unflatten(1, (copies, count)) for name in METRICS}


def preference_loss(method: str, chosen: Tensor, rejected: Tensor, beta: Tensor) -> Tensor:
    """Return the loss of a pair from the log-ratios log π / π_ref of its responses: DPO's, IPO's or χPO's."""
    if method == "IPO":
        return (chosen - rejected - 1 / (2 * beta)).square()
    margin = beta * (chosen - rejected)
    if (
        method == "χPO"
    ):  # arXiv 2407.13399, Algorithm 1: φ(z) = z + log z of the ratio z, cut at twice the range of rewards
        capped = [ratio.clamp(max=20.0).exp() + ratio for ratio in (chosen, rejected)]
        most = 2 * (HIGHEST - LOWEST)
        margin = (beta * (capped[0] - capped[1])).clamp(-most, most)
    return -F.logsigmoid(margin)


def _draw(log_pi: Tensor, uniform: Tensor) -> Tensor:
    """Return samples (R, B, k) of log π (R, B, RESPONSES) by inverting its cumulative sum at ``uniform``."""
    return torch.searchsorted(log_pi.exp().cumsum(2), uniform).clamp(max=log_pi.shape[2] - 1)


def _leave_one_out(log_pi: Tensor, drawn_from: Tensor, cost: Tensor, samples: Tensor) -> Tensor:
    """Return (R, B, k) whose gradient estimates that of E_π[cost]: RLOO."""
    of_sample, k = cost.gather(2, samples), samples.shape[2]
    advantage = of_sample - (of_sample.sum(2, keepdim=True) - of_sample) / (k - 1)
    log_probs = log_pi.gather(2, samples)
    importance = (log_probs.detach() - drawn_from.gather(2, samples).detach()).exp().clamp(max=IMPORTANCE_CAP)
    return importance * advantage * log_probs


def _order(seeds: Sequence[int], steps: int) -> Tensor:
    """Return the pairs (S, steps, BATCH_SIZE) of every step: epochs in random order."""
    a_epoch = PAIRS // BATCH_SIZE
    epochs = -(-steps // a_epoch)
    orders = [
        torch.stack([torch.randperm(PAIRS, generator=generator) for _ in range(epochs)])
        for generator in (_generator(seed, 0) for seed in seeds)
    ]
    return torch.stack(orders).view(len(seeds), epochs * a_epoch, BATCH_SIZE)


def learned_rewards(worlds: Worlds, seeds: Sequence[int]) -> Tensor:
    """Return a Bradley–Terry reward model's rewards (S, prompts, RESPONSES) at its least validation loss.

    They are centred on the reference's mean for each prompt, and cut to the range that they have on the training pairs'
    responses: Assumption 4.4 bounds the reward, and practice clips it.
    """
    network, seed_rows = Network(seeds, 1, worlds.phi.shape[2]), torch.arange(len(seeds))[:, None]
    optimizer, batches = torch.optim.Adam(network.parameters, lr=LEARNING_RATE), _order(seeds, REWARD_MODEL_STEPS)
    least = torch.full((len(seeds),), float("inf"))
    best = torch.zeros_like(worlds.rewards)
    for step in range(REWARD_MODEL_STEPS):
        batch = Pairs(*(part[seed_rows, batches[:, step]] for part in worlds.train))
        rewards = network(worlds.x[seed_rows, batch.prompts], worlds.phi)
        chosen, rejected = (rewards.gather(2, part[..., None]) for part in (batch.chosen, batch.rejected))
        optimizer.zero_grad()
        preference_loss("DPO", chosen, rejected, torch.ones(())).mean((1, 2)).sum().backward()
        optimizer.step()
        if (step + 1) % REWARD_MODEL_EVERY == 0:
            with torch.no_grad():
                rewards = network(worlds.x, worlds.phi)
                pairs = worlds.validation
                chosen, rejected = (rewards[seed_rows, pairs.prompts, part] for part in (pairs.chosen, pairs.rejected))
                loss = preference_loss("DPO", chosen, rejected, torch.ones(())).mean(1)
                best = torch.where((loss < least)[:, None, None], rewards, best)
                least = torch.minimum(loss, least)
    best = best - (worlds.log_ref.exp() * best).sum(2, keepdim=True)
    pairs = worlds.train
    on_pairs = torch.cat([best[seed_rows, pairs.prompts, part] for part in (pairs.chosen, pairs.rejected)], 1)
    return best.clamp(on_pairs.amin(1)[:, None, None], on_pairs.amax(1)[:, None, None])


@torch.no_grad()
def evaluate(worlds: Worlds, network: Network, copies: int) -> dict[str, Tensor]:
    """Return ``METRICS`` (R,), exact means over the held-out prompts.

    The true reward, the reverse KL in nats, the mass on uncovered responses, E_π[π / π_ref], and the share of held-out
    pairs whose chosen response has the higher log-ratio.
    """
    x, phi = worlds.x[:, HELD_OUT].repeat(copies, 1, 1), worlds.phi.repeat(copies, 1, 1)
    log_pi = (worlds.log_ref + network(x, phi)).log_softmax(2)
    ratio, pi = log_pi - worlds.log_ref, log_pi.exp()
    pairs = Pairs(*(part.repeat(copies, 1) for part in worlds.held_out))
    rows = torch.arange(len(pi))[:, None]
    chosen, rejected = (ratio[rows, pairs.prompts - HELD_OUT.start, part] for part in (pairs.chosen, pairs.rejected))
    return {
        "reward": (pi * worlds.rewards[:, HELD_OUT].repeat(copies, 1, 1)).sum(2).mean(1),
        "kl": (pi * ratio).sum(2).mean(1),
        "uncovered": pi[..., COVERED:].sum(2).mean(1),
        "ratio": (pi * ratio.exp()).sum(2).mean(1),
        "accuracy": (chosen > rejected).float().mean(1),
    }
