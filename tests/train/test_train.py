"""Whole steps and short runs: what a step computes, what it logs, what it leaves on the disk."""

from __future__ import annotations

import json
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
    slow_unless,
    steps,
    trained,
)
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoTokenizer

from hypo_train.config import load_config
from hypo_train.data.order import batch_indices
from hypo_train.metrics.log import without_costs
from hypo_train.train import train
from hypo_train.trees.pack import Batcher

# Short runs


@pytest.mark.parametrize(
    ("algorithm", "way"),
    [
        *((algorithm, way) for algorithm in ("sft", "dpo", "ipo", "hypo") for way in ("full", "lora")),
        ("hypo", "lora, head"),
        ("hypo", "last layer"),
    ],
)
def test_three_steps_of_every_algorithm(settings, algorithm, way):
    ways = {"full": {}, "lora": LORA, "lora, head": LORA_HEAD, "last layer": LAST_LAYER}
    config = settings(algorithm=algorithm, report_to=["tensorboard"], num_eval_rows=4, **ways[way])
    result = train(config, progress=False)
    *steps, evaluation = metrics_of(config)
    expected = OF_STEPS | {"sft": {"loss"}, "hypo": OF_PAIRS | OF_SAMPLES}.get(algorithm, OF_PAIRS)
    for number, line in enumerate(steps, start=1):
        assert set(without_costs(line)) == expected
        assert line["step"] == number
        assert all(math.isfinite(value) for value in line.values())
    assert steps[0]["loss"] != steps[2]["loss"]
    of_evaluation = expected - OF_STEPS - OF_SAMPLES | {"completions/mean_length", "completions/clipped_ratio"}
    of_evaluation |= set() if algorithm == "sft" else {"kl", "kl_se"}
    assert set(evaluation) == {"step"} | {f"eval_{name}" for name in of_evaluation}
    assert result.evaluation is not None
    assert {**result.evaluation.metrics, "step": 3} == evaluation

    assert result.model_dir == Path(config.output_dir) / "final"
    assert AutoModelForCausalLM.from_pretrained(result.model_dir)
    assert AutoTokenizer.from_pretrained(result.model_dir).eos_token_id == tiny.EOS
    assert (Path(config.output_dir) / "checkpoint-3").is_dir()
    assert load_config(["--config", str(Path(config.output_dir) / "config.yaml")]) == config
    samples = (Path(config.output_dir) / "samples" / "step-3.jsonl").read_text().splitlines()
    assert [json.loads(line)["row"] for line in samples] == [20, 21, 22, 23]
    assert scalars(config, "loss") == [(line["step"], pytest.approx(line["loss"])) for line in steps]


def scalars(config, name):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(Path(config.output_dir) / "tensorboard"))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


@pytest.mark.parametrize("way", [{}, LORA, LORA_HEAD, LAST_LAYER], ids=["full", "lora", "lora, head", "last layer"])
def test_the_final_model_is_the_policy_after_the_last_step(settings, way):
    config = settings(algorithm="dpo", **way)
    result = train(config, progress=False)
    run = recorded(config.model_copy(update={"output_dir": config.output_dir + "-again"}))
    steps(run, 3)
    loaded = AutoModelForCausalLM.from_pretrained(result.model_dir).eval()
    tokens = [5, 20, 6, 21, 9]
    own = tiny.plain_logits(run.policy.eval().model, tokens).cpu()
    assert_close(tiny.plain_logits(loaded, tokens), own, atol=1e-5, rtol=1e-5)
    initial = AutoModelForCausalLM.from_pretrained(config.model_name_or_path).eval()
    assert (tiny.plain_logits(initial, tokens) - own).abs().max() > 1e-2


def test_the_first_step_logs_the_reference_itself(settings):
    first = trained(settings(max_steps=1))[0]
    for name in ("kl", "rewards/chosen", "rewards/margins"):
        assert first[name] == pytest.approx(0, abs=ROUNDING)
    assert first["loss"] == pytest.approx(math.log(2))


