"""The losses and samplers of docs/extending.md work as a reader would add them: from a folder of their own."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import tiny
import torch
import torch.nn.functional as F

from hypo_train.config import ConfigError, checked
from hypo_train.metrics.log import read_metrics
from hypo_train.sampling import Distribution
from hypo_train.sampling.registry import SamplerSettings
from hypo_train.train import train

PAGE = Path(__file__).parents[2] / "docs" / "extending.md"


@pytest.fixture(scope="module")
def readers_folder(tmp_path_factory):
    """A folder with the modules that the page shows, which Python can import from."""
    folder = tmp_path_factory.mktemp("reader")
    for name, code in re.findall(r'```python title="(\w+\.py)"\n(.*?)```', PAGE.read_text(encoding="utf-8"), re.DOTALL):
        (folder / name).write_text(code, encoding="utf-8")
    (folder / "more_losses.py").write_text(
        "import torch.nn.functional as F\n"
        "from hypo_train.algorithms.registry import Algorithm\n"
        "def dpo(chosen, rejected, ref_chosen, ref_rejected, beta):\n"
        "    return -F.logsigmoid(beta * ((chosen - ref_chosen) - (rejected - ref_rejected)))\n"
        "own_dpo = Algorithm('own dpo', 'DPO again', preference=dpo)\n"
        "mean_dpo = Algorithm('mean', 'a mean', preference=lambda *logps: dpo(*logps).mean())\n"
        "number = 3\n",
        encoding="utf-8",
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        yield folder


def losses(config):
    """The losses that a run logs, in training and on held-out rows."""
    train(config, progress=False)
    lines = read_metrics(Path(config.output_dir) / "metrics.jsonl")
    return [line[name] for line in lines for name in ("loss", "eval_loss") if name in line]


def test_a_loss_from_outside_trains_as_the_built_in_one(settings, tmp_path, readers_folder):
    shared = {"num_eval_rows": 8, "eval_steps": 1}
    built_in = losses(settings(algorithm="dpo", output_dir=str(tmp_path / "built-in"), **shared))
    outside = losses(settings(algorithm="more_losses:own_dpo", output_dir=str(tmp_path / "outside"), **shared))
    assert len(built_in) == 7
    assert outside == pytest.approx(built_in, rel=1e-5)


@pytest.mark.parametrize(
    "way", [{"use_peft": True, "lora_r": 4}, {"num_layers_unfrozen": 1}], ids=["LoRA", "last layer"]
)
def test_the_pages_loss_is_the_hinge_loss(settings, tmp_path, readers_folder, way):
    config = settings(algorithm="my_losses:hinge", beta=0.5, max_steps=8, learning_rate=1e-2, **way)
    found = losses(config)
    assert found[0] == pytest.approx(1.0, abs=1e-4)  # the policy is the reference before the first update
    assert found[-1] < 0.9
    card = (Path(config.output_dir) / "final" / "README.md").read_text(encoding="utf-8")
    assert "SLiC's hinge loss" in card
    assert "arXiv:2305.10425" in card


def test_the_pages_hinge_loss_has_its_value(readers_folder):
    from my_losses import hinge_loss

    logps = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
    margin = (logps[0] - logps[2]) - (logps[1] - logps[3])
    assert torch.equal(hinge_loss(*logps, 0.3), F.relu(1 - 0.3 * margin))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_such_module:hinge", "No module named 'no_such_module'"),
        ("my_losses:nothing", "has no attribute 'nothing'"),
        ("more_losses:number", "number is a int, should be a hypo_train.algorithms.registry.Algorithm"),
        ("hinge", "should be 'hypo', 'dpo', 'ipo', 'rloo', 'reward', 'sft' or 'package.module:object'"),
    ],
)
def test_a_wrong_algorithm_is_refused_in_one_line(name, message, settings, readers_folder):
    with pytest.raises(ValueError, match=message) as refused:
        train(settings(algorithm=name), progress=False)
    assert f"algorithm={name!r}" in str(refused.value) or f"input_value={name!r}" in str(refused.value)


def test_settings_unfit_for_an_outside_algorithm_are_refused(settings, readers_folder):
    with pytest.raises(ConfigError, match=r"rollout_steps=2 with algorithm=my_losses:hinge: it draws no samples"):
        train(settings(algorithm="my_losses:hinge", rollout_steps=2), progress=False)


def test_reading_a_configuration_imports_no_code_that_it_names(tmp_path, monkeypatch):
    (tmp_path / "hostile.py").write_text("raise SystemExit('imported')\n", encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    values = {"algorithm": "hostile:loss", "sampler": "hostile:sampler", "reward": "hostile:reward"}
    config = checked({**values, "model_name_or_path": "m", "dataset_name": "d"})
    assert config.algorithm == "hostile:loss"


def test_a_loss_of_the_wrong_shape_is_named(settings, readers_folder):
    with pytest.raises(ValueError, match=r"loss=more_losses:.* returned \(\): must return one loss each, .* \(4,\)"):
        train(settings(algorithm="more_losses:mean_dpo"), progress=False)


def test_the_pages_sampler_draws_with_the_models_log_probs(readers_folder):
    from my_samplers import plain

    model = tiny.new_model("llama")
    settings = SamplerSettings(eos_token_ids=[tiny.EOS], pad_token_id=tiny.PAD, distribution=Distribution(), score=True)
    sampler = plain.build(model, settings)
    prompts = [[7, 20, 9], [5]]
    samples = sampler.sample(prompts, 3, 6, seed=1)
    assert sampler.sample(prompts, 3, 6, seed=1).completions() == samples.completions()
    assert sampler.sample(prompts, 3, 6, seed=2).completions() != samples.completions()
    for row, completion in enumerate(samples.completions()):
        assert (completion[-1] == tiny.EOS) == bool(samples.ended[row])
        expected = tiny.plain_token_logprobs(model, prompts[row // 3], completion)
        torch.testing.assert_close(samples.logprobs[row][: len(completion)], expected, atol=1e-5, rtol=1e-5)


def test_the_pages_sampler_trains_hypo(settings, readers_folder):
    config = settings(sampler="my_samplers:plain", rollout_steps=2, max_steps=4)
    found = losses(config)
    assert len(found) == 4
    assert all(math.isfinite(loss) for loss in found)


@pytest.mark.parametrize("name", ["no_such_module:plain", "my_samplers:nothing", "more_losses:number"])
def test_a_wrong_sampler_is_refused_in_one_line(name, settings, readers_folder):
    with pytest.raises(ValueError, match=f"sampler='{name}'") as refused:
        train(settings(sampler=name), progress=False)
    assert "\n" not in str(refused.value)
