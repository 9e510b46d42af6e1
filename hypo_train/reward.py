"""The true reward of a response, where a data set has one."""

from __future__ import annotations

import importlib
from collections.abc import Callable

from hypo_train.config import ConfigError

# (prompt text, completion text) -> true reward
RewardFunction = Callable[[str, str], float]


def load_reward(path: str | None) -> RewardFunction | None:
    """The function that ``package.module:function`` names. Raises ConfigError if there is none."""
    if path is None:
        return None
    module, _, name = path.partition(":")
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"reward={path!r}: {error}") from error
    if not callable(function):
        raise ConfigError(f"reward={path!r}: {name} is not a function")
    return function