def test_chat_messages_and_implicit_prompts_train_too(settings, saved_model):
    chat = settings(model=saved_model(chat=True), rows=tiny.pair_rows(chat=True), max_prompt_length=32)
    implicit = [{name: f"{row['prompt']} {row[name]}" for name in ("chosen", "rejected")} for row in tiny.pair_rows()]
    for config in (chat, settings(rows=implicit, output_dir=chat.output_dir + "-implicit")):
        assert all(math.isfinite(line["loss"]) for line in trained(config))


# One step against the paper's equations


def padded_rows_logprobs(model, prompts, completions):
    """(S,) log-probs of right-padded plain rows, differentiable, through transformers' own forward."""
    device = next(model.parameters()).device
    rows = [[*prompt, *completion] for prompt, completion in zip(prompts, completions, strict=True)]
    width = max(map(len, rows))
    ids = torch.tensor([row + [tiny.PAD] * (width - len(row)) for row in rows], device=device)
    seen = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=device)
    logps = model(input_ids=ids, attention_mask=seen, use_cache=False).logits.log_softmax(-1)
    return torch.stack(
        [
            sum(logps[s, len(prompt) + t - 1, token] for t, token in enumerate(completion))
            for s, (prompt, completion) in enumerate(zip(prompts, completions, strict=True))
        ]
    )


def paper_gradients(model, initial, pairs, samples, *, beta, kl_coef, k, length_penalty, label_smoothing):
    """Gradients by name: Eq. 4's loss on the pairs plus Algorithm 1's RLOO estimate of the reverse KL."""

    def log_ratios(prompts, completions):
        with torch.no_grad():
            reference = padded_rows_logprobs(initial, prompts, completions)
        return padded_rows_logprobs(model, prompts, completions) - reference

    prompts = [pair.prompt for pair in pairs]
    margin = beta * (
        log_ratios(prompts, [pair.chosen for pair in pairs]) - log_ratios(prompts, [pair.rejected for pair in pairs])
    )
    preference = -(1 - label_smoothing) * F.logsigmoid(margin) - label_smoothing * F.logsigmoid(-margin)
    rho = log_ratios([prompt for prompt in prompts for _ in range(k)], samples).view(-1, k)
    lengths = torch.tensor([len(sample) for sample in samples]).view(-1, k).to(rho.device)
    reward = -(rho.detach() + length_penalty * lengths)  # maximised
    online = torch.zeros((), device=rho.device)
    for i in range(len(pairs)):
        for j in range(k):
            others = [reward[i, other] for other in range(k) if other != j]
            advantage = reward[i, j] - sum(others) / len(others)
            online = online - advantage * rho[i, j] / (len(pairs) * k)
    terms = (preference.mean(), kl_coef * online)
    names, parameters = zip(*[(n, p) for n, p in model.named_parameters() if p.requires_grad], strict=True)
    return [dict(zip(names, torch.autograd.grad(t, parameters, retain_graph=True), strict=True)) for t in terms]


@pytest.mark.parametrize("architecture", ["llama", "gpt_neox", "qwen2"])
def test_a_steps_gradients_are_the_papers_on_padded_rows(settings, saved_model, architecture):
    k, constants = 3, {"beta": 0.3, "kl_coef": 0.5, "length_penalty": 0.1, "label_smoothing": 0.1}
    folder = saved_model(architecture)
    ragged = {"per_device_train_batch_size": 8, "max_new_tokens": 16}  # so that some samples end and some are cut
    shape = {"num_generations": k, "max_grad_norm": 0, "learning_rate": 1e-2, **ragged}
    config = settings(model=folder, **shape, **constants)
    run = recorded(config)
    steps(run, 2)  # away from the reference, where all ratios are 0
    device = run.accelerator.device
    model = AutoModelForCausalLM.from_pretrained(folder).to(device)
    initial = AutoModelForCausalLM.from_pretrained(folder).to(device)
    model.load_state_dict({name: value.clone() for name, value in run.policy.model.state_dict().items()})
    steps(run, 1, first=2)

    pairs = [run.plan.train_rows[i] for i in run.plan.rows_of_step(2)]
    samples = run.sampler.drawn[2].completions()
    assert len({len(pair.prompt) for pair in pairs}) > 1, "ragged prompts"
    assert len({len(sample) for sample in samples}) > 1, "ragged samples"
    preference, online = paper_gradients(model, initial, pairs, samples, k=k, **constants)
    found = run.optimizer.gradients[2]
    assert {name.removeprefix("model.") for name in found} == set(preference)
    for name, gradient in found.items():
        of_pairs, of_samples = preference[name.removeprefix("model.")], online[name.removeprefix("model.")]
        assert_close(
            gradient, of_pairs + of_samples, atol=1e-5, rtol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )
    for term in (preference, online):
        assert max(gradient.abs().max() for gradient in term.values()) > 1e-3, "both terms must count"


