"""``HyPOTrainer`` in TRL: with no KL it is DPO, with one its loss is this project's, and TRL's own machinery works."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import math
import sys
from pathlib import Path

import datasets
import pytest
import tiny
import torch
from peft import AutoPeftModelForCausalLM, IA3Config, LoHaConfig, LoraConfig, get_peft_model
from short_runs import slow_unless
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    TrainerCallback,
    default_data_collator,
)

from hypo_kernels import fused_hypo_loss
from hypo_train.config import ConfigError
from hypo_train.data.errors import DataError
from hypo_train.sampling import DecodeSampler, GenerateSampler
from hypo_train.trees.pack import separate_rows

trl = pytest.importorskip("trl", reason="trl is not installed")
from hypo_train.trl import HyPOConfig, HyPOTrainer  # noqa: E402

LORA = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
SMALL = {
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "learning_rate": 3e-3,
    "max_steps": 3,
    "logging_steps": 1,
    "bf16": False,
    "use_cpu": True,
    "report_to": "none",
    "disable_tqdm": True,
    "beta": 0.3,
}
# TRL joins prompt and completion as they are.
ROWS = [{**row, "prompt": row["prompt"] + " "} for row in tiny.pair_rows()]
HYPO = {"kl_coef": 0.05, "max_new_tokens": 6}
NO_KL = {"kl_coef": 0.0}
_ARGUMENTS = ("eval_dataset", "peft_config", "ref_model", "data_collator", "compute_metrics")


@pytest.fixture
def make(tmp_path, saved_model):
    """``make(HyPOTrainer, kl_coef=0.1)`` is a trainer of a tiny model that writes to ``tmp_path``."""

    def trainer(kind=HyPOTrainer, *, model=None, policy=None, rows=ROWS, name="out", **changes):
        folder = model or saved_model()
        given = {key: changes.pop(key, None) for key in _ARGUMENTS}
        settings = {"output_dir": str(tmp_path / name), "save_strategy": "no", **SMALL, **changes}
        return kind(
            policy or str(folder),
            args=HyPOConfig(**settings) if kind is HyPOTrainer else trl.DPOConfig(**settings),
            train_dataset=datasets.Dataset.from_list(rows),
            processing_class=AutoTokenizer.from_pretrained(folder),
            **given,
        )

    return trainer


@pytest.fixture
def drawn(monkeypatch):
    """Prompts and samples of every draw from now on."""
    found, sample = [], DecodeSampler.sample

    def noted(self, prompts, *arguments, **keywords):
        samples = sample(self, prompts, *arguments, **keywords)
        found.append((prompts, samples))
        return samples

    monkeypatch.setattr(DecodeSampler, "sample", noted)
    return found


class Gradients(TrainerCallback):
    """Every step's, as the optimizer sees them."""

    def __init__(self):
        self.steps = []

    def on_pre_optimizer_step(self, args, state, control, model, **_):
        self.steps.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})


def trained(trainer):
    gradients = Gradients()
    trainer.add_callback(gradients)
    trainer.train()
    return trainer, gradients.steps


def logged(trainer, *names):
    return [[line[name] for name in names] for line in trainer.state.log_history if "loss" in line]


@pytest.mark.parametrize("way", slow_unless(["lora"], ["full", "lora", "gpt_neox"]))
def test_without_a_kl_it_is_dpo(make, saved_model, way):
    model = saved_model("gpt_neox") if way == "gpt_neox" else None
    options = {"model": model, "peft_config": LORA if way == "lora" else None, "lr_scheduler_type": "constant"}
    (ours, gradients), (theirs, expected) = (
        trained(make(kl_coef=0.0, **options)),
        trained(make(trl.DPOTrainer, **options)),
    )
    assert len(gradients) == len(expected) == 3
    for found, truth in zip(gradients, expected, strict=True):
        assert found.keys() == truth.keys()
        for name, gradient in truth.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    names = ["loss", "rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins", "logps/chosen"]
    names += ["logps/rejected", "num_tokens"]
    torch.testing.assert_close(
        torch.tensor(logged(ours, *names)), torch.tensor(logged(theirs, *names)), rtol=1e-4, atol=1e-4
    )
    assert logged(ours, "rewards/margins")[-1] != [0.0]
    assert "kl" not in ours.state.log_history[0]


