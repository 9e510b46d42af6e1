"""Set the Hugging Face libraries offline if the Hub cannot be reached."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

import datasets
import huggingface_hub

from hypo_train.config import Config


@contextmanager
def offline_if_unreachable(config: Config) -> Iterator[None]:
    """Set the Hugging Face libraries offline in a block if the Hub cannot be reached.

    They then use their cache at once; otherwise they would retry for half a minute. The Hub is tried only if the
    configuration names a path that does not exist on this machine.
    """
    settings: list[Any] = [huggingface_hub.constants, datasets.config]
    before = [module.HF_HUB_OFFLINE for module in settings]
    names = (config.model_name_or_path, config.dataset_name, config.reward_model_path)
    all_local = all(Path(name).expanduser().exists() for name in names if name is not None)
    unreachable = not all_local and _is_unreachable()
    try:
        for module, was in zip(settings, before, strict=True):
            module.HF_HUB_OFFLINE = was or unreachable
        yield
    finally:
        for module, was in zip(settings, before, strict=True):
            module.HF_HUB_OFFLINE = was


def _is_unreachable() -> bool:
    if getproxies():  # the Hub may be reachable through a proxy alone
        return False
    host = urlsplit(huggingface_hub.constants.ENDPOINT)
    try:
        socket.create_connection((host.hostname, host.port or 443), timeout=5).close()
    except OSError:
        return True
    return False