# Batches and seeds


@pytest.mark.parametrize("algorithm", ["hypo", "dpo", "ipo", "sft"])
def test_gradient_accumulation_is_one_large_batch(settings, algorithm):
    results = []
    for size, accumulation in ((8, 1), (4, 2), (3, 3)):
        shape = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation}
        # 8 rows: the third shape has micro-batches of 3, 3 and 2. With a small epsilon, AdamW would blow the
        # rounding of gradients near zero up to whole updates.
        run = recorded(settings(algorithm=algorithm, rows=tiny.pair_rows(8), adam_epsilon=1e-2, **shape))
        metrics = [steps(run, 1), steps(run, 1, first=1)]
        results.append((metrics, tiny.weights(run.policy), run))
    (whole, weights, run), *parts = results
    for metrics, others, part in parts:
        for drawn, alike in zip(part.sampler.drawn, run.sampler.drawn, strict=True):
            assert drawn.completions() == alike.completions()
        for before, after in zip(whole, metrics, strict=True):
            assert after.keys() == before.keys()
            for name, value in before.items():
                assert after[name] == pytest.approx(value, abs=1e-6, rel=1e-5), name
        for name, weight in weights.items():
            assert_close(others[name], weight, atol=1e-6, rtol=0)


def padded_tokens(monkeypatch):
    """The sizes of the rows that are laid out from now on, padding included."""
    sizes = []
    for name in ("pairs", "examples"):
        original = getattr(Batcher, name)

        def counted(*arguments, original=original):
            tree = original(*arguments)
            sizes.append(tree.input_ids.numel())
            return tree

        monkeypatch.setattr(Batcher, name, counted)
    return sizes


@pytest.mark.parametrize("algorithm", ["dpo", "ipo", "sft"])
def test_ordering_rows_by_length_keeps_the_loss(settings, monkeypatch, algorithm):
    shape = {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 4, "adam_epsilon": 1e-2}
    results = []
    for ordered in (True, False):
        with monkeypatch.context() as patch:
            if not ordered:
                patch.setattr("hypo_train.data.plan.longest_first", lambda indices, lengths: indices)
            sizes = padded_tokens(patch)
            run = recorded(settings(algorithm=algorithm, attn_implementation="sdpa", **shape))
            metrics = [steps(run, 1), steps(run, 1, first=1)]
            lengths = [[run.plan.train_rows[i].num_tokens for i in run.plan.rows_of_step(step)] for step in range(2)]
            assert all(length == sorted(length, reverse=True) for length in lengths) is ordered
            results.append((metrics, run.optimizer.gradients, sum(sizes)))
    (metrics, gradients, size), (others, other_gradients, other_size) = results
    for found, expected in zip(metrics, others, strict=True):
        assert found == pytest.approx(expected, rel=1e-5, abs=1e-5)
    for found, expected in zip(gradients, other_gradients, strict=True):
        for name, gradient in expected.items():
            assert_close(found[name], gradient, rtol=1e-5, atol=1e-5)
    assert size < other_size


