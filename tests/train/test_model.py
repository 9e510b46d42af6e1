"""The policy against transformers' own logits, its frozen reference, and the models that are refused."""

from __future__ import annotations

import copy
import json
import os
from functools import partial

import pytest
import tiny
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from policies import LORA, PAIRS, SAMPLES, logprobs, model_config, policy_of, tree
from safetensors.torch import load_file
from torch import nn
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AttentionInterface,
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlamaModel,
    PhimoeConfig,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from benchmarks.measure import peak_extra_bytes
from hypo_train.algorithms.preference import preference_loss_call
from hypo_train.algorithms.reference import Reference
from hypo_train.model.exactness import check_exactness
from hypo_train.model.load import load_policy, load_reward_model
from hypo_train.model.policy import Policy
from hypo_train.model.source import eos_token_ids, load_tokenizer
from hypo_train.model.tree_model import ModelError
from hypo_train.trees.attention import NAME

# Every linear layer and the head, as the architectures below name them.
LORA_HEAD = {**LORA, "lora_target_modules": ".*(proj|query_key_value|dense.*|fc.*|c_attn|lm_head|embed_out)"}
# The ways to train, with the settings of each.
WAYS = {"full": {}, "lora": LORA, "lora, head": LORA_HEAD, "last layer": {"num_layers_unfrozen": 1}}


@pytest.fixture(params=WAYS)
def way(request):
    return WAYS[request.param]


