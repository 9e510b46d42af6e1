"""Sliding windows: which layer has which, by the config."""

from __future__ import annotations

import pytest
from transformers import (
    Gemma3TextConfig,
    GPT2Config,
    GptOssConfig,
    Llama4TextConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3NextConfig,
)

from hypo_train.model.windows import layer_windows

OF_LAYERS = {
    "all layers": (MistralConfig(sliding_window=16, num_hidden_layers=2), [16, 16]),
    # Mistral's own code does not read it.
    "all layers, whatever layer_types says": (
        MistralConfig(sliding_window=16, num_hidden_layers=2, layer_types=["full_attention"] * 2),
        [16, 16],
    ),
    "none": (MistralConfig(sliding_window=None, num_hidden_layers=2), [None, None]),
    "a config without the word": (GPT2Config(n_layer=2), [None, None]),
    "from a layer on": (
        Qwen2Config(use_sliding_window=True, sliding_window=8, max_window_layers=1, num_hidden_layers=3),
        [None, 8, 8],
    ),
    "set, but not used": (Qwen2Config(sliding_window=8, max_window_layers=0, num_hidden_layers=2), [None, None]),
    "every other layer": (GptOssConfig(sliding_window=8, num_hidden_layers=4), [8, None, 8, None]),
    "all but every sixth": (Gemma3TextConfig(sliding_window=8, num_hidden_layers=7), [8, 8, 8, 8, 8, None, 8]),
}


@pytest.mark.parametrize(("config", "expected"), OF_LAYERS.values(), ids=OF_LAYERS.keys())
def test_each_layer_has_its_window(config, expected):
    assert layer_windows(config) == expected


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (Llama4TextConfig(), "chunked_attention"),
        (Qwen3NextConfig(), "linear_attention"),
        (Gemma3TextConfig(use_bidirectional_attention=True), "bidirectional"),
    ],
)
def test_a_layer_without_a_plain_window_is_named(config, message):
    with pytest.raises(ValueError, match=message):
        layer_windows(config)