def test_group_by_length_trains_on_every_row_once(settings, monkeypatch):
    sizes = padded_tokens(monkeypatch)
    spent = []
    for grouped in (True, False):
        del sizes[:]
        rows = tiny.pair_rows(64)
        changes = {"attn_implementation": "sdpa", "group_by_length": grouped, "rows": rows, "max_steps": -1}
        run = recorded(settings(algorithm="dpo", **changes))
        assert sorted(i for step in range(16) for i in run.plan.rows_of_step(step)) == list(range(64))
        steps(run, 16)
        spent.append(sum(sizes))
    assert spent[0] < spent[1]


def test_one_call_of_the_sampler_serves_an_optimizer_step(settings):
    config = settings(per_device_train_batch_size=3, gradient_accumulation_steps=2, num_generations=3)
    run = recorded(config)
    steps(run, 3)
    assert len(run.sampler.prompts) == 3
    for step, (prompts, samples) in enumerate(zip(run.sampler.prompts, run.sampler.drawn, strict=True)):
        rows = run.plan.rows_of_step(step)
        assert sorted(rows) == sorted(batch_indices(len(run.plan.train_rows), 6, step, config.seed))
        assert prompts == [list(run.plan.train_rows[i].prompt) for i in rows]
        assert len(samples.completions()) == 18
        assert samples.version == step, "drawn from the weights of this step"
    assert len(set(run.sampler.seeds)) == 3


@pytest.mark.parametrize("algorithm", ["dpo", "ipo", "sft"])
def test_the_other_algorithms_do_not_sample_while_they_train(settings, algorithm):
    run = recorded(settings(algorithm=algorithm))
    steps(run, 2)
    assert run.sampler.prompts == []


@pytest.mark.parametrize(("batch_size", "last"), [(4, 4), (5, 4)], ids=["filled batches", "a smaller last batch"])
def test_an_epoch_goes_over_every_row_once(settings, batch_size, last):
    run = recorded(settings(max_steps=-1, num_train_epochs=2, per_device_train_batch_size=batch_size))
    per_epoch = math.ceil(24 / batch_size)
    assert run.plan.total_steps == 2 * per_epoch
    steps(run, 2 * per_epoch)
    assert [len(batch) for batch in run.sampler.prompts] == 2 * [*[batch_size] * (per_epoch - 1), last]
    prompts = [prompt for batch in run.sampler.prompts for prompt in batch]
    every_prompt = sorted(list(row.prompt) for row in run.plan.train_rows)
    assert sorted(prompts[:24]) == sorted(prompts[24:]) == every_prompt
    assert prompts[:24] != prompts[24:]


@pytest.mark.parametrize("algorithm", ["dpo", "sft"])
def test_a_smaller_last_step_takes_the_mean_of_its_rows(settings, algorithm):
    shape = {"algorithm": algorithm, "attn_implementation": "sdpa"}
    found = recorded(
        settings(**shape, rows=tiny.pair_rows(5), per_device_train_batch_size=1, gradient_accumulation_steps=3)
    )
    last = found.plan.rows_of_step(1)
    assert len(last) == 2
    rows = [tiny.pair_rows(5)[i] for i in last]
    expected = recorded(settings(**shape, rows=rows, per_device_train_batch_size=2))
    metrics = [steps(found, 1, first=1), steps(expected, 1)]
    assert metrics[0] == pytest.approx(metrics[1], rel=1e-5, abs=1e-5)
    for name, gradient in expected.optimizer.gradients[0].items():
        assert_close(found.optimizer.gradients[0][name], gradient, rtol=1e-4, atol=1e-6)


def test_rows_that_fill_no_step_can_be_left_out(settings, capsys):
    config = settings(algorithm="dpo", max_steps=-1, per_device_train_batch_size=7, dataloader_drop_last=True)
    assert [line["epoch"] for line in trained(config)] == pytest.approx([1 / 3, 2 / 3, 1.0])
    page = capsys.readouterr().out
    assert "3 of 24 pairs fill no step and are left out of each epoch (dataloader_drop_last=true)" in page


