"""The measured cases: a model, its trained part, and the lengths of prompts and responses."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import GPTNeoXConfig, LlamaConfig

from benchmarks.grid import Grid

TUNINGS = ("full", "LoRA", "last-k")


@dataclass(frozen=True)
class Lengths:
    """A truncated normal distribution of the tokens of a prompt or response."""

    mean: int
    spread: int
    low: int
    high: int


@dataclass(frozen=True)
class Case:
    """A case: ``pairs`` pairs per step, ``micro_pairs`` per micro-batch, samples of ``new_tokens`` tokens.

    Every sample has exactly ``new_tokens`` tokens, because no token ends one, so every variant does the same work. An
    engine that drops ended rows gains nothing.
    """

    model: str
    tuning: str  # one of TUNINGS
    shape: str  # a name for the lengths
    pairs: int
    micro_pairs: int
    prompt: Lengths
    response: Lengths
    new_tokens: int
    autocast: bool  # compute in bf16; trained weights are fp32 either way
    frozen_dtype: str = "float32"  # dtype of the frozen weights
    last_layers: int = 4
    num_generations: int = 2

    def __str__(self) -> str:
        tuning = f"last-{self.last_layers}" if self.tuning == "last-k" else self.tuning
        return f"{self.model}-{tuning}-{self.shape}-{self.dtype}"

    @property
    def dtype(self) -> str:
        return "bf16" if self.autocast else "fp32"

    @property
    def title(self) -> str:
        return (
            f"{self}, {self.pairs} pairs a step, prompts ~{self.prompt.mean}, responses ~{self.response.mean}, "
            f"{self.num_generations} samples of {self.new_tokens}"
        )


# Random weights in the shapes of published models: the time of a step does not depend on their values.
SHAPES: dict[str, tuple[Any, dict[str, Any]]] = {
    "tiny Llama": (
        LlamaConfig,
        {
            "vocab_size": 512,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 6,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 512,
            "tie_word_embeddings": True,
        },
    ),
    "small Llama": (
        LlamaConfig,
        {
            "vocab_size": 8192,
            "hidden_size": 256,
            "intermediate_size": 768,
            "num_hidden_layers": 8,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 1024,
            "tie_word_embeddings": True,
        },
    ),
    "Pythia-1.4B": (
        GPTNeoXConfig,
        {
            "vocab_size": 50304,
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "max_position_embeddings": 2048,
        },
    ),
    "Pythia-2.8B": (
        GPTNeoXConfig,
        {
            "vocab_size": 50304,
            "hidden_size": 2560,
            "intermediate_size": 10240,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "max_position_embeddings": 2048,
        },
    ),
    "Llama-3-8B": (
        LlamaConfig,
        {
            "vocab_size": 128256,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "max_position_embeddings": 8192,
            "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
            "tie_word_embeddings": False,
        },
    ),
}
SMOLLM = "SmolLM2-135M"  # real weights, from a folder (see material.py)

_SMALL = Case(
    model=SMOLLM,
    tuning="full",
    shape="TLDR",
    pairs=8,
    micro_pairs=8,
    prompt=Lengths(256, 40, 160, 320),
    response=Lengths(48, 10, 24, 64),
    new_tokens=48,
    autocast=False,
)
_CHAT = replace(
    _SMALL,
    shape="chat",
    pairs=4,
    micro_pairs=4,
    prompt=Lengths(64, 10, 40, 80),
    response=Lengths(128, 20, 80, 160),
    new_tokens=192,
)
# Steps that are large enough for samples of a few prompts in each.
_SMALL_32 = replace(_SMALL, shape="TLDR-32", pairs=32)
_CHAT_32 = replace(_CHAT, shape="chat-32", pairs=32)
_LONG = replace(
    _CHAT,
    shape="long",
    micro_pairs=2,  # TRL without gradient checkpointing fits into 16 GB
    prompt=Lengths(300, 60, 160, 440),
    response=Lengths(270, 50, 120, 400),
    new_tokens=256,
)
_QUICK = replace(
    _SMALL,
    model="tiny Llama",
    shape="tiny",
    pairs=8,
    micro_pairs=4,  # two micro-batches: the sums over them are checked too
    prompt=Lengths(32, 8, 16, 48),
    response=Lengths(12, 4, 4, 16),
    new_tokens=8,
)
# TL;DR: the paper's 512 tokens of context and 53 new ones; a median post has about 340.
_TLDR = Case(
    model="Pythia-2.8B",
    tuning="full",
    shape="TLDR",
    pairs=64,
    micro_pairs=8,
    prompt=Lengths(340, 100, 96, 512),
    response=Lengths(38, 10, 12, 53),
    new_tokens=53,
    autocast=True,
)
_ULTRAFEEDBACK = Case(
    model="Llama-3-8B",
    tuning="last-k",
    shape="UltraFeedback",
    pairs=64,
    micro_pairs=8,
    prompt=Lengths(300, 150, 32, 1024),
    response=Lengths(270, 130, 32, 1024),
    new_tokens=1024,
    autocast=True,
    frozen_dtype="bfloat16",
)


def cases(device: torch.device, grid: Grid) -> list[Case]:
    """Return the cases of a device, most important first."""
    if grid is Grid.QUICK:
        return [replace(_QUICK, tuning=tuning) for tuning in TUNINGS]
    if device.type == "cuda":
        small = replace(_TLDR, model="Pythia-1.4B")
        if grid is Grid.SHORT:
            return [small]
        return [_TLDR, replace(_TLDR, tuning="LoRA"), _ULTRAFEEDBACK, small, replace(small, tuning="LoRA")]
    if grid is Grid.SHORT:
        return [replace(case, model="small Llama", pairs=16) for case in (_SMALL, _CHAT)]
    return [
        replace(case, tuning=tuning, autocast=autocast)
        for tuning in TUNINGS
        for autocast in (False, True)
        for case in (_SMALL, _CHAT, _SMALL_32, _CHAT_32, _LONG)
    ]