@pytest.mark.parametrize("fraction", [1.0, 0.5])
def test_the_loss_of_a_batch_is_fused_hypo_loss(make, drawn, fraction):
    trainer, _ = trained(make(**HYPO, temperature=0.7, online_fraction=fraction))  # away from the reference
    batch = next(iter(trainer.get_train_dataloader()))
    drawn.clear()
    trainer.model.train()
    trainer.model.zero_grad()
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in trainer.model.named_parameters()}
    trainer.model.zero_grad()
    [(prompts, samples)] = drawn
    completions = samples.completions()
    assert len(completions) == 2 * len(prompts) == 8 * fraction

    # Plain rows of the batch and the samples, no tree, through the models as TRL holds them.
    rows, counted = batch["input_ids"], batch["completion_mask"]
    pairs = [rows[i][counted[i] == 1].tolist() for i in range(8)]
    all_prompts = [rows[i][(counted[i] == 0) & (batch["attention_mask"][i] == 1)].tolist() for i in range(4)]
    sequences = [(i % 4, completion) for i, completion in enumerate(pairs)]
    sequences += [(all_prompts.index(prompts[i // 2]), completion) for i, completion in enumerate(completions)]
    tree = separate_rows(all_prompts, sequences, pad_token_id=tiny.PAD)

    def hidden(model):
        inputs = {"input_ids": tree.input_ids, "attention_mask": tree.attention_mask}
        return model.get_decoder()(**inputs).last_hidden_state.flatten(0, 1)[tree.rows]

    with torch.no_grad():
        ref_hidden = hidden(trainer.ref_model)
    expected = fused_hypo_loss(
        hidden(trainer.model),
        trainer.model.lm_head.weight,
        tree.targets,
        tree.cu_seqlens,
        num_pairs=4,
        ref_hidden=ref_hidden,
        ref_lm_head_weight=trainer.ref_model.lm_head.weight.detach(),
        beta=0.3,
        kl_coef=0.05,
        temperature=0.7,
        impl="reference",
    )
    expected.loss.backward()
    torch.testing.assert_close(loss, expected.loss)
    assert expected.kl.abs().max() > 1e-3
    assert trainer._metrics["train"]["kl"] == [pytest.approx(expected.kl.mean().item(), rel=1e-4)]
    for name, parameter in trainer.model.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("peft_config", [None, LORA], ids=["full", "lora"])
def test_samples_come_from_the_weights_as_they_are(make, drawn, peft_config):
    trainer, _ = trained(make(peft_config=peft_config, gradient_accumulation_steps=1, **HYPO))
    assert [samples.version for _, samples in drawn] == [0, 1, 2]
    model = trainer.model.eval()
    trainer.sampler.score = True
    trainer.sampler.weights_changed(3)
    samples = trainer.sampler.sample([[5, 20, 6]], 2, 6, seed=0)
    for tokens, logprobs in zip(samples.completions(), samples.logprobs, strict=True):
        now = tiny.plain_token_logprobs(model, [5, 20, 6], tokens)
        torch.testing.assert_close(logprobs[: len(tokens)], now, rtol=1e-4, atol=1e-4)
    with model.disable_adapter() if peft_config else contextlib.nullcontext():
        before = trainer.ref_model or model
        then = tiny.plain_token_logprobs(before, [5, 20, 6], samples.completions()[0])
    assert (then - samples.logprobs[0][: len(then)]).abs().max() > 1e-2


def test_the_reference_of_a_loaded_adapter_is_that_adapter(make, saved_model):
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(saved_model()), LORA)
    trainer = make(model=saved_model(), policy=model, gradient_checkpointing=False, **HYPO)
    trainer.model.train()
    trainer.compute_loss(trainer.model, next(iter(trainer.get_train_dataloader())))
    assert trainer._metrics["train"]["kl"] == [0.0]
    assert trainer._metrics["train"]["rewards/margins"] == [0.0]
    assert [name for name, p in model.named_parameters() if p.requires_grad and ".ref." in name] == []


@pytest.mark.parametrize(
    "way", slow_unless(["gpt_neox", "loaded adapter"], ["full", "lora", "gpt_neox", "loaded adapter"])
)
def test_a_resumed_run_equals_an_uninterrupted_one(make, saved_model, way):
    options = {
        "model": saved_model("gpt_neox") if way == "gpt_neox" else None,
        "peft_config": LORA if way == "lora" else None,
        "eval_dataset": datasets.Dataset.from_list(ROWS[:4]),
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_strategy": "steps",
        "save_steps": 2,
        "max_steps": 4,
        **HYPO,
    }

    def start(name):
        if way == "loaded adapter":  # its copy, the reference, is saved in a folder of its own
            torch.manual_seed(0)
            options["policy"] = get_peft_model(AutoModelForCausalLM.from_pretrained(saved_model()), LORA)
        return make(name=name, **options)

    whole, resumed = start("whole"), start("resumed")
    whole.train()
    resumed.train(resume_from_checkpoint=str(Path(whole.args.output_dir) / "checkpoint-2"))
    names = ["loss", "kl", "rewards/margins", "completions/mean_length", "completions/clipped_ratio"]
    assert logged(resumed, *names) == logged(whole, *names)
    assert resumed.state.log_history[2]["eval_kl"] == whole.state.log_history[2]["eval_kl"] != 0
    for (name, found), expected in zip(resumed.model.named_parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(found, expected), name
    whole.save_model()
    kind = AutoPeftModelForCausalLM if way in ("lora", "loaded adapter") else AutoModelForCausalLM
    loaded = kind.from_pretrained(whole.args.output_dir)
    torch.testing.assert_close(
        tiny.plain_logits(loaded.eval(), [5, 20, 6]), tiny.plain_logits(whole.model.eval(), [5, 20, 6])
    )
    card = (Path(whole.args.output_dir) / "README.md").read_text(encoding="utf-8")
    assert "2406.01462" in card


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"loss_type": "aot"},
            r"loss_type=\['aot'\]: it sorts the whole batch, use another; or set kl_coef=0",
        ),
        ({"loss_type": "dpo"}, "loss_type=.*'dpo': should be one of sigmoid, hinge"),
        ({"loss_type": ["sigmoid", "robust"], "label_smoothing": 0.1}, "label_smoothing=0.1: use 0"),
        ({"label_smoothing": 0.1}, "label_smoothing=0.1: the sigmoid loss of TRL has none, use 0"),
        ({"truncation_mode": "keep_end"}, "truncation_mode='keep_end': pairs share their prompt"),
        ({"neftune_noise_alpha": 5.0}, "neftune_noise_alpha=5.0: samples are of the policy without noise, use None"),
        ({"loss_type": "aot", "kl_coef": 0.0, "temperature": 0.7}, r"temperature=0.7: .*loss_type=\['aot'\], has none"),
        ({"num_generations": 1}, "num_generations=1: hypo compares the samples of a prompt, use at least 2"),
        ({"kl_coef": -1.0}, "kl_coef=-1.0: should be greater than or equal to 0"),
        ({"max_new_tokens": 0}, "max_new_tokens=0: should be greater than 0"),
        ({"temperature": 0.0}, "temperature=0.0: should be greater than 0"),
        ({"sampler": "greedy"}, "sampler='greedy': should be 'auto', 'decode', 'generate', 'vllm'"),
    ],
)
@pytest.mark.filterwarnings("ignore:The `'keep_end'`:FutureWarning")
def test_an_unsupported_option_is_refused_before_loading(tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        HyPOConfig(str(tmp_path), bf16=False, use_cpu=True, **changes)


def test_a_config_of_dpo_is_refused(tmp_path):
    plain = trl.DPOConfig(str(tmp_path), bf16=False, use_cpu=True)
    with pytest.raises(ConfigError, match="args is a DPOConfig: use HyPOConfig"):
        HyPOTrainer("no-model", args=plain)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_config": LoHaConfig(target_modules=["q_proj"])}, "peft_config of type LOHA: use LoraConfig"),
        ({"peft_config": IA3Config()}, "peft_config of type IA3: use LoraConfig"),
        ({"data_collator": default_data_collator}, "data_collator is function: use DataCollatorForPreference, or None"),
        ({"rows": [{**ROWS[0], "images": []}]}, "train_dataset has images: use a data set of text"),
        ({"peft_config": LoraConfig(bias="all")}, "bias='all' also trains the reference model's biases"),
        ({"sampler": "vllm"}, "sampler=vllm needs vLLM: pip install"),
        ({"rows": []}, "train_dataset has no rows"),
        ({"precompute_ref_log_probs": True}, "precompute_ref_log_probs=True: samples ask the reference model at every"),
    ],
    ids=["loha", "ia3", "collator", "images", "biases", "sampler", "empty", "precomputed"],
)
def test_what_a_kl_cannot_have_is_refused_before_loading(make, monkeypatch, changes, message):
    monkeypatch.setattr("trl.trainer.dpo_trainer.create_model_from_path", None)
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises((ConfigError, DataError), match=message):
        make(**HYPO, **changes)