def test_the_seed_decides_the_run(settings):
    run = {"num_eval_rows": 4, "eval_steps": 2, **LORA, "lora_dropout": 0.3}
    first, again, other = (
        trained(settings(**run, seed=seed, output_dir=settings().output_dir + name))
        for seed, name in ((1, "a"), (1, "b"), (2, "c"))
    )
    assert first == again
    assert [line["step"] for line in other] == [line["step"] for line in first]
    assert all(line != alike for line, alike in zip(other[1:], first[1:], strict=True))


def test_a_run_does_not_depend_on_the_callers_random_state(settings):
    runs = []
    for seed in (5, 6):
        torch.manual_seed(seed)
        torch.rand(seed)
        runs.append(trained(settings(**LORA, output_dir=f"{settings().output_dir}-{seed}")))
    assert runs[0] == runs[1]


# What is learned


def test_dpo_learns_the_kind_word(settings):
    lines = trained(settings(algorithm="dpo", max_steps=30, per_device_train_batch_size=8, num_eval_rows=8))
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses[0] == pytest.approx(math.log(2))
    assert sum(losses[-5:]) / 5 < 0.5 * losses[0]
    assert lines[-1]["eval_rewards/accuracies"] == 1.0, "on rows that were held out"


def test_sft_learns_the_completions(settings):
    losses = [line["loss"] for line in trained(settings(algorithm="sft", max_steps=30))]
    assert sum(losses[-5:]) / 5 < 0.5 * losses[0]


def test_hypo_without_its_kl_term_is_dpo(settings):
    weights = {}
    for algorithm in ("hypo", "dpo"):
        run = recorded(settings(algorithm=algorithm, kl_coef=0.0))
        metrics = steps(run, 3)
        weights[algorithm] = tiny.weights(run.policy)
    assert "kl" not in metrics
    for name, weight in weights["dpo"].items():
        assert_close(weights["hypo"][name], weight, atol=1e-5, rtol=1e-4)


def test_a_larger_kl_coef_gives_a_smaller_kl(settings):
    shape = {"max_steps": 20, "num_generations": 8, "num_eval_rows": 8, "num_eval_samples": 16}
    distances = []
    for kl_coef in (0.0, 1.0):
        folder = f"{settings().output_dir}-{kl_coef}"
        distances.append(trained(settings(kl_coef=kl_coef, output_dir=folder, **shape))[-1]["eval_kl"])
    assert 0 < distances[1] < 0.7 * distances[0]


def test_the_gradient_is_clipped_to_its_norm(settings):
    run = recorded(settings(algorithm="dpo", max_grad_norm=1e-3))
    norm = steps(run, 1)["grad_norm"]
    clipped = torch.cat([gradient.flatten() for gradient in run.optimizer.gradients[0].values()]).norm()
    assert norm > 0.1, "logged before clipping"
    assert clipped.item() == pytest.approx(1e-3, rel=1e-3)


def test_without_clipping_no_norm_is_logged(settings):
    assert "grad_norm" not in trained(settings(algorithm="dpo", max_grad_norm=0))[0]


def test_the_logged_rate_is_the_one_the_step_used(settings, monkeypatch):
    schedule = {"lr_scheduler_type": "linear", "learning_rate": 1e-3, "warmup_ratio": 0.5, "max_steps": 4}
    used = []
    update = torch.optim.AdamW.step

    def recorded_update(optimizer, *arguments, **keywords):
        used.append(optimizer.param_groups[0]["lr"])
        return update(optimizer, *arguments, **keywords)

    monkeypatch.setattr(torch.optim.AdamW, "step", recorded_update)
    rates = [line["learning_rate"] for line in trained(settings(algorithm="dpo", **schedule))]
    assert rates == used == pytest.approx([0.0, 5e-4, 1e-3, 5e-4])


# Metrics


def test_a_line_is_the_mean_over_its_interval(settings):
    every = trained(settings(algorithm="dpo", max_steps=4, logging_steps=1))
    folder = settings().output_dir + "-pairs"
    by_two = trained(settings(algorithm="dpo", max_steps=4, logging_steps=2, output_dir=folder))
    assert [line["step"] for line in by_two] == [2, 4]
    for i, line in enumerate(by_two):
        for name in OF_PAIRS | {"grad_norm"}:
            assert line[name] == pytest.approx((every[2 * i][name] + every[2 * i + 1][name]) / 2)