def sequences():
    """(prompt, completion) of the sequences of ``tree()``, in its order."""
    pairs = [(p.prompt, p.chosen) for p in PAIRS] + [(p.prompt, p.rejected) for p in PAIRS]
    return pairs + [(PAIRS[i // 2].prompt, sample) for i, sample in enumerate(SAMPLES)]


def plain_logprobs(model):
    """(S,) of ``tree()``, each sequence a plain row through the model's own forward."""
    return torch.stack([tiny.plain_logprob(model, *sequence) for sequence in sequences()])


def loss_of(policy, ref_logps):
    """A loss that depends on every sequence of ``tree()``."""
    config = model_config("-", kl_coef=0.1, beta=0.5)
    return policy(tree(), preference_loss_call(tree(), Reference(logps=ref_logps), len(PAIRS), config)).loss


def train(policy, steps=3, learning_rate=1e-2):
    """A few optimizer steps on ``tree()``, as the loop makes them."""
    optimizer = torch.optim.AdamW(policy.trained_parameters().values(), lr=learning_rate)
    policy.train()
    for _ in range(steps):
        loss_of(policy, policy.reference(tree(), logprobs())).backward()
        optimizer.step()
        optimizer.zero_grad()
    return policy


# Log-probs


ARCHITECTURES = {
    "llama": {},
    "llama, tied": {"tie_word_embeddings": True},
    "gpt_neox": {},
    "qwen2": {},
    "qwen3": {},
    "mistral": {"sliding_window": None},
    "gpt2": {},
    "opt": {},
    "cohere: logits times 0.25": {},
    "granite: logits over 4": {},
    "phi: a head with a bias": {},
}


@pytest.fixture(params=ARCHITECTURES)
def folder(request, saved_model):
    return saved_model(request.param.split(":")[0].split(",")[0], **ARCHITECTURES[request.param])


# Each architecture and each way once; their combinations are slow.
ARCHITECTURES_AND_WAYS = [
    pytest.param(architecture, way, marks=() if architecture == "llama" or way == "full" else pytest.mark.slow)
    for architecture in ARCHITECTURES
    for way in WAYS
]


@torch.no_grad()
@pytest.mark.parametrize(("architecture", "way"), ARCHITECTURES_AND_WAYS)
def test_log_probs_equal_those_of_transformers_own_logits(saved_model, architecture, way):
    folder = saved_model(architecture.split(":")[0].split(",")[0], **ARCHITECTURES[architecture])
    policy = policy_of(folder, **WAYS[way])
    original = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert_close(policy(tree(), logprobs()), plain_logprobs(original), atol=1e-4, rtol=0)


@torch.no_grad()
def test_softcaps_are_served_exactly(saved_model, way):
    folder = saved_model("gemma2", attn_logit_softcapping=2.0)
    policy = policy_of(folder, **way)
    assert policy.shares_prompts
    original = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    assert tiny.plain_logits(original, [5, 6, 7]).abs().max() > 2, "the cap of 3 must bend the logits"
    assert_close(policy(tree(), logprobs()), plain_logprobs(original), atol=1e-4, rtol=0)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_another_attention_trains_on_separate_rows_alike(saved_model, attention):
    policy, apart = policy_of(saved_model()), policy_of(saved_model(), attn_implementation=attention)
    assert policy.shares_prompts
    assert not apart.shares_prompts
    results = []
    for one in (policy, apart):
        batch = tree(shares_prompts=one.shares_prompts)
        loss = one(
            batch, preference_loss_call(batch, Reference(logps=torch.zeros(8)), 2, model_config("-", kl_coef=0.1))
        )
        loss.loss.backward()
        results.append([loss.loss, *(p.grad for p in one.trained_parameters().values())])
    for together, separate in zip(*results, strict=True):
        # Sums in another order round by parts of the tensor's largest element, whatever an element's own size is.
        assert_close(separate, together, atol=1e-5 * max(1.0, together.abs().max().item()), rtol=1e-5)


@torch.no_grad()
def test_log_probs_at_a_temperature_divide_the_logits_by_it(saved_model):
    policy = policy_of(saved_model(), temperature=0.7)
    original = AutoModelForCausalLM.from_pretrained(saved_model()).eval()
    expected = []
    for prompt, completion in sequences():
        logps = (tiny.plain_logits(original, [*prompt, *completion]) / 0.7).log_softmax(-1)[len(prompt) - 1 : -1]
        expected.append(logps.gather(1, torch.tensor(completion).unsqueeze(1)).sum())
    assert_close(policy(tree(), logprobs()), torch.stack(expected), atol=1e-4, rtol=0)


@pytest.mark.parametrize("attention", ["auto", "sdpa"])
def test_a_window_shorter_than_the_sequences_is_kept(saved_model, attention):
    policy = policy_of(saved_model("mistral", sliding_window=3), attn_implementation=attention)
    original = AutoModelForCausalLM.from_pretrained(saved_model("mistral", sliding_window=3)).eval()
    assert policy.shares_prompts == (attention == "auto")
    with torch.no_grad():
        found = policy(tree(shares_prompts=policy.shares_prompts), logprobs())
        assert_close(found, plain_logprobs(original), atol=1e-4, rtol=0)


def test_gradients_equal_those_of_plain_rows(folder):
    policy = policy_of(folder)
    policy(tree(), logprobs()).square().sum().backward()
    original = AutoModelForCausalLM.from_pretrained(folder)
    for module in original.modules():
        module.training = False  # without its dropout
    expected = torch.stack([_differentiable_logprob(original, *sequence) for sequence in sequences()])
    expected.square().sum().backward()
    found = {name.removeprefix("model."): p.grad for name, p in policy.named_parameters()}
    largest = max(p.grad.abs().max() for p in original.parameters() if p.grad is not None)
    for name, parameter in original.named_parameters():
        if parameter.grad is not None:
            assert_close(found[name], parameter.grad, atol=1e-5 * largest.item(), rtol=1e-4, msg=name)


def _differentiable_logprob(model, prompt, completion):
    with torch.enable_grad():
        logits = model(input_ids=torch.tensor([[*prompt, *completion]]), use_cache=False).logits[0]
        logps = logits[len(prompt) - 1 : -1].log_softmax(-1)
        return logps.gather(1, torch.tensor(completion).unsqueeze(1)).sum()


# LoRA on the head


def separate_rows_loss(model, ref_logps, config):
    """HyPO's loss of ``tree()`` by peft's own forward; its gradient is that of the formula."""
    logps = torch.stack([_differentiable_logprob(model, *sequence) for sequence in sequences()])
    ratios = logps - ref_logps
    chosen, rejected, samples = ratios.split([len(PAIRS), len(PAIRS), len(SAMPLES)])
    loss = -nn.functional.logsigmoid(config.beta * (chosen - rejected)).mean()
    rewards = samples.detach().view(-1, 2)
    advantages = (rewards - rewards.flip(1)).flatten()
    return loss + config.kl_coef * samples.detach().mean(), loss + config.kl_coef * (advantages * samples).mean()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_lora_on_the_head_has_the_loss_and_gradients_of_peft(saved_model, architecture):
    folder = saved_model(architecture.split(":")[0].split(",")[0], **ARCHITECTURES[architecture])
    policy = policy_of(folder, **LORA_HEAD)
    ref_logps = policy.reference(tree(), logprobs())
    tiny.perturb(policy.trained_parameters().values())
    plain = copy.deepcopy(policy.model)
    config = model_config("-", kl_coef=0.1, beta=0.5)
    loss = loss_of(policy, ref_logps)
    loss.backward()
    value, surrogate = separate_rows_loss(plain, ref_logps, config)
    surrogate.backward()
    assert_close(loss, value, atol=1e-5, rtol=1e-5)
    expected = {name: p.grad for name, p in plain.named_parameters() if p.requires_grad}
    found = {name.removeprefix("model."): p.grad for name, p in policy.trained_parameters().items()}
    assert found.keys() == expected.keys()
    assert sum("lm_head" in name or "embed_out" in name for name in found) == 2
    largest = max(gradient.abs().max() for gradient in expected.values())
    for name, gradient in expected.items():
        assert gradient.abs().max() > 0, name
        assert_close(found[name], gradient, atol=1e-5 * largest.item(), rtol=1e-4, msg=name)


@torch.no_grad()
@pytest.mark.parametrize("use_rslora", [False, True])
def test_the_update_of_the_head_has_pefts_scaling(saved_model, use_rslora):
    policy = adapted(saved_model(), lora_alpha=12, use_rslora=use_rslora)
    tiny.perturb(policy.trained_parameters().values(), size=0.3)
    check_exactness(policy)
    assert policy.head().lora.scale == 12 / (4**0.5 if use_rslora else 4)
    assert_close(policy(tree(), logprobs()), plain_logprobs(policy.model), atol=1e-4, rtol=0)


def adapted(folder, **changes):
    """A policy with any adapter that peft can make, on the head unless ``changes`` say otherwise."""
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation=NAME)
    settings = {"r": 4, "target_modules": ["q_proj", "lm_head"], "task_type": "CAUSAL_LM", **changes}
    return Policy(get_peft_model(model, LoraConfig(**settings)), is_peft=True).eval()


def test_all_linear_is_all_but_the_head_as_in_peft(saved_model):
    assert policy_of(saved_model(), **LORA).head().lora is None


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_an_adapter_on_the_head_is_saved_without_base_weights(saved_model, tmp_path, tied):
    policy = train(policy_of(saved_model(tie_word_embeddings=tied), **LORA_HEAD)).eval()
    policy.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert {name for name in saved if "lm_head" in name} == {
        f"base_model.model.lm_head.lora_{factor}.weight" for factor in "AB"
    }
    assert all(".lora_" in name for name in saved)
    base = AutoModelForCausalLM.from_pretrained(saved_model(tie_word_embeddings=tied))
    loaded = PeftModel.from_pretrained(base, tmp_path).eval()
    with torch.no_grad():
        assert_close(plain_logprobs(loaded), policy(tree(), logprobs()), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora_dropout": 0.3}, "lora_dropout=0.3 is not served on the LM head: use 0, or leave the head out"),
        ({"use_dora": True}, "not with DoraLinearVariant"),
        ({"bias": "all"}, "bias='all' of the adapter also trains the reference"),
        (
            {"target_modules": ["q_proj"], "trainable_token_indices": {"lm_head": [3]}},
            "trainable_token_indices of the adapter reach the LM head: use modules_to_save",
        ),
    ],
    ids=lambda value: next(reversed(value)) if isinstance(value, dict) else "",
)
def test_a_head_adapter_other_than_plain_lora_is_refused(saved_model, changes, message):
    with pytest.raises(ModelError, match=message):
        check_exactness(adapted(saved_model("llama"), **changes))


def test_a_bias_of_the_heads_update_is_refused(saved_model):
    with pytest.raises(ModelError, match="not with lora_bias"):
        check_exactness(adapted(saved_model("phi"), target_modules=["lm_head"], lora_bias=True))


def test_two_active_adapters_or_a_merged_one_are_refused(saved_model):
    policy = adapted(saved_model())
    policy.model.add_adapter("second", LoraConfig(r=2, target_modules=["lm_head"], task_type="CAUSAL_LM"))
    policy.model.base_model.set_adapter(["default", "second"])
    with pytest.raises(ModelError, match=r"the adapters \['default', 'second'\] are active on the LM head"):
        check_exactness(policy)
    policy.model.set_adapter("second")
    check_exactness(policy)
    assert policy.head().lora.A.shape[0] == 2
    policy.model.merge_adapter()
    with pytest.raises(ModelError, match="LoRA is merged into the LM head"):
        check_exactness(policy)


def test_a_head_update_unlike_pefts_is_refused(saved_model, monkeypatch):
    monkeypatch.setattr("hypo_train.model.policy._active_lora", lambda layer: None)  # as if the adapter were ignored
    assert "computes its logits in a way the kernels do not serve" in refusal(saved_model(), **LORA_HEAD)


# The reference


def test_before_training_the_reference_is_the_policy(saved_model, way):
    policy = policy_of(saved_model(), **way).train()
    with torch.no_grad():
        assert torch.equal(policy(tree(), logprobs()), policy.reference(tree(), logprobs()))


@pytest.mark.parametrize(
    ("architecture", "tied"),
    [("llama", False), ("llama", True)]
    + [pytest.param(name, tied, marks=pytest.mark.slow) for name in ("gpt_neox", "qwen2") for tied in (False, True)],
)
def test_the_reference_stays_the_initial_model(saved_model, way, architecture, tied):
    policy = policy_of(saved_model(architecture, tie_word_embeddings=tied), **way)
    initial = copy.deepcopy(policy)
    before = policy.reference(tree(), logprobs())
    train(policy)
    assert torch.equal(policy.reference(tree(), logprobs()), before)
    with torch.no_grad():
        assert_close(before, initial(tree(), logprobs()), atol=0, rtol=0)
        moved = policy(tree(), logprobs()) - before
    assert moved.abs().max() > 0.1, "the policy must have moved for this to mean anything"


def test_the_reference_takes_no_gradient_and_leaves_the_policys(saved_model, way):
    policy = policy_of(saved_model(), **way).train()
    trained = set(policy.trained_parameters())
    loss_of(policy, torch.zeros(len(sequences()))).backward()
    before = {name: p.grad.clone() for name, p in policy.trained_parameters().items()}
    assert not policy.reference(tree(), logprobs()).requires_grad
    assert set(policy.trained_parameters()) == trained
    for name, parameter in policy.trained_parameters().items():
        assert torch.equal(parameter.grad, before[name])


def test_the_references_memory_is_the_trained_parameters_alone(saved_model):
    sizes = {}
    for name, way in WAYS.items():
        policy = policy_of(saved_model(), **way)
        sizes[name] = sum(p.numel() for p in policy.reference_parameters.values())
        if not way.get("use_peft"):
            assert sizes[name] == sum(p.numel() for p in policy.trained_parameters().values())
    assert sizes["lora"] == sizes["lora, head"] == 0 < sizes["last layer"] < sizes["full"]


def test_lora_dropout_is_on_in_the_policy_alone(saved_model):
    policy = train(policy_of(saved_model(), **LORA, lora_dropout=0.5))
    reference = [policy.reference(tree(), logprobs()) for _ in range(2)]
    with torch.no_grad():
        drawn = [policy(tree(), logprobs()) for _ in range(2)]
    assert torch.equal(*reference)
    assert not torch.equal(*drawn)


def test_the_reference_puts_every_train_flag_back(saved_model, way):
    policy = policy_of(saved_model(), **way).train()
    policy.base.get_decoder().layers[0].eval()  # a caller may hold a part in eval mode
    flags = {name: module.training for name, module in policy.named_modules()}
    assert not any(policy.reference(tree(), lambda *_: [module.training for module in policy.modules()]))
    assert {name: module.training for name, module in policy.named_modules()} == flags

    def fail(hidden, head):
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        policy.reference(tree(), fail)
    assert {name: module.training for name, module in policy.named_modules()} == flags
    train(policy)  # neither are the parameters left swapped, nor the adapter off
    with torch.no_grad():
        assert not torch.equal(policy(tree(), logprobs()), policy.reference(tree(), logprobs()))


# What is trained


def test_last_k_trains_those_layers_the_norm_and_an_untied_head(saved_model):
    untied = set(policy_of(saved_model(), num_layers_unfrozen=1).trained_parameters())
    layer = {name for name in untied if name.startswith("model.model.layers.1.")}
    assert len(layer) == 9
    assert untied - layer == {"model.model.norm.weight", "model.lm_head.weight"}
    tied = policy_of(saved_model(tie_word_embeddings=True), num_layers_unfrozen=1).trained_parameters()
    assert set(tied) == untied - {"model.lm_head.weight"}


@pytest.mark.parametrize(
    ("architecture", "norm"), [("gpt_neox", "final_layer_norm"), ("gpt2", "ln_f"), ("opt", "final_layer_norm")]
)
def test_last_k_finds_the_final_norm_of_other_architectures(saved_model, architecture, norm):
    trained = policy_of(saved_model(architecture), num_layers_unfrozen=1).trained_parameters()
    outside = {name.split(".")[-2] for name in trained if ".1." not in name}
    assert outside - {"embed_out", "lm_head"} == {norm}
    assert not any("embed_tokens" in name or "wte" in name or ".0." in name for name in trained)


def test_what_last_k_freezes_does_not_move(saved_model):
    policy = policy_of(saved_model(), num_layers_unfrozen=1)
    before = {name: p.detach().clone() for name, p in policy.named_parameters()}
    train(policy)
    trained = policy.trained_parameters()
    for name, parameter in policy.named_parameters():
        assert torch.equal(parameter, before[name]) == (name not in trained), name


def test_more_layers_than_there_are_is_refused(saved_model):
    with pytest.raises(ModelError, match="num_layers_unfrozen=3: LlamaForCausalLM has 2 layers"):
        policy_of(saved_model(), num_layers_unfrozen=3)


def test_a_lora_target_that_is_not_there_is_named(saved_model):
    with pytest.raises(ModelError, match=r"lora_target_modules=\['q_prj'\]"):
        policy_of(saved_model(), use_peft=True, lora_target_modules=["q_prj"])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_trained_parameters_are_fp32_and_frozen_ones_as_asked(saved_model, way, dtype):
    policy = policy_of(saved_model(), autocast=dtype == "bfloat16", dtype=dtype, **way)
    for name, parameter in policy.named_parameters():
        expected = torch.float32 if parameter.requires_grad else getattr(torch, dtype)
        assert parameter.dtype == expected, name
    assert all(p.dtype == torch.float32 for p in policy.reference_parameters.values())


# Frozen bf16 weights between trained fp32 ones: a tied head above the norm, a LayerNorm above frozen layers.
@pytest.mark.parametrize("architecture", ["llama, tied", "gpt_neox"])
def test_bf16_weights_train_under_autocast(saved_model, way, architecture):
    folder = saved_model(architecture.split(",")[0], **ARCHITECTURES[architecture])
    policy = policy_of(folder, autocast=True, dtype="bfloat16", **way)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ref_logps = policy.reference(tree(), logprobs())
        loss_of(policy, ref_logps).backward()
    exact = plain_logprobs(AutoModelForCausalLM.from_pretrained(folder).eval())
    assert_close(ref_logps, exact, atol=0.5, rtol=0.05)
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in policy.trained_parameters().values())