def test_several_processes_are_refused_before_loading(make, monkeypatch):
    monkeypatch.setattr(HyPOConfig, "world_size", 2)
    with pytest.raises(ConfigError, match="2 processes: use this project's own loop, torchrun -m hypo_train"):
        make(**HYPO)


def test_rows_that_max_length_drops_are_named(make):
    with pytest.raises(DataError, match="no prompt of train_dataset is shorter than max_length=1"):
        make(max_length=1, **HYPO)


def test_the_arguments_are_in_the_order_of_dpo_trainer():
    ours, theirs = (list(inspect.signature(kind).parameters) for kind in (HyPOTrainer, trl.DPOTrainer))
    assert ours == theirs


# Options that TRL's own step serves if there is no KL: the logged numbers are those of DPOTrainer


@pytest.mark.parametrize(
    "changes",
    [{"loss_type": ["aot", "sft"]}, {"use_weighting": True}, {"peft_config": LoHaConfig(target_modules=["q_proj"])}],
    ids=["losses", "weighting", "loha"],
)
def test_without_a_kl_trls_own_step_serves_the_rest(make, changes):
    ours, theirs = (
        trained(make(kind, **changes, **kl))[0] for kind, kl in ((HyPOTrainer, NO_KL), (trl.DPOTrainer, {}))
    )
    assert ours.why_trls_step
    names = ["loss", "rewards/margins", "entropy", "logits/chosen", "mean_token_accuracy"]
    assert logged(ours, *names) == logged(theirs, *names)


