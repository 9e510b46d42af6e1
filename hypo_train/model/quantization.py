"""Frozen 4-bit weights under a LoRA adapter (QLoRA), by bitsandbytes.

The head and the embeddings keep their dtype, because the loss reads the head's weight as it is.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig
from transformers.pytorch_utils import Conv1D

from hypo_train.config import Config, ConfigError

_BLOCK = 64  # elements that share one scale
_NESTED_BLOCK = 256  # scales that share a scale of their own


def require_quantization(config: Config) -> None:
    """Raise ConfigError if the run needs bitsandbytes, and it is not installed."""
    if config.load_in_4bit and importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError("load_in_4bit=true needs bitsandbytes: pip install bitsandbytes (or load_in_4bit: false)")


def quantization_options(config: Config, *, autocast: bool) -> dict[str, Any]:
    """Return the arguments of ``from_pretrained`` that quantise as configured."""
    if not config.load_in_4bit:
        return {}
    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=config.bnb_4bit_quant_type,
        bnb_4bit_use_double_quant=config.use_bnb_nested_quant,
        bnb_4bit_compute_dtype=torch.bfloat16 if autocast else torch.float32,
    )
    return {"quantization_config": settings}


def keep_scales(model: nn.Module) -> None:
    """Keep 4-bit weights as they were loaded, in every pass.

    On CPUs with bf16 products, bitsandbytes repacks them in the first pass in eval mode, and rounds their scales. The
    trained model would not be the loaded one, and gradients would be lost.
    """
    modules: Iterable[Any] = model.modules()
    for module in modules:
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def is_quantized(parameter: Tensor) -> bool:
    """Return whether a parameter holds packed 4-bit codes."""
    return getattr(parameter, "quant_state", None) is not None


def num_elements(parameter: Tensor) -> int:
    """Return the number of weights, also where 4-bit codes are packed."""
    return parameter.quant_state.shape.numel() if is_quantized(parameter) else parameter.numel()  # type: ignore[attr-defined]


def dequantized(parameter: Tensor) -> Tensor:
    """Return the fp32 weight that a layer computes with."""
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(parameter.data, parameter.quant_state).float()  # type: ignore[attr-defined]


def scales(parameter: Tensor) -> dict[str, Tensor]:
    """Return the tensors that turn a parameter's codes into weights, by name; none if it is not quantised."""
    if not is_quantized(parameter):
        return {}
    return parameter.quant_state.as_dict(packed=True)  # type: ignore[attr-defined]


def quantizable(model: Any) -> list[nn.Parameter]:
    """Return the weights of all linear layers but the head; of these, the frozen ones are held in 4 bits."""
    head = model.get_output_embeddings()
    layers: list[Any] = [m for m in model.modules() if isinstance(m, nn.Linear | Conv1D) and m is not head]
    return [layer.weight for layer in layers]


def bytes_in_4_bits(count: int, *, nested: bool) -> int:
    """Return the bytes of ``count`` weights in 4 bits, with their scales.

    A block's scale is in fp32, or ``nested``: in 8 bits, with fp32 scales of its own.
    """
    blocks = -(-count // _BLOCK)
    return -(-count // 2) + (blocks + 4 * -(-blocks // _NESTED_BLOCK) if nested else 4 * blocks)