def test_bf16_weights_without_bf16_compute_are_refused(saved_model):
    with pytest.raises(ModelError, match="dtype='bfloat16' needs bf16 compute: set bf16: true"):
        policy_of(saved_model(), dtype="bfloat16")


DROPOUT = {
    "llama": {"attention_dropout": 0.5},
    "gpt_neox": {"attention_dropout": 0.5, "hidden_dropout": 0.5},
    "gpt2": {"attn_pdrop": 0.5, "resid_pdrop": 0.5, "embd_pdrop": 0.5},
    "opt": {"attention_dropout": 0.5, "dropout": 0.5, "layerdrop": 0.5},
}


@torch.no_grad()
@pytest.mark.parametrize("architecture", DROPOUT)
def test_the_checkpoints_dropout_is_off_in_training(saved_model, way, architecture):
    policy = policy_of(saved_model(architecture, **DROPOUT[architecture]), **way)
    quiet = policy.eval()(tree(), logprobs())
    assert_close(policy.train()(tree(), logprobs()), quiet, atol=1e-5, rtol=0)


def test_routing_that_draws_random_numbers_is_refused(tmp_path):
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4}
    tokens = {"vocab_size": len(tiny.WORDS), "pad_token_id": tiny.PAD, "eos_token_id": tiny.EOS}
    # PhiMoE's router_jitter_noise is a threshold in eval mode too: without it, the second expert would not be weighed.
    config = PhimoeConfig(hidden_size=32, intermediate_size=48, router_jitter_noise=0.4, **sizes, **tokens)
    torch.manual_seed(0)
    folder = tiny.save(AutoModelForCausalLM.from_config(config), tmp_path)
    assert "PhimoeForCausalLM draws random numbers in training, a router's noise" in refusal(folder)


