"""The peers of the loss benchmark that a reader may not have installed."""

from __future__ import annotations

import os
import sys

import pytest
import torch

from benchmarks import providers
from benchmarks.liger_types import LOSS_TYPES
from benchmarks.session import Session
from benchmarks.workloads import Group, Workload


def test_unsloth_is_skipped_with_a_reason_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "unsloth_zoo", None)  # as if it were not installed
    providers._unsloth_fused_linear.cache_clear()
    before = dict(os.environ)
    group = Group(Workload("hypo", 32, 50, 8, torch.float32, sequence_length=4), "frozen")
    session = Session(torch.device("cpu"), few_rounds=True, on_measured=lambda *_: None)
    result = session.measure(group, ["unsloth fused linear"]).results["unsloth fused linear"]
    assert "unsloth_zoo" in result.skipped
    assert not result.failed
    assert dict(os.environ) == before


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_liger_and_per_token_log_probs_agree_on_each_loss(loss_type: str) -> None:
    pytest.importorskip("liger_kernel", reason="needs Liger: pip install -e '.[bench]'")
    workload = Workload("dpo", 32, 50, 8, torch.float32, sequence_length=4, loss_type=loss_type)
    session = Session(torch.device("cpu"), few_rounds=True, on_measured=lambda *_: None)
    names = ["Liger DPO, not compiled", "hypo_kernels token_logprobs"]
    results = session.measure(Group(workload, "trained"), names).results
    for name in names:
        assert not results[name].wrong
        assert not results[name].failed
        assert results[name].errors["weight"] < 1e-5
