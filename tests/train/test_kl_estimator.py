"""HyPO with the exact estimator of the reverse KL: short runs, and one step against its formula."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import tiny
import torch
import torch.nn.functional as F
from short_runs import (
    LAST_LAYER,
    LORA,
    LORA_HEAD,
    OF_PAIRS,
    OF_SAMPLES,
    OF_STEPS,
    ROUNDING,
    metrics_of,
    recorded,
    steps,
)
from transformers import AutoModelForCausalLM

from hypo_train.metrics.log import without_costs
from hypo_train.train import train

WAYS = {
    "full": {},
    "full, tied": {},
    "full, a head with a bias": {},
    "lora": LORA,
    "lora, head": LORA_HEAD,
    "last layer": LAST_LAYER,
}


@pytest.fixture(params=WAYS)
def exact(request, settings, saved_model):
    """``exact(**changes)`` is a config for the exact estimator, for each way to train."""
    models = {
        "full, tied": lambda: saved_model("llama", tie_word_embeddings=True),
        "full, a head with a bias": lambda: saved_model("phi"),
    }
    model = models.get(request.param, saved_model)()
    return lambda **changes: settings(model=model, kl_estimator="exact", **WAYS[request.param], **changes)


def test_three_steps_log_the_same_names_and_no_negative_kl(exact):
    config = exact(num_eval_rows=4)
    result = train(config, progress=False)
    *lines, _ = metrics_of(config)
    for line in lines:
        assert set(without_costs(line)) == OF_STEPS | OF_PAIRS | OF_SAMPLES
        assert all(math.isfinite(value) for value in line.values())
    assert lines[0]["kl"] == pytest.approx(0, abs=ROUNDING)  # the policy is the reference before its first update
    assert all(line["kl"] > 0 for line in lines[1:])
    assert result.evaluation.metrics["eval_kl"] != 0
    assert (Path(config.output_dir) / "checkpoint-3").is_dir()


def plain_rows(model, prompt, completion):
    """(len(completion), V) log-probs of the whole vocabulary at each token of a plain row, differentiable."""
    device = next(model.parameters()).device
    ids = torch.tensor([[*prompt, *completion]], device=device)
    logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1]
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)


def plain_loss(model, initial, pairs, samples, config):
    """Eq. 4 on the pairs, and the exact estimator's surrogate on the samples, sequence by sequence."""

    def rows(prompt, completion):
        with torch.no_grad():
            of_reference = plain_rows(initial, prompt, completion)
        return plain_rows(model, prompt, completion), of_reference

    def log_ratio(prompt, completion):
        log_p, log_q = rows(prompt, completion)
        return (log_p - log_q)[range(len(completion)), list(completion)].sum()

    margins = [log_ratio(pair.prompt, pair.chosen) - log_ratio(pair.prompt, pair.rejected) for pair in pairs]
    loss = -F.logsigmoid(config.beta * torch.stack(margins)).mean()
    k = config.num_generations
    for i, pair in enumerate(pairs):
        group = samples[i * k : (i + 1) * k]
        logps, divergences = [], []
        for sample in group:
            log_p, log_q = rows(pair.prompt, sample)
            logps.append(log_p[range(len(sample)), sample])
            divergences.append((log_p.exp() * (log_p - log_q)).sum(-1))
        costs = [d.detach() + config.length_penalty for d in divergences]
        for a in range(k):
            term = divergences[a].sum()
            for t in range(len(group[a])):
                others = [costs[b][t + 1 :].sum() for b in range(k) if b != a]
                term = term + (costs[a][t + 1 :].sum() - sum(others) / (k - 1)) * logps[a][t]
            loss = loss + config.kl_coef * term / (len(pairs) * k)
    return loss


def plain_gradients(policy, initial, pairs, samples, config):
    """Of ``plain_loss``, by the parameters' names."""
    parameters = policy.trained_parameters()
    loss = plain_loss(policy.model, initial, pairs, samples, config)
    return dict(zip(parameters, torch.autograd.grad(loss, parameters.values()), strict=True))


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_a_steps_gradients_match_the_formula_on_separate_rows(exact, impl):
    config = exact(
        beta=0.3, kl_coef=0.5, length_penalty=0.1, num_generations=3, max_grad_norm=0, learning_rate=1e-2,
        max_new_tokens=40, impl=impl,
    )  # fmt: skip
    run = recorded(config)
    steps(run, 2)  # away from the reference, where all divergences are 0
    before = tiny.weights(run.policy)
    steps(run, 1, first=2)
    found = run.optimizer.gradients[2]

    parameters = run.policy.trained_parameters()
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(before[name])
    initial = AutoModelForCausalLM.from_pretrained(config.model_name_or_path).to(run.accelerator.device).eval()
    pairs = [run.plan.train_rows[i] for i in run.plan.rows_of_step(2)]
    samples = run.sampler.drawn[2].completions()
    assert len({len(sample) for sample in samples}) > 1, "ragged samples"
    eager = plain_gradients(run.policy, initial, pairs, samples, config)
    truth = plain_gradients(run.policy.double(), initial.double(), pairs, samples, config)
    assert found.keys() == truth.keys()
    largest = max(gradient.abs().max() for gradient in truth.values())
    assert largest > 1e-2
    # The last digits of hidden states reach all gradients, each of which is a sum of terms as large as the largest.
    of_eager = max((eager[name] - gradient).abs().max() for name, gradient in truth.items())
    for name, gradient in found.items():
        error = (gradient - truth[name]).abs().max()
        assert error <= 2 * (of_eager + torch.finfo(torch.float32).eps * largest), name
