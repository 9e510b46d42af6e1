"""``online_fraction``: some of a step's prompts get samples, and the KL stays unbiased."""

from itertools import combinations, product

import pytest
import torch
from short_runs import ROUNDING, recorded, trained
from torch.testing import assert_close

from hypo_kernels import fused_hypo_loss
from hypo_train.algorithms.micro_batch import MicroBatch
from hypo_train.data.online import num_online, online_first
from hypo_train.data.rows import Prompt
from hypo_train.metrics.meter import Meter
from hypo_train.preflight.data import describe_steps
from hypo_train.preflight.findings import Findings
from hypo_train.prepare import prepare
from hypo_train.sampling.rollouts import StepSamples
from hypo_train.train import train_step
from hypo_train.utils.rank_share import RankShare

P, K, V, FRACTION, KL_COEF, BETA = 3, 2, 3, 0.5, 0.7, 0.3  # 1.5 prompts a step: one or two, with equal probability


def expected_gradient(logits, ref, chosen, rejected):
    """Return the gradient of DPO's loss plus ``KL_COEF`` times the mean KL of all prompts, by autograd."""
    logits = logits.clone().requires_grad_()
    logps, ref_logps, rows = logits.log_softmax(-1), ref.log_softmax(-1), torch.arange(P)
    ratio = logps - ref_logps
    dpo = -torch.nn.functional.logsigmoid(BETA * (ratio[rows, chosen] - ratio[rows, rejected])).mean()
    kl = (logps.exp() * ratio).sum(-1).mean()
    (dpo + KL_COEF * kl).backward()
    return logits.grad


def gradient_of_draw(logits, ref, chosen, rejected, online, samples):
    """Return the gradient of one step that drew ``samples`` for the prompts ``online``."""
    hidden = logits.clone().requires_grad_()
    completions = [[token] for drawn in samples for token in drawn]
    batch = MicroBatch([Prompt(p, (p,)) for p in range(P)], range(P), StepSamples(completions, K, None), None, 1.0)
    rows = torch.tensor([*range(P), *range(P), *(p for p in online for _ in range(K))])
    targets = torch.tensor([*chosen, *rejected, *(token for drawn in samples for token in drawn)])
    loss = fused_hypo_loss(
        hidden[rows],
        torch.eye(V, dtype=torch.float64),
        targets,
        torch.arange(len(rows) + 1),
        num_pairs=P,
        num_generations=K,
        ref_logps=ref.log_softmax(-1)[rows, targets],
        beta=BETA,
        kl_coef=KL_COEF * batch.online_weight(FRACTION),
    ).loss
    loss.backward()
    return hidden.grad


