"""Check the settings that need a GPU or an optional package."""

from __future__ import annotations

import os

from hypo_train.config import Config, ConfigError
from hypo_train.sampling.registry import SamplerEntry, candidates


def check_kernels(config: Config, device_type: str) -> None:
    """Raise ConfigError if the configured kernels do not run on the device."""
    if device_type == "cuda":
        return
    if config.impl == "triton" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ConfigError(f"impl=triton on a {device_type}: it needs a GPU, use impl: auto")
    if config.use_liger_kernel:
        raise ConfigError(f"use_liger_kernel=true on a {device_type}: Liger's kernels need a GPU, leave it out")


def require_sampler(config: Config) -> None:
    """Raise ConfigError if the sampler does not exist, or if a run that draws samples lacks its package."""
    sampler = candidates(config.sampler)[0]
    if config.draws_samples:
        sampler.require_package()


def existing_samplers(config: Config) -> tuple[SamplerEntry, ...]:
    """Return the samplers that the run may use; none if the name is unknown, which ``require_sampler`` reports."""
    try:
        return candidates(config.sampler)
    except ConfigError:
        return ()