def test_the_last_step_is_always_logged_evaluated_and_saved(settings):
    config = settings(max_steps=5, logging_steps=4, save_steps=2, eval_steps=3, num_eval_rows=4)
    lines = trained(config)
    assert [line["step"] for line in lines if "loss" in line] == [4, 5]
    assert [line["step"] for line in lines if "eval_loss" in line] == [0, 3, 5]
    folder = Path(config.output_dir)
    assert sorted(path.name for path in folder.glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-5"]
    assert lines[0]["eval_kl"] == 0, "the untrained policy is its own reference"


def test_epochs_are_counted_in_rows(settings):
    lines = trained(settings(algorithm="dpo", per_device_train_batch_size=8, max_steps=6))
    assert [line["epoch"] for line in lines] == pytest.approx([1 / 3, 2 / 3, 1.0, 4 / 3, 5 / 3, 2.0])


def test_what_the_user_should_know_is_printed_first(settings, capsys):
    rows = [*tiny.pair_rows(12), {"prompt": "film", "chosen": "the film was good", "rejected": " "}]
    train(settings(rows=rows, top_k=5), progress=False)
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    warnings = lines[lines.index("warnings") : lines.index("model")]
    assert any("KL is biased" in line for line in warnings)
    data = lines[lines.index("data") :]
    assert data[1:3] == [
        "train: 12 of 13 rows used",
        "train: 1 of 13 rows dropped: 1 with an empty 'rejected' (row 12)",
    ]
    assert any(line.startswith("training ") and "parameters for 3 steps on" in line for line in data)


# bf16


@pytest.mark.parametrize("way", [{}, LORA, LORA_HEAD, LAST_LAYER], ids=["full", "lora", "lora, head", "last layer"])
@pytest.mark.parametrize("dtype", slow_unless(["bfloat16"], ["float32", "bfloat16"]))
def test_bf16_compute_is_close_to_fp32(settings, way, dtype):
    exact = trained(settings(algorithm="dpo", **way))
    folder = settings().output_dir + "-bf16"
    _reset_precision()
    rounded = trained(settings(algorithm="dpo", bf16=True, dtype=dtype, output_dir=folder, **way))
    for line, alike in zip(rounded, exact, strict=True):
        assert line["loss"] == pytest.approx(alike["loss"], abs=0.05)
        assert line["logps/chosen"] == pytest.approx(alike["logps/chosen"], rel=0.03)
    assert rounded != exact


def test_hypo_runs_in_bf16(settings):
    for line in trained(settings(bf16=True, num_eval_rows=4)):
        assert all(math.isfinite(value) for value in line.values())


def _reset_precision():
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)


# Whatever the implementation


@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_implementations_and_chunk_budgets_train_alike(settings, impl):
    # Adam divides by a gradient's size: with a smaller epsilon it would train on the rounding of a gradient that is 0.
    shared = {"adam_epsilon": 1e-5}
    whole = trained(settings(**shared))
    folder = settings().output_dir + "-other"
    other = trained(settings(impl=impl, max_chunk_bytes=60_000, output_dir=folder, **shared))
    for line, alike in zip(other, whole, strict=True):
        assert line.keys() == alike.keys()
        for name in OF_PAIRS - {"rewards/accuracies"} | {"kl", "grad_norm"}:  # margins start at 0, of either sign
            assert line[name] == pytest.approx(alike[name], abs=1e-4, rel=1e-3)


def test_gradient_checkpointing_trains_alike(settings):
    plain = trained(settings(**LORA))
    recomputed = trained(settings(**LORA, gradient_checkpointing=True, output_dir=settings().output_dir + "-other"))
    for line, alike in zip(recomputed, plain, strict=True):
        assert line["loss"] == pytest.approx(alike["loss"], abs=1e-5)
        assert line["kl"] == pytest.approx(alike["kl"], abs=1e-4)