def test_checkpointing_passes_no_gradient_through_frozen_layers(saved_model):
    policy = policy_of(saved_model(), gradient_checkpointing=True, num_layers_unfrozen=1).train()
    frozen, trained = policy.base.get_decoder().layers
    needed = {}
    for layer in (frozen, trained):
        layer.register_forward_hook(lambda module, args, out: needed.update({module: out.requires_grad}))
    policy(tree(), lambda hidden, head: None)
    assert needed == {frozen: False, trained: True}


@pytest.mark.parametrize("kind", [True, "selective"], ids=["whole", "selective"])
def test_gradient_checkpointing_gives_the_same_gradients(saved_model, way, kind):
    gradients = []
    for checkpointing in (False, kind):
        torch.manual_seed(0)  # the adapter's first weights
        policy = policy_of(saved_model(), gradient_checkpointing=checkpointing, **way).train()
        tiny.perturb(policy.trained_parameters().values())
        forwards = []
        layer = policy.base.get_decoder().layers[1]
        layer.input_layernorm.register_forward_pre_hook(lambda *_, calls=forwards: calls.append(1))
        loss_of(policy, torch.zeros(len(sequences()))).backward()
        assert len(forwards) == 1 + bool(checkpointing)
        gradients.append({name: p.grad for name, p in policy.trained_parameters().items()})
    plain, recomputed = gradients
    assert plain.keys() == recomputed.keys()
    for name, gradient in plain.items():
        assert gradient.abs().max() > 0, name
        assert_close(recomputed[name], gradient, atol=1e-6, rtol=1e-5)


