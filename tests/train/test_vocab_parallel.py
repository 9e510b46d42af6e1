"""Embedding and head in shards of the vocabulary: what two ranks hold of them, and what is refused."""

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ranks import ended, start
from tiny import make_config, new_model, save
from torch._subclasses import FakeTensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from hypo_train.config import Config
from hypo_train.distributed.fsdp import Sharding
from hypo_train.distributed.vocab_parallel import ranks_without_a_shard
from hypo_train.metrics.meter import Meter
from hypo_train.model.policy import Policy
from hypo_train.model.tree_model import ModelError
from hypo_train.prepare import prepare
from hypo_train.step import train_step

pytestmark = pytest.mark.timeout(0)  # ranks.py waits by the processes' progress
# No other size of the model or of a batch; and a matrix of it, 601 x 32, has more entries than a layer.
VOCAB, WIDTH = 601, 32


class Recorder(TorchDispatchMode):
    """What a process makes that is as large as the vocabulary: the operator and the shape."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # what it does with the process's own part comes by
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if not isinstance(x, torch.Tensor) or isinstance(x, FakeTensor):  # DTensor asks those for shapes
                continue
            if VOCAB in x.shape or x.numel() >= VOCAB * WIDTH:
                self.found.add(f"{func} {tuple(x.shape)}")
        return out


@contextmanager
def unrecorded_sampling(sampler: Any) -> Iterator[None]:
    """Which has all weights whole."""
    draw = sampler.sample

    def sample(*args: Any, **kwargs: Any) -> Any:
        with _disable_current_modes():
            return draw(*args, **kwargs)

    sampler.sample = sample
    yield


def step_of(config: Config) -> tuple[list[str], dict[str, float]]:
    """What this process makes in a step that is as large as the vocabulary, and the step's metrics."""
    run, meter, recorder = prepare(config), Meter(), Recorder()
    run.model.train()
    with unrecorded_sampling(run.sampler), recorder:
        train_step(run, 0, meter)
    return sorted(recorder.found), meter.read()


def main(folder: Path) -> None:
    configs = [Config(**values) for values in json.loads((folder / "configs.json").read_text(encoding="utf-8"))]
    results = [step_of(config) for config in configs]
    (folder / f"{os.environ['RANK']}.json").write_text(json.dumps(results), encoding="utf-8")


WAYS = {
    "parts": {"fsdp": True, "vocab_parallel": True},
    "parts, exact KL": {"fsdp": True, "vocab_parallel": True, "kl_estimator": "exact"},
    "whole": {"fsdp": True},
}


def config_of(folder: Path, model: Path, world: int, **changes: Any) -> Config:
    folder.mkdir(exist_ok=True)
    # A larger chunk of a part's logits would be as large as the matrix is.
    small = {"max_chunk_bytes": VOCAB * WIDTH * 3, "precompute_ref_log_probs": False, "bf16": True}
    return make_config(folder, model, per_device_train_batch_size=4 // world, **small, **changes)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(new_model("llama", vocab_size=VOCAB), tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def steps(tmp_path_factory: pytest.TempPathFactory, model: Path) -> list[dict[str, Any]]:
    """By rank, ``step_of`` each way."""
    folder = tmp_path_factory.mktemp("steps")
    configs = [config_of(folder / name, model, 2, **way) for name, way in WAYS.items()]
    (folder / "configs.json").write_text(json.dumps([c.model_dump() for c in configs]), encoding="utf-8")
    for status, _, error in ended(start([__file__, str(folder)])):
        assert status == 0, error
    return [dict(zip(WAYS, json.loads((folder / f"{rank}.json").read_text()), strict=True)) for rank in range(2)]


@pytest.mark.slow
def test_no_process_makes_what_is_as_large_as_the_vocabulary(steps):
    for rank in steps:
        assert rank["parts"][0] == rank["parts, exact KL"][0] == []
        assert any(f"({VOCAB}, {WIDTH})" in made for made in rank["whole"][0])  # which is what would be found


@pytest.mark.slow
def test_under_bf16_sharded_weights_are_trained_as_whole_ones(steps, model, tmp_path):
    _, alone = step_of(config_of(tmp_path, model, 1))
    for way in ("parts", "whole"):
        found = steps[0][way][1]
        assert found["grad_norm"] == pytest.approx(alone["grad_norm"], rel=0.05)
        losses = [rank[way][1]["loss"] for rank in steps]
        assert sum(losses) / 2 == pytest.approx(alone["loss"], rel=0.02)
        assert losses == pytest.approx([rank["whole"][1]["loss"] for rank in steps], rel=1e-3)


def test_ranks_without_a_shard_are_those_of_torch_chunk():
    for size in range(1, 30):
        for count in range(1, 12):
            assert ranks_without_a_shard(size, count) == count - len(torch.empty(size).chunk(count))


def test_more_processes_than_have_a_part_are_refused():
    policy, mesh = Policy(new_model("llama", vocab_size=37), is_peft=False), SimpleNamespace(size=lambda: 12)
    with pytest.raises(ModelError, match="2 of 12 processes would have no part of a vocabulary of 37, start fewer"):
        policy._vocab_shards(Sharding(mesh, torch.device("cpu"), None))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
