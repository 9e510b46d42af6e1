"""The sweep's numbers are there from the first point on, and can be drawn."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch

from benchmarks import sweep
from benchmarks.providers import GEMMS, OURS
from benchmarks.workloads import Workload

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[Workload]]:
    """Two points of tokens, and none but full logits beside ours."""
    points = {"tokens": [Workload("hypo", rows, 128, 16, torch.float32, 8) for rows in (32, 64)]}
    monkeypatch.setattr(sweep, "workloads", lambda device, *, quick: points)
    monkeypatch.setitem(sweep.PEERS, "cpu", ("full logits",))
    return points


def test_every_point_holds_ours_the_peers_and_the_gemms(tmp_path: Path, tiny: dict[str, list[Workload]]) -> None:
    found = json.loads(sweep.measure(CPU, tmp_path, quick=True).read_text())
    axis = found["axes"]["tokens"]
    assert axis["fixed"] == {"vocab": 128, "width": 16, "dtype": "float32"}
    assert [point["tokens"] for point in axis["points"]] == [32, 64]
    for point in axis["points"]:
        assert {GEMMS, OURS["cpu"], "full logits"} == set(point["providers"])
        assert point["providers"][GEMMS]["share of the GEMM rate"] == 1
        assert all(numbers["ms"] > 0 for numbers in point["providers"].values())


def test_a_point_is_written_before_the_next_is_measured(
    tmp_path: Path, tiny: dict[str, list[Workload]], monkeypatch: pytest.MonkeyPatch
) -> None:
    measure_group = sweep.Session.measure

    def fail_at_64(session, group, names):
        if group.workload.rows == 64:
            raise RuntimeError("out of memory")
        return measure_group(session, group, names)

    monkeypatch.setattr(sweep.Session, "measure", fail_at_64)
    with pytest.raises(RuntimeError, match="out of memory"):
        sweep.measure(CPU, tmp_path, quick=True)
    assert len(json.loads((tmp_path / "sweep.json").read_text())["axes"]["tokens"]["points"]) == 1


def test_the_pictures_leave_out_what_did_not_run_or_was_wrong(tmp_path: Path, tiny: dict[str, list[Workload]]) -> None:
    if importlib.util.find_spec("matplotlib") is None:
        pytest.skip("matplotlib is not installed")
    from benchmarks import plots

    path = sweep.measure(CPU, tmp_path, quick=True)
    numbers = json.loads(path.read_text())
    first, second = numbers["axes"]["tokens"]["points"]
    first["providers"]["full logits"]["wrong"] = "far off"
    second["providers"]["full logits"] = {"skipped": "OutOfMemoryError: tried to allocate 64 GiB"}
    path.write_text(json.dumps(numbers))
    pictures = plots.draw(path)
    assert [picture.name for _, picture in pictures] == ["tokens.png", "gemm-rate.png"]
    assert all(picture.stat().st_size > 10_000 for _, picture in pictures)


def test_a_cuda_sweep_spans_what_people_train() -> None:
    axes = sweep.workloads(CUDA, quick=False)
    assert [(w.rows, w.vocab, w.width) for w in axes["tokens"]][-1] == (32768, 128256, 4096)
    assert {w.vocab for w in axes["vocabulary"]} == {32768, 65536, 128256, 262144}
