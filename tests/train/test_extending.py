"""The losses and samplers of docs/extending.md work as a reader would add them: from a folder of their own."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from hypo_train.config import ConfigError, checked
from hypo_train.metrics.log import read_metrics
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
        ("more_losses:number", "is a int, should be a hypo_train.algorithms.registry.Algorithm"),
        ("hinge", "should be 'hypo', 'dpo', 'ipo', 'rloo', 'reward', 'sft' or 'package.module:object'"),
    ],
)
def test_a_wrong_algorithm_is_refused_in_one_line(name, message, readers_folder):
    with pytest.raises(ConfigError, match=message) as refused:
        checked({"algorithm": name, "model_name_or_path": "m", "dataset_name": "d"})
    assert f"algorithm={name!r}" in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_loss_of_the_wrong_shape_is_named(settings, readers_folder):
    with pytest.raises(ValueError, match=r"algorithm='more_losses:mean_dpo': .* one loss for each of 4 pairs"):
        train(settings(algorithm="more_losses:mean_dpo"), progress=False)
