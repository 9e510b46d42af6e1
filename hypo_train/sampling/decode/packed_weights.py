"""Linear layers with weights in oneDNN's packed layout, which makes products with a few rows faster on a CPU.

A decode step multiplies each weight with as many rows as there are completions. From 4 rows to 32, PyTorch's product
takes up to twice the time that reading the weight takes; the packed one is close to that time. It sums in another
order, so results differ by rounding.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

# Packing SmolLM2-135M takes as long as 4 to 7 steps of 8 rows, each of which is a third shorter with packed weights.
_FROM_ROWS, _FROM_TOKENS = 4, 32


def packing_pays(rows: int, new_tokens: int) -> bool:
    """Return whether a draw of ``rows`` completions of up to ``new_tokens`` tokens is faster with packed weights."""
    return rows >= _FROM_ROWS and new_tokens >= _FROM_TOKENS


@contextmanager
def packed_weights(model: nn.Module) -> Iterator[None]:
    """Let the linear layers of ``model`` multiply packed copies of their weights, in a block without gradients.

    The copies take as much memory as the weights and are made of the current ones. A layer whose weight is not a plain
    tensor on the CPU, in a dtype that oneDNN multiplies, is left alone, as is one with a forward pass of its own.
    """
    layers = [(layer, dtype) for layer in model.modules() if (dtype := _dtype_to_pack(layer)) is not None]
    try:
        for layer, dtype in layers:
            weight = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach().to(dtype), None)
            bias = None if layer.bias is None else layer.bias.detach().to(dtype)
            layer.forward = partial(_linear, weight=weight, bias=bias)
        yield
    finally:
        for layer, _ in layers:
            vars(layer).pop("forward", None)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x.to(weight.dtype), weight, bias, "none", [], "")


def packed_bytes(model: nn.Module, dtype: torch.dtype) -> int:
    """Return the memory of the packed copies for products in ``dtype``."""
    return sum(layer.weight.numel() for layer in model.modules() if type(layer) is nn.Linear) * dtype.itemsize


def _dtype_to_pack(layer: Any) -> torch.dtype | None:
    """Return the dtype in which ``layer`` multiplies, or None if its weight cannot be packed."""
    if type(layer) is not nn.Linear or "forward" in vars(layer) or not torch.backends.mkldnn.is_available():
        return None
    weight = layer.weight
    if type(weight) is not nn.Parameter or weight.device.type != "cpu":
        return None
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else weight.dtype
    in_bf16 = dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return dtype if dtype == torch.float32 or in_bf16 else None
