"""DoRA, rank-stabilised LoRA and LoRA on 4-bit weights train, sample, resume and save as in peft."""

from __future__ import annotations

import importlib.util

import pytest
import tiny
import torch
from peft import PeftModel
from resumed import assert_resumes_exactly
from torch import nn
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from hypo_train.checkpoint.state import save_model
from hypo_train.config import Config, ConfigError
from hypo_train.data.plan import Plan
from hypo_train.data.rows import Pair
from hypo_train.dry_run import DryRun
from hypo_train.model.head_functions import sequence_logprobs_call
from hypo_train.model.load import build_on_meta, load_policy
from hypo_train.model.quantization import (
    bytes_in_4_bits,
    dequantized,
    is_quantized,
    keep_scales,
    num_elements,
    quantizable,
    quantization_options,
)
from hypo_train.model.reference_cache import cache_key
from hypo_train.model.tree_model import ModelError
from hypo_train.preflight import check
from hypo_train.preflight.memory_estimate import Conditions, estimate
from hypo_train.sampling import DecodeSampler
from hypo_train.sampling.merged_weights import merged_weights
from hypo_train.sampling.registry import SAMPLERS
from hypo_train.train import train
from hypo_train.trees.pack import Batcher

LORA = {"use_peft": True, "lora_r": 4, "lora_target_modules": "all-linear"}
KINDS = {
    "dora": {**LORA, "use_dora": True},
    "rslora": {**LORA, "use_rslora": True},
    "4 bits": {**LORA, "load_in_4bit": True},
    "4 bits, dora": {**LORA, "load_in_4bit": True, "use_bnb_nested_quant": True, "use_dora": True},
}
# Rows of a quantised matrix of 64 columns are blocks of their own.
WIDE = {"hidden_size": 64, "intermediate_size": 128}
PAIRS = [
    Pair(0, (7, 20, 9), (11, 12, 13, tiny.EOS), (14, tiny.EOS)),
    Pair(1, (5,), (16, tiny.EOS), (17, 18, 19, 21, 22, tiny.EOS)),
]


@pytest.fixture(params=KINDS)
def kind(request):
    if "4 bits" in request.param:
        pytest.importorskip("bitsandbytes")
    return KINDS[request.param]


def config_of(folder, **changes):
    lengths = {"max_prompt_length": 16, "max_completion_length": 16}
    return Config(model_name_or_path=str(folder), dataset_name="-", bf16=False, **lengths, **changes)


def policy_of(folder, **changes):
    """One that training has moved away from its reference."""
    policy = load_policy(config_of(folder, **changes), autocast=False)
    tiny.perturb(policy.trained_parameters().values(), size=0.1)
    return policy.eval()


def base_of(folder, kind):
    """The model below the adapter, as transformers loads it."""
    config = config_of(folder, **kind)
    model = AutoModelForCausalLM.from_pretrained(folder, **quantization_options(config, autocast=False)).eval()
    keep_scales(model)
    return model


def in_trees(policy):
    """Log-probs of the pairs' chosen, then rejected: of the policy, and of its reference."""
    tree = Batcher(tiny.PAD, shares_prompts=True).pairs(PAIRS, [])
    logprobs = sequence_logprobs_call(tree, config_of("-"))
    with torch.no_grad():
        return policy(tree, logprobs), policy.reference(tree, logprobs)


def of_plain_rows(model):
    rows = [(p.prompt, p.chosen) for p in PAIRS] + [(p.prompt, p.rejected) for p in PAIRS]
    return torch.stack([tiny.plain_logprob(model, prompt, completion) for prompt, completion in rows])


@pytest.mark.parametrize("architecture", ["llama", pytest.param("gpt_neox", marks=pytest.mark.slow)])
def test_log_probs_are_those_of_plain_rows_and_of_peft(saved_model, tmp_path, kind, architecture):
    folder = saved_model(architecture, **WIDE)
    policy = policy_of(folder, **kind)
    assert policy.shares_prompts
    found, reference = in_trees(policy)
    assert_close(found, of_plain_rows(policy.base), atol=1e-4, rtol=1e-5)
    assert_close(reference, of_plain_rows(base_of(folder, kind)), atol=1e-4, rtol=1e-5)
    assert (found - reference).abs().max() > 0.1
    policy.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base_of(folder, kind), tmp_path).eval()
    assert_close(found, of_plain_rows(loaded), atol=1e-4, rtol=1e-5)