# TRL's losses in the fused step: 20 steps as DPOTrainer takes them

LOSSES = {
    **{name: {"loss_type": name} for name in (
        "hinge", "ipo", "nca_pair", "bco_pair", "sppo_hard", "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm",
    )},
    "robust": {"loss_type": "robust", "label_smoothing": 0.1},
    "exo_pair": {"loss_type": "exo_pair", "label_smoothing": 0.001},
    "MPO": {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
    "forward KL": {"f_divergence_type": "forward_kl"},
    "JS": {"f_divergence_type": "js_divergence"},
    "alpha": {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.3},
}  # fmt: skip


@pytest.mark.parametrize("loss", slow_unless(["ipo", "MPO"], LOSSES))
def test_trls_losses_have_its_curves_without_its_step(make, loss):
    options = {**LOSSES[loss], "max_steps": 20, "lr_scheduler_type": "constant"}
    ours, theirs = (
        trained(make(kind, **options, **kl))[0] for kind, kl in ((HyPOTrainer, NO_KL), (trl.DPOTrainer, {}))
    )
    assert ours.why_trls_step is None
    found, expected = (torch.tensor(logged(trainer, "loss", "rewards/margins")) for trainer in (ours, theirs))
    assert len(found) == 20
    torch.testing.assert_close(found, expected, rtol=2e-3, atol=2e-4)  # Adam multiplies rounding, step after step


@pytest.mark.parametrize("loss", ["ipo", "MPO"])
def test_a_kl_goes_with_trls_losses(make, loss):
    trainer, gradients = trained(make(**LOSSES[loss], **HYPO))
    assert trainer.why_trls_step is None
    assert len(gradients) == len(logged(trainer, "loss", "kl")) == 3


# Reference log-probs computed once


@pytest.mark.parametrize("kl_coef", [0.0, 0.05])
def test_precomputed_reference_logps_change_no_loss(make, kl_coef):
    options = {"kl_coef": kl_coef, "max_new_tokens": 6, "temperature": 0.7, "peft_config": LORA}
    options["eval_dataset"] = datasets.Dataset.from_list(ROWS[:4])
    plain, precomputed = (make(precompute_ref_log_probs=given, **options) for given in (False, True))
    assert precomputed.why_trls_step is None
    evaluations = [trainer.evaluate() for trainer in (plain, precomputed)]
    assert evaluations[0]["eval_loss"] == pytest.approx(evaluations[1]["eval_loss"], rel=1e-5)
    names = ["loss", "rewards/chosen", "rewards/margins"]
    torch.testing.assert_close(
        torch.tensor(logged(trained(precomputed)[0], *names)),
        torch.tensor(logged(trained(plain)[0], *names)),
        rtol=1e-4,
        atol=1e-5,
    )


def test_a_precomputed_reference_of_a_full_model_is_that_model(make):
    options = {"eval_dataset": datasets.Dataset.from_list(ROWS[:4]), **NO_KL}
    plain, precomputed = (trained(make(precompute_ref_log_probs=given, **options))[0] for given in (False, True))
    assert precomputed.ref_model is None
    # The trained policy must not stand for the reference: all rewards would be 0.
    margins = [trainer.evaluate()["eval_rewards/margins"] for trainer in (plain, precomputed)]
    assert margins[0] == pytest.approx(margins[1], rel=1e-4) != 0
    torch.testing.assert_close(
        torch.tensor(logged(precomputed, "loss", "rewards/margins")),
        torch.tensor(logged(plain, "loss", "rewards/margins")),
        rtol=1e-4,
        atol=1e-5,
    )


def test_the_key_of_precomputed_logps_has_the_temperature(make, monkeypatch):
    keys = []
    monkeypatch.setattr(trl.DPOTrainer, "_precompute_ref_logps", lambda self, dataset, *_: note_key(self, dataset))

    def note_key(trainer, dataset):
        keys.append(trainer._precompute_model_hash)
        return dataset

    for temperature in (1.0, 0.7, 1.0):
        make(precompute_ref_log_probs=True, temperature=temperature, peft_config=LORA, **NO_KL)
    assert keys[0] != keys[1]
    del keys[:]
    for _ in range(2):
        make(precompute_ref_log_probs=True, **NO_KL)
    assert keys[0] == keys[1]


def test_a_reference_that_follows_the_policy_is_the_losss(make):
    # At alpha 1 and every step, the reference of a step is the policy of that step.
    options = {"sync_ref_model": True, "ref_model_mixup_alpha": 1.0, "ref_model_sync_steps": 1}
    trainer, _ = trained(make(**options, gradient_accumulation_steps=1, **HYPO))
    assert logged(trainer, "rewards/margins", "kl") == [[0.0, 0.0]] * 3


# Evaluation and prediction with logits


def test_predictions_are_the_models_logits(make):
    seen = []

    def count(prediction):
        seen.append(prediction.predictions.shape)
        return {"calls": len(seen)}

    trainer = make(eval_dataset=datasets.Dataset.from_list(ROWS[:4]), compute_metrics=count, **HYPO)
    assert trainer.evaluate()["eval_calls"] == 1
    found = trainer.predict(trainer.eval_dataset)
    row = trainer.eval_dataset[0]
    ids = row["prompt_ids"] + row["chosen_ids"]
    expected = tiny.plain_logits(trainer.model, ids)
    torch.testing.assert_close(torch.tensor(found.predictions[0, : len(ids)]), expected, rtol=1e-4, atol=1e-4)
    assert len(seen) == 2


def test_an_evaluation_row_without_a_prompt_is_named(make):
    rows = {"first": ROWS[:2], "second": [ROWS[0], {"prompt": "film", "chosen": "good", "rejected": "bad"}]}
    sets = {name: datasets.Dataset.from_list(rows) for name, rows in rows.items()}
    with pytest.raises(DataError, match=r"row 1 of eval_dataset\['second'\] has an empty prompt"):
        make(eval_dataset=sets, **HYPO)


def test_the_sampler_is_the_configured_one(make):
    assert type(make(sampler="generate", **HYPO).sampler) is GenerateSampler


def test_under_autocast_with_a_reference_of_its_own_it_trains(make, saved_model):
    options = {"bf16": True, "ref_model": AutoModelForCausalLM.from_pretrained(saved_model())}
    trainer, _ = trained(make(**options, **HYPO))
    losses = [loss for [loss] in logged(trainer, "loss")]
    assert losses[0] == pytest.approx(math.log(2), abs=2e-2), "policy and reference are equal"
    assert losses[-1] < losses[0]


def test_a_prompt_that_tokenises_to_nothing_is_named_by_its_row(make):
    rows = [*ROWS[:2], {"prompt": "film", "chosen": "good", "rejected": "bad"}]  # one unknown word
    with pytest.raises(DataError, match="row 2 of train_dataset has an empty prompt once it is tokenised"):
        make(rows=rows, **HYPO)


# Safety steps that the trainer shares with this project's own loop


@pytest.mark.parametrize("architecture", ["mistral", "gpt_oss"])  # every layer; every other one, with sinks
def test_rows_longer_than_a_sliding_window_have_the_loss_of_dpo(make, saved_model, architecture):
    # The proof of exactness has rows of 11 tokens, the window is longer, and the batches' rows are longer still.
    model = saved_model(architecture, sliding_window=16)
    rows = [{**row, "prompt": 8 * row["prompt"]} for row in ROWS]  # up to 66 tokens
    found = []
    for kind, changes in ((HyPOTrainer, {"kl_coef": 0.0}), (trl.DPOTrainer, {})):
        trainer, gradients = trained(make(kind, model=model, rows=rows, **changes))
        if kind is HyPOTrainer:
            assert trainer._batcher.shares_prompts
        found.append((logged(trainer, "loss", "logps/chosen"), gradients[0]))
    (losses, gradients), (expected_losses, expected) = found
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(expected_losses), rtol=1e-4, atol=1e-4)
    for name, gradient in expected.items():
        largest = max(1.0, gradient.abs().max().item())
        torch.testing.assert_close(gradients[name], gradient, rtol=0, atol=1e-5 * largest, msg=name)