class Matmuls(TorchDispatchMode):
    """Counts the matrix products and attentions of what runs inside."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function)
        self.count += name.startswith("aten.mm") or "attention" in name
        return function(*args, **(kwargs or {}))


def test_selective_checkpointing_recomputes_no_product(saved_model):
    kept, counts = [], []  # of a model whose MLPs are not fused: fused ones keep little without checkpointing
    for kind in (False, "selective", True):
        policy = policy_of(saved_model("phi3"), gradient_checkpointing=kind).train()
        with Matmuls() as matmuls:
            forward = partial(policy, tree(), lambda hidden, head: hidden.sum())
            loss, extra = peak_extra_bytes(forward, torch.device("cpu"))
            loss.backward()
        kept.append(extra)
        counts.append(matmuls.count)
    assert counts[0] == counts[1] < counts[2]
    assert kept[0] > 1.3 * kept[1] > kept[2]


def test_selective_checkpointing_keeps_no_low_rank_result(saved_model):
    kept = []
    for adapter in ({}, {"use_peft": True, "lora_r": 1, "lora_target_modules": "all-linear"}):
        policy = policy_of(saved_model(), gradient_checkpointing="selective", **adapter).train()
        forward = partial(policy, tree(), lambda hidden, head: hidden.sum())
        _, extra = peak_extra_bytes(forward, torch.device("cpu"))
        kept.append(extra)
    full, lora = kept
    assert lora < 1.2 * full


@pytest.mark.parametrize(
    ("architecture", "asked", "enabled"),
    [
        ("gpt2", None, not torch.cuda.is_available()),
        ("llama", None, False),  # its layers are fused, which needs no checkpointing
        ("llama", "selective", True),
        ("llama", True, True),
        ("gpt2", False, False),
    ],
)
def test_checkpointing_follows_the_setting_and_the_device(saved_model, monkeypatch, architecture, asked, enabled):
    folder = saved_model(architecture)
    assert not policy_of(folder).base.is_gradient_checkpointing, "a small model keeps what it computes"
    monkeypatch.setattr("hypo_train.model.trainable.SELECTIVE_FROM", 1000)
    assert policy_of(folder, gradient_checkpointing=asked).base.is_gradient_checkpointing is enabled


def test_a_model_without_checkpointing_trains_unless_required(saved_model, monkeypatch):
    monkeypatch.setattr(LlamaForCausalLM, "supports_gradient_checkpointing", False)
    policy_of(saved_model())
    with pytest.raises(ModelError, match="gradient_checkpointing: LlamaForCausalLM has none: set it to false"):
        policy_of(saved_model(), gradient_checkpointing=True)


# Saved models


def test_a_saved_model_has_the_policys_logits_in_transformers(saved_model, tmp_path, way):
    policy = train(policy_of(saved_model(), **way)).eval()
    policy.save_pretrained(tmp_path / "final")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "final").eval()
    with torch.no_grad():
        assert_close(plain_logprobs(loaded), policy(tree(), logprobs()), atol=1e-4, rtol=0)
    initial = AutoModelForCausalLM.from_pretrained(saved_model()).eval()
    assert (plain_logprobs(loaded) - plain_logprobs(initial)).abs().max() > 0.1


def test_a_saved_adapter_is_a_peft_folder_for_the_base_model(saved_model, tmp_path):
    policy = train(policy_of(saved_model(), **LORA)).eval()
    policy.save_pretrained(tmp_path / "final")
    assert json.loads((tmp_path / "final" / "adapter_config.json").read_text())["r"] == 4
    assert not (tmp_path / "final" / "model.safetensors").exists()
    loaded = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(saved_model()), tmp_path / "final").eval()
    with torch.no_grad():
        assert_close(plain_logprobs(loaded), policy(tree(), logprobs()), atol=1e-4, rtol=0)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_training_leaves_no_mark_on_the_saved_models_config(saved_model, tmp_path, architecture):
    folder = saved_model(architecture)
    policy_of(folder, gradient_checkpointing=True).save_pretrained(tmp_path / "final")
    before, after = (json.loads((path / "config.json").read_text()) for path in (folder, tmp_path / "final"))
    assert after == before


# Refused models


def refusal(folder, **changes):
    """The one line that turns a model down, as ``prepare`` comes to it."""
    config = model_config(folder, **changes)
    try:
        load_tokenizer(config)
    except ModelError as error:
        message = str(error)
    else:
        with pytest.raises(ModelError) as caught:
            load_policy(config, autocast=False)
        message = str(caught.value)
    assert "\n" not in message
    return message


def test_a_masked_language_model_is_refused(tmp_path):
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
    folder = tiny.save(BertForMaskedLM(BertConfig(vocab_size=len(tiny.WORDS), **sizes)), tmp_path)
    assert f"{str(folder)!r} is a bert model (BertForMaskedLM), not a causal language model" in refusal(folder)


def test_an_encoder_decoder_is_refused(tmp_path):
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4}
    folder = tiny.save(T5ForConditionalGeneration(T5Config(vocab_size=len(tiny.WORDS), **sizes)), tmp_path)
    assert "is a t5 model (T5ForConditionalGeneration), not a causal language model" in refusal(folder)


@pytest.mark.parametrize("kind", [LlamaModel, LlamaForSequenceClassification])
def test_a_decoder_without_its_language_model_head_is_refused(tmp_path, kind):
    folder = tiny.save(kind(tiny.new_config("llama")), tmp_path)
    assert f"is a llama model ({kind.__name__}), not a causal language model" in refusal(folder)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gpt_neox"])
def test_too_few_positions_are_refused(saved_model, architecture):
    message = refusal(saved_model(architecture), max_prompt_length=100, max_completion_length=29)
    assert "has 128 positions, and prompt and completion may take 129" in message
    assert policy_of(saved_model(architecture), max_prompt_length=100, max_completion_length=28)


def test_dropout_of_lora_on_the_head_is_refused(saved_model):
    message = refusal(saved_model(), **LORA_HEAD, lora_dropout=0.3)
    assert (
        message == "lora_dropout=0.3 is not served on the LM head: use 0, or leave the head out of lora_target_modules"
    )


class ScaledHead(nn.Linear):
    def forward(self, hidden):
        return 2 * super().forward(hidden)


def test_a_head_that_is_no_plain_linear_layer_is_refused(saved_model):
    policy = policy_of(saved_model())
    policy.base.lm_head = ScaledHead(32, len(tiny.WORDS), bias=False)
    with pytest.raises(ModelError, match=r"no plain linear LM head \(found ScaledHead\)"):
        check_exactness(policy)


def forward_with(change):
    """Llama's forward with its logits changed."""
    original = LlamaForCausalLM.forward

    def forward(self, *arguments, **keywords):
        output = original(self, *arguments, **keywords)
        output.logits = change(output.logits)
        return output

    return forward


