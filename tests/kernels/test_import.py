"""``import hypo_kernels`` needs only torch."""

import subprocess
import sys


def run(code: str) -> str:
    """Run ``code`` in a new interpreter."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_import_loads_neither_triton_nor_transformers() -> None:
    code = "import sys, torch; before = set(sys.modules); import hypo_kernels; print(*(set(sys.modules) - before))"
    loaded = {name.split(".")[0] for name in run(code).split()}
    assert "hypo_kernels" in loaded
    assert not loaded & {"triton", "transformers", "hypo_train", "accelerate", "datasets"}


def test_cpu_needs_neither_triton_nor_transformers() -> None:
    code = """
import sys
sys.modules["triton"] = sys.modules["transformers"] = None
import torch
from hypo_kernels import fused_hypo_loss, sequence_logprobs, token_logprobs
hidden, weight = torch.randn(6, 4, requires_grad=True), torch.randn(9, 4, requires_grad=True)
targets, bounds = torch.arange(6), torch.tensor([0, 2, 6])
loss = fused_hypo_loss(
    hidden, weight, targets, bounds, num_pairs=1, ref_logps=torch.zeros(2), beta=0.1, kl_coef=0.0
).loss
(loss + token_logprobs(hidden, weight, targets).sum()
 + sequence_logprobs(hidden, weight, targets, bounds).sum()).backward()
print(bool(weight.grad.isfinite().all()))
"""
    assert run(code) == "True"


def test_triton_is_not_replaced_in_silence_where_it_is_missing() -> None:
    code = """
import os, sys
sys.modules["triton"] = None
os.environ["TRITON_INTERPRET"] = "1"
import torch
from hypo_kernels import token_logprobs
try:
    token_logprobs(torch.randn(2, 4), torch.randn(9, 4), torch.arange(2), impl="triton")
except ImportError as error:
    print("triton" in str(error))
"""
    assert run(code) == "True"


def test_the_public_names_are_the_documented_ones() -> None:
    import hypo_kernels

    assert sorted(hypo_kernels.__all__) == [
        "Groups", "HypoLoss", "Importance", "LMHead", "LoRA", "Pairs", "PreferenceLoss", "TargetLayout", "VocabShard",
        "fused_hypo_loss", "fused_preference_loss", "sequence_logprobs", "token_logprobs",
    ]  # fmt: skip
    assert all(getattr(hypo_kernels, name).__doc__ for name in hypo_kernels.__all__)
