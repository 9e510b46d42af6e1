"""What a run computes in, and what its page says about it."""

import pytest

from hypo_kernels import amx
from hypo_train import preflight
from hypo_train.config import Config
from hypo_train.dry_run import DryRun
from hypo_train.precision import computes_in_bf16, describe_precision


def config(bf16):
    return Config(model_name_or_path="m", dataset_name="d", bf16=bf16)


@pytest.mark.parametrize("has_amx", [False, True])
@pytest.mark.parametrize(
    ("bf16", "device_type", "expected"),
    [(None, "cuda", True), (None, "cpu", False), (True, "cpu", True), (False, "cuda", False)],
)
def test_cuda_alone_computes_in_bf16_unless_told(bf16, device_type, expected, has_amx, monkeypatch):
    monkeypatch.setattr(amx, "is_supported", lambda: has_amx)
    assert computes_in_bf16(config(bf16), device_type) == expected
    dtype = "bfloat16" if expected else "float32"
    assert describe_precision(config(bf16), device_type).startswith(f"computing in {dtype} (")


@pytest.mark.parametrize(
    ("bf16", "has_amx", "line"),
    [
        (None, False, "computing in float32 (the default on a CPU)"),
        (
            None,
            True,
            "computing in float32 (the default on a CPU); this CPU has AMX: compare the seconds of a few steps with "
            "bf16: true",
        ),
        (True, False, "computing in bfloat16 (bf16: true); this CPU has no AMX for bfloat16"),
        (True, True, "computing in bfloat16 (bf16: true); this CPU multiplies bfloat16 with AMX"),
        (False, True, "computing in float32 (bf16: false)"),
    ],
)
def test_the_line_on_precision_gives_its_reason(bf16, has_amx, line, monkeypatch):
    monkeypatch.setattr(amx, "is_supported", lambda: has_amx)
    assert describe_precision(config(bf16), "cpu") == line


def test_a_dry_run_says_what_a_run_computes_in(settings):
    found = preflight.check(settings(bf16=False), DryRun(device="cpu"))
    assert "computing in float32 (bf16: false)" in found.model