@pytest.mark.parametrize(
    "change",
    [lambda z: z / 1.5, lambda z: 5 * torch.tanh(z / 5), lambda z: z + torch.arange(z.shape[-1]), lambda z: 1.005 * z],
    ids=["scaled", "capped", "shifted", "scaled by half a percent"],
)
def test_logits_that_are_not_the_heads_are_refused(saved_model, monkeypatch, change):
    monkeypatch.setattr(LlamaForCausalLM, "forward", forward_with(change))
    message = refusal(saved_model())
    assert "LlamaForCausalLM computes its logits in a way the kernels do not serve: they differ by" in message


def test_a_decoder_that_loses_the_tree_trains_on_separate_rows(saved_model, monkeypatch):
    original = LlamaModel.forward

    def forward(self, *arguments, tree=None, **keywords):
        return original(self, *arguments, **keywords)

    monkeypatch.setattr(LlamaModel, "forward", forward)
    policy = policy_of(saved_model())
    assert "does not keep to trees: logits differ by" in policy.why_separate_rows
    assert policy.base.config._attn_implementation == "sdpa"


def test_rows_of_another_attention_than_eager_are_checked(saved_model, monkeypatch):
    def doubled(module, query, *states, scaling=None, **options):
        return sdpa_attention_forward(module, 100 * query, *states, scaling=scaling, **options)

    monkeypatch.setitem(AttentionInterface._global_mapping, "sdpa", doubled)
    model = saved_model()
    assert policy_of(model).shares_prompts
    with pytest.raises(ModelError, match="something else with sdpa attention: logits differ by"):
        policy_of(model, attn_implementation="sdpa")


