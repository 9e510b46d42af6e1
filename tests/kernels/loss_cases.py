"""Batches of the loss, each with its reason, and helpers that several files of tests use."""

from typing import Any

import pytest
import torch
from contract import Batch
from torch import Tensor

from hypo_kernels import fused_hypo_loss
from hypo_kernels.losses import Sigmoid
from hypo_kernels.objective import Objective

PAIR = {"lengths": [5, 9], "num_pairs": 1}
BOTH = {"lengths": [5, 9, 3, 7, 6, 1, 8, 4], "num_pairs": 2}  # 2 pairs, 2 prompts of 2 samples, all ragged

CASES: dict[str, dict[str, Any]] = {
    # 257: with 256-wide tiles, the last one would hold a single real column.
    "ragged pairs and samples": {**BOTH, "vocab": 257},
    # GPT-2's vocabulary: 13 tiles of 4096 columns, the last one partial, and nothing divides it. No row is
    # ignored, so that eager's products over 50257 terms have the kernel's shapes and hence its summation order.
    "vocabulary of 50257": {"lengths": [2, 1, 2, 3], "num_pairs": 1, "vocab": 50257, "ignored": 0.0},
    # Smaller than any tile, and than a warp.
    "vocabulary of 3": {**BOTH, "vocab": 3},
    "vocabulary of 7": {**BOTH, "vocab": 7},
    # A maximum that starts at 0, or a phantom column of 0, would win over every real logit.
    "all logits far below zero": {**BOTH, "vocab": 67, "offset": -200.0},
    # exp overflows fp32 beyond 88.
    "logits beyond 100": {**BOTH, "vocab": 67, "spread": 60.0},
    "a chosen, a rejected and a sample with every token ignored": {
        **BOTH,
        "vocab": 67,
        "ignored_sequences": [1, 2, 5],
    },
    # Three of the four sequences have no rows at all.
    "one token": {"lengths": [1, 0], "num_pairs": 1, "vocab": 67, "ignored": 0.0},
    "one token each": {"lengths": [1, 1, 1, 1], "num_pairs": 1, "vocab": 67, "ignored": 0.0},
    "one pair": {**PAIR, "vocab": 67},
    "pairs only": {"lengths": [5, 9, 3, 7, 6, 2], "num_pairs": 3, "vocab": 67},
    "samples only": {"lengths": [5, 9, 3, 7], "num_pairs": 0, "vocab": 67},
    "three samples a prompt": {"lengths": [5, 9, 3, 7, 6, 2], "num_generations": 3, "vocab": 67},
    "four samples a prompt beside a pair": {
        "lengths": [5, 9, 3, 7, 6, 2],
        "num_pairs": 1,
        "num_generations": 4,
        "vocab": 67,
    },
    "length penalty": {"lengths": [5, 9, 3, 7], "length_penalty": 0.3, "vocab": 67},
    "label smoothing": {**PAIR, "label_smoothing": 0.2, "vocab": 67},
    "IPO": {**BOTH, "preference": "ipo", "vocab": 67},
    # p = 1 − 9e-10: a softmax in fp32 has p = 1, and no gradient.
    "confident targets": {**BOTH, "lead": 25.0, "spread": 0.3, "vocab": 64},
    "bias": {**BOTH, "with_bias": True, "vocab": 67},
    # Logits of ±6 under a cap of 5: well into tanh's bend.
    "softcap": {**BOTH, "logit_softcap": 5.0, "spread": 6.0, "vocab": 67},
    "logit scale": {**BOTH, "logit_scale": 0.0625, "spread": 20.0, "vocab": 67},
    "temperature": {**BOTH, "temperature": 0.7, "vocab": 67},
    # Scale equal to temperature: their ratio is 1, which is not the same as neither being there.
    "softcap between a scale and a temperature that cancel": {
        **BOTH,
        "logit_softcap": 5.0,
        "logit_scale": 1.5,
        "temperature": 1.5,
        "vocab": 67,
    },
    "a scale and a temperature that cancel": {**BOTH, "logit_scale": 1.5, "temperature": 1.5, "vocab": 67},
    "a negative logit scale": {**BOTH, "logit_scale": -1.5, "vocab": 67},
    "everything at once": {
        **BOTH,
        "with_bias": True,
        "logit_softcap": 8.0,
        "logit_scale": 1.5,
        "temperature": 0.8,
        "length_penalty": 0.1,
        "label_smoothing": 0.1,
        "vocab": 257,
    },
    "reference from its hidden states": {**BOTH, "with_ref_hidden": True, "with_bias": True, "vocab": 67},
}

# Without the one whose products with an exact KL, or in 16 bits, would take seconds.
SMALL_CASES = [name for name in CASES if name != "vocabulary of 50257"]

# Between them, these have pairs and samples, ignored rows, several tiles, and every option of the head.
MAIN_CASES = ("ragged pairs and samples", "everything at once")


def every_case_in_fp32(impl: str, dtype: torch.dtype, case: str) -> bool:
    """Return whether a combination is quick: fp32 takes every case, other dtypes only the main ones."""
    return dtype == torch.float32 or case in MAIN_CASES


def objective(**changes: object) -> Objective:
    values: dict[str, object] = {"loss": Sigmoid(0.1), "kl_coef": 0.5, "num_pairs": 0}
    return Objective(**{**values, **changes})  # type: ignore[arg-type]


def call(batch: Batch, impl: str, **options: Any) -> Tensor:
    return fused_hypo_loss(
        batch.hidden, batch.weight, batch.targets, batch.cu_seqlens, bias=batch.bias, impl=impl,
        **{**batch.options, **options},
    ).loss  # fmt: skip


def least_budget(batch: Batch, impl: str, **options: Any) -> int:
    with pytest.raises(ValueError, match="pass at least") as error:
        call(batch, impl, max_chunk_bytes=1, **options)
    return int(str(error.value).split("at least ")[1].split()[0])


def gradient_bytes(batch: Batch) -> tuple[int, int]:
    """Return the bytes of a call's gradient sums, and of returned gradients that are other tensors."""
    held = copies = 0
    for name in ("hidden", "weight", "bias"):
        leaf = getattr(batch, name)
        if leaf is None:
            continue
        as_it_is = name == "hidden" and leaf.dtype == torch.bfloat16
        sums = leaf.dtype if as_it_is else torch.promote_types(leaf.dtype, torch.float32)
        held += leaf.numel() * sums.itemsize
        copies += 0 if sums == leaf.dtype else leaf.numel() * leaf.dtype.itemsize
    return held, copies
