"""Whether the Hub can be reached, asked once and not by every library."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

import datasets
import huggingface_hub


@contextmanager
def offline_where_unreachable() -> Iterator[None]:
    """Without the Hub its cache serves at once; libraries would ask five times, for half a minute, to say so."""
    settings: list[Any] = [huggingface_hub.constants, datasets.config]
    before = [module.HF_HUB_OFFLINE for module in settings]
    unreachable = _is_unreachable()
    try:
        for module, was in zip(settings, before, strict=True):
            module.HF_HUB_OFFLINE = was or unreachable
        yield
    finally:
        for module, was in zip(settings, before, strict=True):
            module.HF_HUB_OFFLINE = was


def _is_unreachable() -> bool:
    if getproxies():  # behind which the Hub may well be
        return False
    host = urlsplit(huggingface_hub.constants.ENDPOINT)
    try:
        socket.create_connection((host.hostname, host.port or 443), timeout=5).close()
    except OSError:
        return True
    return False