def test_a_decoder_without_tree_support_trains_on_separate_rows(saved_model, monkeypatch):
    original = LlamaModel.forward

    def forward(self, input_ids, attention_mask=None, position_ids=None, use_cache=None, **known):
        if unknown := known.keys() - {"past_key_values", "cache", "inputs_embeds"}:
            raise TypeError(f"forward() got an unexpected keyword argument {unknown.pop()!r}")
        return original(
            self, input_ids, attention_mask=attention_mask, position_ids=position_ids, use_cache=use_cache, **known
        )

    monkeypatch.setattr(LlamaModel, "forward", forward)
    assert "cannot take trees" in policy_of(saved_model()).why_separate_rows


def test_a_decoder_that_ignores_padding_too_is_refused(saved_model, monkeypatch):
    original = LlamaModel.forward

    def forward(self, input_ids, attention_mask=None, **keywords):
        out = original(self, input_ids, attention_mask=attention_mask, **keywords)
        if attention_mask is not None:
            out.last_hidden_state = out.last_hidden_state + (~attention_mask.bool()).sum()
        return out

    monkeypatch.setattr(LlamaModel, "forward", forward)
    assert "does not honour padding" in refusal(saved_model())


def test_checking_a_model_leaves_its_mode_and_the_random_state(saved_model):
    policy = policy_of(saved_model()).train()
    random_state = torch.get_rng_state()
    check_exactness(policy)
    assert all(module.training for module in policy.modules())
    assert torch.equal(torch.get_rng_state(), random_state)


