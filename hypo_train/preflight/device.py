"""Settings that only some devices, or packages that need not be here, can serve."""

from __future__ import annotations

import importlib.util
import os
import sys

from hypo_train.config import Config, ConfigError


def check_kernels(config: Config, device_type: str) -> None:
    """Raise ConfigError for kernels that do not run on the device."""
    if device_type == "cuda":
        return
    if config.impl == "triton" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ConfigError(f"impl=triton on a {device_type}: it needs a GPU, use impl: auto")
    if config.use_liger_kernel:
        raise ConfigError(f"use_liger_kernel=true on a {device_type}: Liger's kernels need a GPU, leave it out")


def require_engine(config: Config) -> None:
    """Raise ConfigError where the sampler's package is not installed."""
    if config.draws_samples and config.sampler == "vllm" and not _is_there("vllm"):
        raise ConfigError("sampler=vllm needs vLLM: pip install 'hypo-kernels[vllm]' (or use sampler: auto)")


def _is_there(package: str) -> bool:
    """Whether it is imported already, or can be."""
    if package in sys.modules:
        return sys.modules[package] is not None
    return importlib.util.find_spec(package) is not None
