"""The vLLM engine against a stand-in that records its calls, and against vLLM itself where that can run."""

import copy
import importlib.util
import sys
from types import SimpleNamespace

import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model
from torch.testing import assert_close

from hypo_train.sampling import Distribution, VLLMSampler

EOS, PAD = 1, 0
PROMPTS = [[5, 3, 8, 2], [4], [7, 9]]


class Engine:
    """Draws nothing: completion i of a prompt repeats its first token 4 - i times, and some end with EOS."""

    def __init__(self, **settings):
        self.settings, self.calls, self.weights = settings, [], {}

    def apply_model(self, function):
        self.calls.append("push")
        return [function(SimpleNamespace(load_weights=self._load))]

    def _load(self, weights):
        self.weights = {name: tensor.detach().clone() for name, tensor in weights}

    def reset_prefix_cache(self):
        self.calls.append("reset")

    def sleep(self, level):
        self.calls.append(f"sleep {level}")

    def wake_up(self):
        self.calls.append("wake")

    def generate(self, prompts, params, use_tqdm):
        self.calls.append("generate")
        self.prompts, self.params = prompts, params
        return [self._output(prompt["prompt_token_ids"], p) for prompt, p in zip(prompts, params, strict=True)]

    def _output(self, prompt, params):
        completions = []
        for i in reversed(range(params.n)):  # in no order
            tokens = [prompt[0]] * (4 - i) + [EOS] * (i % 2)
            logprobs = [{token: SimpleNamespace(logprob=-0.5 - i)} for token in tokens]
            completions.append(SimpleNamespace(index=i, token_ids=tokens, logprobs=logprobs))
        return SimpleNamespace(outputs=completions)


@pytest.fixture
def sampler(monkeypatch):
    """Builds a sampler around the stand-in; `sampler(model)._engine` is the `Engine` above."""
    module = SimpleNamespace(LLM=Engine, SamplingParams=lambda **settings: SimpleNamespace(**settings))
    monkeypatch.setitem(sys.modules, "vllm", module)
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")

    def build(model, **options):
        return VLLMSampler(model, "checkpoint", eos_token_ids=(EOS,), pad_token_id=PAD, score=True, **options)

    return build


def new_model():
    return tiny.new_model("llama", vocab_size=12)


def lora_model():
    config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(new_model(), config)
    tiny.perturb([p for name, p in model.named_parameters() if "lora_B" in name], size=0.2)
    return model


