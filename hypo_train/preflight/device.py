"""Settings that need a GPU or an optional package."""

from __future__ import annotations

import importlib.util
import os
import sys

from hypo_train.config import Config, ConfigError


def check_kernels(config: Config, device_type: str) -> None:
    """Raise ConfigError if the configured kernels do not run on the device."""
    if device_type == "cuda":
        return
    if config.impl == "triton" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ConfigError(f"impl=triton on a {device_type}: it needs a GPU, use impl: auto")
    if config.use_liger_kernel:
        raise ConfigError(f"use_liger_kernel=true on a {device_type}: Liger's kernels need a GPU, leave it out")


def require_vllm(config: Config) -> None:
    """Raise ConfigError if the run samples with vLLM and that is not installed."""
    if config.draws_samples and config.sampler == "vllm" and not _is_installed("vllm"):
        raise ConfigError("sampler=vllm needs vLLM: pip install 'hypo-kernels[vllm]' (or use sampler: auto)")


def _is_installed(package: str) -> bool:
    if package in sys.modules:
        return sys.modules[package] is not None
    return importlib.util.find_spec(package) is not None