# Every outcome of a step, with its probability: the number of online prompts, which ones, and their samples.
def test_the_gradient_is_unbiased():
    generator = torch.Generator().manual_seed(0)
    logits, ref = torch.randn(2, P, V, dtype=torch.float64, generator=generator)
    chosen, rejected = [0, 1, 2], [1, 0, 0]
    probabilities = logits.softmax(-1)
    mean, total = torch.zeros_like(logits), 0.0
    for count in (1, 2):
        subsets = list(combinations(range(P), count))
        for online in subsets:
            for tokens in product(range(V), repeat=count * K):
                samples = [tokens[i * K : (i + 1) * K] for i in range(count)]
                drawn = [probabilities[p, t] for p, of_prompt in zip(online, samples, strict=True) for t in of_prompt]
                weight = 0.5 / len(subsets) * float(torch.stack(drawn).prod())
                mean += weight * gradient_of_draw(logits, ref, chosen, rejected, online, samples)
                total += weight
    assert total == pytest.approx(1, abs=1e-12)
    assert_close(mean, expected_gradient(logits, ref, chosen, rejected), atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize("fraction", [1 / 16, 0.3, 0.5])
def test_a_step_has_the_fraction_on_average_over_seeds(fraction):
    counts = torch.tensor([num_online(fraction, 40, 8, seed) for seed in range(4000)], dtype=torch.float64)
    low = int(fraction * 8)
    assert set(counts.tolist()) <= {low, low + 1}
    assert abs(counts.mean() - fraction * 8) <= 4 * counts.std() / len(counts) ** 0.5


def test_every_row_of_a_step_is_equally_often_online():
    firsts = torch.tensor([online_first(list(range(6)), 2, step, 0)[:2] for step in range(3000)])
    share = firsts.flatten().bincount(minlength=6) / len(firsts)
    assert (share - 2 / 6).abs().max() < 4 * (2 / 9 / 3000) ** 0.5  # of a share of 1/3


def test_steps_add_up_to_the_fraction_of_all_rows(settings):
    run = prepare(settings(online_fraction=0.3, num_eval_rows=5, max_steps=40))  # 19 rows: epochs end with 3 rows
    counts = [run.plan.num_online(step) for step in range(40)]
    rows = [len(run.plan.rows_of_step(step)) for step in range(40)]
    for stop in range(1, 41):
        assert abs(sum(counts[:stop]) - 0.3 * sum(rows[:stop])) < 1
    assert set(rows) == {3, 4}


def test_processes_have_equal_shares_of_the_online_prompts(settings):
    plan = prepare(settings(online_fraction=0.6, per_device_train_batch_size=8)).plan
    for step in range(3):
        online = plan.rows_of_step(step)[: plan.num_online(step)]
        parts = [RankShare(rank, 2).select(plan.rows_of_step(step)) for rank in range(2)]
        sizes = [len(RankShare(rank, 2).indices(len(online))) for rank in range(2)]
        assert abs(sizes[0] - sizes[1]) <= 1
        assert sorted(online) == sorted(row for part, size in zip(parts, sizes, strict=True) for row in part[:size])


def test_only_online_prompts_get_samples(settings):
    run = recorded(settings(online_fraction=0.5))
    run.model.train()
    train_step(run, 0, Meter())
    assert run.sampler.prompts == [[list(row.prompt) for row in run.plan.online_rows(0)]]
    assert run.throughput.read(steps=1, seconds=1.0)["num_online_samples"] == 2 * 2


# One micro-batch, and several of which some have no samples.
@pytest.mark.parametrize("changes", [{}, {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}], ids=str)
def test_the_loss_is_that_of_dpo_and_a_share_of_the_kl(settings, changes):
    def first_step(**more):
        run = recorded(settings(max_steps=8, **changes, **more))
        run.model.train()
        meter = Meter()
        train_step(run, 3, meter)  # after the policy has moved, so that the KL is not 0
        return run, meter.read()

    run, hypo = first_step(online_fraction=0.3, algorithm="hypo")
    _, dpo = first_step(algorithm="dpo")
    online = run.plan.num_online(3)
    weight = online / (0.3 * 4)
    assert online in (1, 2)
    assert hypo["loss"] == pytest.approx(dpo["loss"] + 0.05 * weight * hypo["kl"], abs=ROUNDING)


def test_a_step_without_online_prompts_is_a_step_of_dpo(settings, tmp_path):
    lines = trained(settings(online_fraction=0.125, max_steps=4))
    counted = [line.get("num_online_samples", 0) for line in lines if "loss" in line]
    assert counted[-1] == 2 * 2  # an eighth of 4 steps of 4 rows, 2 samples each
    assert len(set(counted)) > 1
    assert [line for line in lines if "loss" in line and "kl" not in line]


def test_a_run_that_would_draw_nothing_is_warned_of(settings):
    run = prepare(settings(online_fraction=1e-6))
    findings = Findings(run.config)
    describe_steps(run.config, run.plan, findings)
    [warning] = findings.warnings
    assert warning.startswith("no prompt of this run gets samples: online_fraction=1e-06 of the 3 steps' rows is less")