@pytest.mark.parametrize("name", ["./missing", "/not/there", "../a/b", "a/b/c", "~/no such model"])
def test_a_local_folder_that_is_not_there_is_named(name):
    assert refusal(name) == f"model_name_or_path: there is no folder {os.path.expanduser(name)!r}"


def test_a_folder_without_a_model_is_named(tmp_path):
    message = f"model_name_or_path: the folder {str(tmp_path)!r} has no config.json, so it is not a saved model"
    assert refusal(tmp_path) == message


def test_an_adapter_given_as_the_model_is_refused_with_the_fix(tmp_path, saved_model):
    policy_of(saved_model(), use_peft=True).save_pretrained(tmp_path)
    message = f"model_name_or_path: {str(tmp_path)!r} is an adapter and not a whole model: merge it"
    assert refusal(tmp_path).startswith(message)


@pytest.mark.parametrize(
    ("content", "reason"), [("{}", "cannot read the config of"), ("{broken", "cannot read the config of")]
)
def test_a_config_that_cannot_be_read_is_named(tmp_path, content, reason):
    (tmp_path / "config.json").write_text(content)
    assert f"{reason} {str(tmp_path)!r}" in refusal(tmp_path)


def test_a_folder_without_weights_is_named(tmp_path, saved_model):
    for path in saved_model().iterdir():
        if path.suffix != ".safetensors":
            (tmp_path / path.name).write_bytes(path.read_bytes())
    assert f"the folder {str(tmp_path)!r} has no weights (model.safetensors)" in refusal(tmp_path)


def test_a_folder_without_a_tokenizer_is_named(tmp_path):
    tiny.new_model("llama").save_pretrained(tmp_path)
    assert f"cannot load the tokenizer of {str(tmp_path)!r}" in refusal(tmp_path)


# Tokens


def test_a_tokenizer_without_an_eos_is_refused(tmp_path):
    tiny.new_model("llama").save_pretrained(tmp_path)
    tokenizer = tiny.word_tokenizer()
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path)
    assert "has no EOS token" in refusal(tmp_path)


def test_a_tokenizer_without_a_pad_token_pads_with_its_eos(tmp_path):
    tiny.new_model("llama").save_pretrained(tmp_path)
    tokenizer = tiny.word_tokenizer()
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path)
    assert load_tokenizer(model_config(tmp_path)).pad_token_id == tiny.EOS


@pytest.mark.parametrize(("generation_eos", "expected"), [(None, (4,)), (4, (4,)), (7, (4, 7)), ([7, 4, 9], (4, 7, 9))])
def test_eos_tokens_are_the_tokenizers_and_the_checkpoints(generation_eos, expected):
    from types import SimpleNamespace

    tokenizer = SimpleNamespace(eos_token_id=4, chat_template=None)
    assert eos_token_ids(SimpleNamespace(eos_token_id=generation_eos), tokenizer) == expected
    assert eos_token_ids(None, tokenizer) == (4,)


@pytest.fixture
def incomplete(saved_model, tmp_path):
    """A checkpoint that lacks one of its weights, which transformers would draw at random."""
    whole = AutoModelForCausalLM.from_pretrained(saved_model())
    weights = {name: w for name, w in whole.state_dict().items() if not name.endswith("1.mlp.up_proj.weight")}
    whole.save_pretrained(tmp_path / "incomplete", state_dict=weights)
    return tmp_path / "incomplete"


@pytest.mark.parametrize("load", [load_policy, partial(load_reward_model, pad_token_id=tiny.PAD)], ids=["lm", "reward"])
def test_a_checkpoint_that_lacks_weights_is_refused_by_name(incomplete, settings, load):
    with pytest.raises(ModelError, match=r"incomplete' lacks weights: model\.layers\.1\.mlp\.up_proj\.weight"):
        load(settings(model=incomplete), autocast=False)