def test_functional_dropout_is_off(make, saved_model):
    trainer = make(model=saved_model("opt", dropout=0.5, attention_dropout=0.5), kl_coef=0.0)
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.model.train()
    assert torch.equal(*(trainer.compute_loss(trainer.model, batch).detach() for _ in range(2)))


def test_gradients_over_4_bits_are_those_of_dpo(make, saved_model):
    pytest.importorskip("bitsandbytes")  # on CPUs with bf16 products, it repacks weights in a pass in eval mode
    folder = saved_model("llama", hidden_size=64, intermediate_size=128)
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    found = []
    for kind, changes in ((HyPOTrainer, {"kl_coef": 0.0}), (trl.DPOTrainer, {})):
        policy = AutoModelForCausalLM.from_pretrained(folder, quantization_config=settings, dtype=torch.float32)
        found.append(trained(make(kind, model=folder, policy=policy, peft_config=LORA, max_steps=1, **changes))[1][0])
    gradients, expected = found
    assert gradients.keys() == expected.keys()
    for name, gradient in expected.items():  # TRL holds adapters over 4 bits in bf16
        tolerance = 2 * torch.finfo(torch.bfloat16).eps * gradient.abs().max().item()
        torch.testing.assert_close(gradients[name], gradient, rtol=0, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


def test_nothing_is_reported_to_anybody(make, monkeypatch):
    sent = []
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.setattr("trl.trainer.base_trainer.send_telemetry", lambda **report: sent.append(report))
    make(trl.DPOTrainer)
    assert len(sent) == 1, "TRL's own trainer reports"
    make(**HYPO)
    assert len(sent) == 1


def test_without_trl_the_import_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "trl", None)
    monkeypatch.delitem(sys.modules, "hypo_train.trl")
    with pytest.raises(ImportError, match=r"hypo_train.trl needs TRL: pip install 'trl>=1.16'"):
        importlib.import_module("hypo_train.trl")


def test_a_trl_that_is_too_old_is_named(monkeypatch):
    monkeypatch.setattr(trl, "__version__", "1.15.2")
    monkeypatch.delitem(sys.modules, "hypo_train.trl")
    with pytest.raises(ImportError, match=r"pip install 'trl>=1.16' \(found 1.15.2\)"):
        importlib.import_module("hypo_train.trl")