def assert_fresh(engine, model):
    """The engine holds what the model computes with: LoRA merged, under the names of a model without it."""
    plain = new_model()
    missing, unexpected = plain.load_state_dict(engine.weights, strict=False)
    assert not unexpected
    assert set(missing) <= {"lm_head.weight"}  # where it is tied
    for prompt in PROMPTS:
        assert_close(tiny.plain_logits(plain, prompt), tiny.plain_logits(model.eval(), prompt), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("make", [new_model, lora_model], ids=["full", "lora"])
def test_every_draw_has_fresh_weights_and_an_empty_prefix_cache(sampler, make):
    model = make()
    engine = (drawn := sampler(model))._engine
    for step in range(3):
        samples = drawn.sample(PROMPTS, 2, 5, seed=step)
        assert engine.calls == ["push", "reset", "generate"]
        assert_fresh(engine, model)
        assert samples.version == step
        engine.calls.clear()
        drawn.sample(PROMPTS, 2, 5, seed=step)
        assert engine.calls == ["generate"], "nothing changed, so nothing is pushed"
        engine.calls.clear()
        tiny.perturb([p for p in model.parameters() if p.requires_grad], seed=step, size=0.2)
        drawn.weights_changed(step + 1)
        assert engine.calls == [], "the push waits until a draw needs it"


def test_an_engine_that_slept_gets_its_weights_again(sampler):
    drawn = sampler(new_model())
    drawn.sample(PROMPTS, 2, 5, seed=1)
    drawn._engine.calls.clear()
    drawn.release()
    drawn.release()
    drawn.sample(PROMPTS, 2, 5, seed=1)
    assert drawn._engine.calls == ["sleep 1", "wake", "push", "reset", "generate"]


def test_rows_are_prompt_by_prompt_with_their_ends_and_log_probs(sampler):
    samples = sampler(new_model()).sample(PROMPTS, 3, 5, seed=1)
    expected = [[p[0]] * (4 - i) + [EOS] * (i % 2) for p in PROMPTS for i in range(3)]
    assert samples.completions() == expected
    assert samples.ended.tolist() == [False, True, False] * 3
    assert (samples.tokens[~samples.mask] == PAD).all()
    rows = torch.tensor([-0.5, -1.5, -2.5] * 3).unsqueeze(1).expand_as(samples.logprobs)
    assert torch.equal(samples.logprobs, rows.masked_fill(~samples.mask, 0.0))


def test_only_the_callers_settings_shape_the_distribution(sampler):
    drawn = sampler(new_model(), distribution=Distribution(temperature=1.5, top_k=7, top_p=0.9))
    drawn.sample([PROMPTS[0]] * 3, 2, 5, seed=1)
    engine = drawn._engine
    assert engine.settings["generation_config"] == "vllm"
    assert engine.settings["logprobs_mode"] == "processed_logprobs"
    assert [prompt["prompt_token_ids"] for prompt in engine.prompts] == [PROMPTS[0]] * 3
    for params in engine.params:
        settings = {name: value for name, value in vars(params).items() if name != "seed"}
        assert settings == {
            "n": 2,
            "temperature": 1.5,
            "top_k": 7,
            "top_p": 0.9,
            "max_tokens": 5,
            "ignore_eos": True,
            "stop_token_ids": [EOS],
            "logprobs": 0,
            "detokenize": False,
        }
    seeds = [params.seed for params in engine.params]
    assert len(set(seeds)) == 3, "equal prompts must not draw alike"
    drawn.sample([PROMPTS[0]] * 3, 2, 5, seed=1)
    assert [params.seed for params in engine.params] == seeds
    drawn.sample([PROMPTS[0]] * 3, 2, 5, seed=2)
    assert not set(seeds) & {params.seed for params in engine.params}


@pytest.mark.parametrize(("asked", "given"), [(None, 12), (8, 8), (64, 12)])
def test_longrope_keeps_its_short_factors_for_every_row(sampler, asked, given):
    """vLLM gives every row the long factors where max_model_len is above the original length."""
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    limit = {"original_max_position_embeddings": 12}
    drawn = sampler(tiny.new_model("phi3", **limit, rope_parameters={**rope, **limit}), max_model_len=asked)
    assert drawn._engine.settings["max_model_len"] == given
    drawn.sample(PROMPTS, 1, 8, seed=0)
    with pytest.raises(ValueError, match=r"prompt \+ max_new_tokens allows 13: lower it to 12"):
        drawn.sample(PROMPTS, 1, 9, seed=0)


def test_without_vllm_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ImportError, match="pip install"):
        VLLMSampler(new_model(), "checkpoint", eos_token_ids=(EOS,), pad_token_id=PAD)


def test_an_adapter_that_unties_head_and_embeddings_is_refused(sampler):
    """vLLM's loader leaves out a head's weights where its model ties them: samples would come from another policy."""
    tied = tiny.new_model("llama", vocab_size=12, tie_word_embeddings=True)
    sampler(get_peft_model(copy.deepcopy(tied), LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")))
    on_head = get_peft_model(tied, LoraConfig(target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM"))
    with pytest.raises(ValueError, match="which vLLM cannot separate"):
        sampler(on_head)


@pytest.mark.parametrize(("prompts", "message"), [([], "no prompts"), ([[1], []], "prompt 1 is empty")])
def test_what_cannot_be_sampled_is_named(sampler, prompts, message):
    with pytest.raises(ValueError, match=message):
        sampler(new_model()).sample(prompts, 1, 4, seed=0)


@pytest.mark.cuda
@pytest.mark.slow
@pytest.mark.skipif(
    not torch.cuda.is_available() or importlib.util.find_spec("vllm") is None, reason="needs a CUDA device and vLLM"
)
def test_vllm_itself_draws_from_the_weights_of_the_last_update(tmp_path):
    size = {"hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.1}
    model = tiny.new_model("llama", **size)  # heads of 64, the smallest that vLLM's attention takes
    folder = tiny.save(model, tmp_path)
    model.cuda()
    drawn = VLLMSampler(
        model, str(folder), eos_token_ids=(EOS,), pad_token_id=PAD, score=True, dtype="float32", max_model_len=64
    )
    for step in range(3):
        samples = drawn.sample(PROMPTS, 4, 12, seed=step)
        for row, completion in enumerate(samples.completions()):
            expected = tiny.plain_token_logprobs(model, PROMPTS[row // 4], completion)
            assert_close(samples.logprobs[row, : len(completion)], expected, atol=1e-3, rtol=1e-3)
        tiny.perturb(model.parameters(), seed=step)
        drawn.weights_changed(step + 1)
