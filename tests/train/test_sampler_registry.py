"""The registry of samplers, and a sampler from outside the package."""

import json
import sys
from types import ModuleType

import pytest
import torch

from hypo_train.config import Config, ConfigError
from hypo_train.preflight.device import require_sampler
from hypo_train.prepare import prepare
from hypo_train.sampling.protocol import Sampler, SampleRequest, Samples
from hypo_train.sampling.registry import SAMPLERS, SamplerEntry, choose_sampler
from hypo_train.train import train


class Counting(Sampler):
    """Writes the tokens 3, 4, 5, ... after every prompt."""

    def __init__(self, model, settings):
        self.model, self.settings = model, settings

    def draw(self, request: SampleRequest) -> Samples:
        count, length = len(request.prompts) * request.n, request.max_new_tokens
        tokens = torch.arange(3, 3 + length).expand(count, length)
        ended = torch.zeros(count, dtype=torch.bool)
        return Samples(tokens, torch.ones_like(tokens, dtype=torch.bool), None, ended, self.version)


@pytest.fixture
def toy_module(monkeypatch):
    module = ModuleType("toy_samplers")
    module.counting = SamplerEntry("counting", Counting)
    module.refusing = SamplerEntry("refusing", Counting, why_unsupported=lambda model: "it has too many layers")
    module.missing = SamplerEntry("missing", Counting, package="no_such_package", install="pip install no_such_package")
    module.no_entry = Counting
    monkeypatch.setitem(sys.modules, "toy_samplers", module)
    return module


def test_a_sampler_from_outside_serves_a_run(toy_module, settings, tmp_path):
    config = settings(sampler="toy_samplers:counting", max_steps=1, per_device_train_batch_size=2, max_new_tokens=4)
    train(config, progress=False)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert any(json.loads(line).get("completions/mean_length") == 4 for line in lines)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_such_module:entry", "sampler='no_such_module:entry': No module named 'no_such_module'"),
        ("toy_samplers:entry", "sampler='toy_samplers:entry': module 'toy_samplers' has no attribute 'entry'"),
        ("toy_samplers:no_entry", "sampler='toy_samplers:no_entry': no_entry is a ABCMeta, should be a SamplerEntry"),
        ("toy_samplers:missing", r"sampler=missing needs pip install no_such_package \(or use sampler: auto\)"),
    ],
)
def test_a_wrong_sampler_is_one_line_of_config_error(toy_module, settings, name, message):
    with pytest.raises(ConfigError, match=message) as error:
        prepare(settings(sampler=name))
    assert "\n" not in str(error.value)


def test_a_name_that_cannot_be_a_sampler_is_refused_at_once():
    with pytest.raises(ValueError, match="should be 'auto', 'decode', 'generate', 'vllm' or 'package"):
        Config(model_name_or_path="m", dataset_name="d", sampler="decoder")


def test_a_run_without_samples_needs_no_package_of_a_sampler(toy_module, settings):
    require_sampler(settings(sampler="toy_samplers:missing", algorithm="dpo"))


def test_a_model_that_the_sampler_refuses_is_named(toy_module):
    with pytest.raises(ConfigError, match="sampler=toy_samplers:refusing: it has too many layers"):
        choose_sampler("toy_samplers:refusing", object())


def test_auto_takes_generate_for_a_model_that_decode_refuses():
    class Model:
        config = type("Config", (), {"is_encoder_decoder": True, "get_text_config": lambda self: self})()

    entry, reason = choose_sampler("auto", Model())
    assert (entry, reason) == (SAMPLERS["generate"], "Model is an encoder-decoder")
