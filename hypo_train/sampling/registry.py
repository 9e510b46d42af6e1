"""The registry of samplers: one entry for each name that the setting ``sampler`` accepts.

A sampler from outside this package is a :class:`SamplerEntry` in a module of yours, named as
``sampler: package.module:object`` (``docs/extending.md``). This module imports nothing heavy: a configuration is
checked against it before torch is loaded.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from hypo_train.utils.errors import ConfigError

if TYPE_CHECKING:
    from hypo_train.sampling.protocol import Distribution, Sampler

AUTO = "auto"


@dataclass(frozen=True)
class SamplerSettings:
    """The settings with which a run builds its sampler."""

    eos_token_ids: Sequence[int]
    pad_token_id: int
    distribution: Distribution
    score: bool = False
    """The sampler has to return ``Samples.logprobs``."""
    is_sharded: bool = False
    """FSDP shards the weights: they are gathered only during a call of ``sample``."""
    model_name_or_path: str = ""
    max_model_len: int | None = None
    """The most tokens that a prompt and its completion can have together."""

    @property
    def common(self) -> dict[str, Any]:
        """Return the keyword arguments that all samplers of this package take."""
        names = ("eos_token_ids", "pad_token_id", "distribution", "score")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class SamplerEntry:
    """One sampler: how a run builds it, what it needs, and which models it supports."""

    name: str
    build: Callable[[Any, SamplerSettings], Sampler]
    """Return the sampler for a transformers model, which may be wrapped by PEFT."""
    why_unsupported: Callable[[Any], str | None] = lambda model: None
    """Return the reason why the sampler cannot draw from a model, or None. It is also asked about a small copy of the
    model with random weights, before the weights are loaded."""
    package: str | None = None
    """A package that must be installed, by the name that Python imports."""
    install: str = ""
    """The command that installs the package, for the error message."""
    one_process: bool = False
    """The sampler works only in runs of one process."""
    prompt_kv: bool = False
    """The sampler stores each prompt's keys and values once for all completions, and can reuse the training pass's."""
    memory: Literal["decode", "generate"] | None = None
    """The kind of sampler for the memory estimate; None: its memory is not estimated."""

    def require_package(self) -> None:
        """Raise ConfigError if the sampler's package is not installed."""
        if self.package is None:
            return
        if self.package in sys.modules:
            is_installed = sys.modules[self.package] is not None
        else:
            is_installed = importlib.util.find_spec(self.package) is not None
        if not is_installed:
            raise ConfigError(f"sampler={self.name} needs {self.install} (or use sampler: auto)")


def _build_decode(model: Any, settings: SamplerSettings) -> Sampler:
    from hypo_train.sampling.decode.sampler import DecodeSampler

    if settings.is_sharded:  # a copy of the weights or a graph would be invalid after the call
        return DecodeSampler(model, **settings.common, merge_lora=False, capture=False)
    return DecodeSampler(model, **settings.common)


def _decode_unsupported(model: Any) -> str | None:
    from hypo_train.sampling.decode.support import serves

    return serves(model)


def _build_generate(model: Any, settings: SamplerSettings) -> Sampler:
    from hypo_train.sampling.generate import GenerateSampler

    try:
        return GenerateSampler(model, **settings.common)
    except ValueError as error:
        raise ConfigError(f"sampler=generate: {error}") from error


def _build_vllm(model: Any, settings: SamplerSettings) -> Sampler:
    from hypo_train.sampling.vllm import VLLMSampler

    try:
        name, limit = settings.model_name_or_path, settings.max_model_len
        return VLLMSampler(model, name, max_model_len=limit, **settings.common)
    except (ImportError, ValueError) as error:
        raise ConfigError(f"sampler=vllm: {error} (or use sampler: auto)") from error


_BUILT_IN = (
    SamplerEntry("decode", _build_decode, why_unsupported=_decode_unsupported, prompt_kv=True, memory="decode"),
    SamplerEntry("generate", _build_generate, memory="generate"),
    SamplerEntry(
        "vllm", _build_vllm, package="vllm", install="vLLM: pip install 'hypo-kernels[vllm]'", one_process=True
    ),
)
SAMPLERS = {entry.name: entry for entry in _BUILT_IN}


def check_sampler_name(name: str) -> None:
    """Raise ValueError unless ``name`` is "auto", a registered sampler, or of the form ``package.module:object``."""
    names = [AUTO, *SAMPLERS]
    if name not in names and not re.fullmatch(r"[\w.]+:\w+", name):
        raise ValueError(f"should be {', '.join(map(repr, names))} or 'package.module:object'")


def candidates(name: str) -> tuple[SamplerEntry, ...]:
    """Return the entries that ``sampler: name`` may use, the preferred one first.

    Raises:
        ConfigError: ``package.module:object`` cannot be imported or is not a SamplerEntry.
    """
    if name == AUTO:
        return SAMPLERS["decode"], SAMPLERS["generate"]
    if name in SAMPLERS:
        return (SAMPLERS[name],)
    module, _, attribute = name.partition(":")
    try:
        entry = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"sampler={name!r}: {error}") from error
    if not isinstance(entry, SamplerEntry):
        raise ConfigError(f"sampler={name!r}: {attribute} is a {type(entry).__name__}, should be a SamplerEntry")
    return (entry,)


def choose_sampler(name: str, model: Any) -> tuple[SamplerEntry, str | None]:
    """Return the entry for ``model``, and the reason why it is not the preferred one, if there is a reason.

    Raises:
        ConfigError: the sampler does not exist, or does not support the model.
    """
    preferred, *others = candidates(name)
    reason = preferred.why_unsupported(model)
    if reason is None:
        return preferred, None
    if not others:
        raise ConfigError(f"sampler={name}: {reason}; use sampler: generate")
    return others[0], reason
