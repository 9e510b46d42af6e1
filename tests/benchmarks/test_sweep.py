"""The sweep writes its numbers after every point, and draws them."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks import sweep
from benchmarks.providers import GEMMS, OURS
from benchmarks.workloads import Workload

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
WORKLOADS = sweep.workloads


@pytest.fixture(autouse=True, scope="module")
def tiny() -> Iterator[None]:
    """Sweep two tiny points of one axis, with full logits as the only peer."""
    points = {"tokens": [Workload("hypo", rows, 128, 16, torch.float32, 8) for rows in (32, 64)]}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sweep, "workloads", lambda device, *, quick: points)
        patch.setitem(sweep.PEERS, "cpu", ("full logits",))
        yield


@pytest.fixture(scope="module")
def measured(tiny: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sweep.measure(CPU, tmp_path_factory.mktemp("sweep"), quick=True)


def test_every_point_has_ours_the_peers_and_the_gemms(measured: Path) -> None:
    found = json.loads(measured.read_text())
    axis = found["axes"]["tokens"]
    assert axis["fixed"] == {"vocab": 128, "width": 16, "dtype": "float32"}
    assert [point["tokens"] for point in axis["points"]] == [32, 64]
    for point in axis["points"]:
        assert {GEMMS, OURS["cpu"], "full logits"} == set(point["providers"])
        assert point["providers"][GEMMS]["share of the GEMM rate"] == 1
        assert all(numbers["ms"] > 0 for numbers in point["providers"].values())


def test_a_point_is_written_before_the_next_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measure_group = sweep.Session.measure

    def fail_at_64(session, group, names):
        if group.workload.rows == 64:
            raise RuntimeError("out of memory")
        return measure_group(session, group, names)

    monkeypatch.setattr(sweep.Session, "measure", fail_at_64)
    with pytest.raises(RuntimeError, match="out of memory"):
        sweep.measure(CPU, tmp_path, quick=True)
    assert len(json.loads((tmp_path / "sweep.json").read_text())["axes"]["tokens"]["points"]) == 1


def test_pictures_omit_wrong_and_skipped_results(measured: Path, tmp_path: Path) -> None:
    if importlib.util.find_spec("matplotlib") is None:
        pytest.skip("matplotlib is not installed")
    from benchmarks import plots

    path = tmp_path / "sweep.json"
    numbers = json.loads(measured.read_text())
    first, second = numbers["axes"]["tokens"]["points"]
    first["providers"]["full logits"]["wrong"] = "far off"
    second["providers"]["full logits"] = {"skipped": "OutOfMemoryError: tried to allocate 64 GiB"}
    path.write_text(json.dumps(numbers))
    pictures = plots.draw(path)
    assert [picture.name for _, picture in pictures] == ["tokens.png", "gemm-rate.png"]
    assert all(picture.stat().st_size > 10_000 for _, picture in pictures)


def test_a_cuda_sweep_covers_common_sizes() -> None:
    axes = WORKLOADS(CUDA, quick=False)
    assert [(w.rows, w.vocab, w.width) for w in axes["tokens"]][-1] == (32768, 128256, 4096)
    assert {w.vocab for w in axes["vocabulary"]} == {32768, 65536, 128256, 262144}