def test_samples_have_the_log_probs_of_training(saved_model, kind):
    policy = policy_of(saved_model(**WIDE), **kind)
    sampler = DecodeSampler(policy.model, eos_token_ids=(tiny.EOS,), pad_token_id=tiny.PAD, score=True)
    prompts = [list(pair.prompt) for pair in PAIRS]
    samples = sampler.sample(prompts, 2, 6, seed=0)
    for row, completion in enumerate(samples.completions()):
        expected = tiny.plain_token_logprobs(policy.base, prompts[row // 2], completion)
        assert_close(samples.logprobs[row, : len(completion)], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", [pytest.param("dora", marks=pytest.mark.slow), "4 bits"])
def test_a_run_resumes_with_the_same_bits(saved_model, settings, name):
    if name == "4 bits":
        pytest.importorskip("bitsandbytes")
    kind = KINDS[name]
    config = settings(model=saved_model(**WIDE), **kind)
    again, whole = assert_resumes_exactly(config)
    loaded = PeftModel.from_pretrained(base_of(config.model_name_or_path, kind), save_model(again)).eval()
    ids = torch.tensor([[5, 7, 9, 11]])
    assert_close(loaded(input_ids=ids).logits, whole.policy.eval().base(input_ids=ids).logits, atol=1e-5, rtol=1e-5)


def test_merged_weights_give_the_adapted_models_logits(saved_model, kind):
    folder = saved_model(**WIDE)
    policy = policy_of(folder, **kind)
    plain = AutoModelForCausalLM.from_pretrained(folder).eval()
    plain.load_state_dict(dict(merged_weights(policy.model)), strict=False)
    assert_close(of_plain_rows(plain), of_plain_rows(policy.base), atol=1e-4, rtol=1e-5)


def test_dora_on_the_head_is_refused(saved_model):
    with pytest.raises(ModelError, match="not with DoraLinearVariant: leave the head out"):
        load_policy(config_of(saved_model(), **KINDS["dora"] | {"lora_target_modules": ["lm_head"]}), autocast=False)


def test_rslora_scales_by_the_root_of_the_rank(saved_model):
    policy = load_policy(config_of(saved_model(), **KINDS["rslora"]), autocast=False)
    scales = {value for m in policy.model.modules() if hasattr(m, "lora_A") for value in m.scaling.values()}
    assert scales == {32 / 4**0.5}


@pytest.mark.parametrize("name", ["use_dora", "use_rslora", "load_in_4bit"])
def test_settings_of_an_adapter_without_one_are_refused(name):
    with pytest.raises(ValueError, match=f"{name}=true without use_peft"):
        config_of("-", **{name: True})


def test_a_reward_model_in_4_bits_is_refused():
    with pytest.raises(ValueError, match="load_in_4bit=true with algorithm=reward"):
        config_of("-", **KINDS["4 bits"], algorithm="reward")


def test_4_bits_without_bitsandbytes_are_refused_first(settings, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="load_in_4bit=true needs bitsandbytes: pip install"):
        train(settings(**KINDS["4 bits"], model="no/model/anywhere"))


@pytest.mark.parametrize("tied", [False, True])
def test_all_linear_layers_but_the_head_are_in_4_bits(saved_model, tied):
    pytest.importorskip("bitsandbytes")
    policy = load_policy(config_of(saved_model(tie_word_embeddings=tied, **WIDE), **KINDS["4 bits"]), autocast=False)
    packed = [name for name, p in policy.named_parameters() if is_quantized(p)]
    assert len(packed) == 2 * 7
    assert type(policy.base.get_output_embeddings()) is nn.Linear
    assert policy.head().weight.dtype == torch.float32
    assert not any(p.requires_grad for p in policy.parameters() if is_quantized(p))


def test_what_is_held_in_4_bits_is_counted_as_it_is_held(saved_model):
    pytest.importorskip("bitsandbytes")
    folder = saved_model(**WIDE)
    for nested in (False, True):
        config = config_of(folder, **KINDS["4 bits"], use_bnb_nested_quant=nested)
        policy = load_policy(config, autocast=False)
        held = 0
        for parameter in policy.parameters():
            if is_quantized(parameter):
                state = parameter.quant_state
                held += parameter.nbytes + state.absmax.nbytes + (state.state2.absmax.nbytes if nested else 0)
            elif not parameter.requires_grad:
                held += parameter.nbytes
        held += sum(buffer.nbytes for buffer in policy.buffers())
        meta = build_on_meta(config, policy.base.config, device_type="cpu", autocast=False)
        conditions = Conditions("cpu", False, True, SAMPLERS["decode"])
        numbers = estimate(Plan(config.model_copy(update={"max_steps": 1}), PAIRS, []), meta, conditions)
        assert numbers.of("frozen weights (4 bits, the rest float32)").training == held
        assert numbers.of("one layer's weights, dequantized").training == 4 * 64 * 128
        counts = [num_elements(p) for p in policy.parameters() if is_quantized(p)]
        assert sum(counts) == sum(p.numel() for p in quantizable(meta.base) if not p.requires_grad)


def test_half_a_byte_and_a_64th_of_a_scale_is_a_weight():
    assert bytes_in_4_bits(2**20, nested=False) == 2**19 + 4 * 2**14
    assert bytes_in_4_bits(2**20, nested=True) == 2**19 + 2**14 + 4 * 2**6


def test_the_same_codes_under_other_scales_are_another_reference(saved_model):
    pytest.importorskip("bitsandbytes")
    config = config_of(saved_model(**WIDE), **KINDS["4 bits"])
    policy = load_policy(config, autocast=False)
    before = cache_key(policy, PAIRS, config, autocast=False)
    weight = next(p for p in policy.parameters() if is_quantized(p))
    values = dequantized(weight)
    weight.quant_state.absmax *= 2
    assert_close(dequantized(weight), 2 * values)
    assert cache_key(policy, PAIRS, config, autocast=False) != before


@pytest.fixture(autouse=True)
def no_memory_estimate():
    """Here there is one."""


@pytest.mark.parametrize("name", ["dora", "4 bits"])
def test_a_dry_run_names_and_counts_them(saved_model, settings, name):
    if "4 bits" in name:
        pytest.importorskip("bitsandbytes")
    found = check(settings(model=saved_model(**WIDE), **KINDS[name]), DryRun())
    assert found.problems == []
    page = "\n".join(found.page())
    assert ("DoRA, rank 4" in page) == ("dora" in name)
    assert ("on 4-bit weights" in page) == ("4 bits" in name)
    assert ("frozen weights (4 bits, the rest float32)" in page) == ("4 bits" in name)


def test_a_dry_run_says_which_package_is_missing(settings, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    problems = check(settings(**KINDS["4 bits"], optim="adamw_8bit"), DryRun()).problems
    assert [str(problem).split(" ")[0] for problem in problems] == ["optim=adamw_8bit", "load_in_4bit=true"]
