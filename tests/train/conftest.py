"""Fixtures that the tests of the training loop share; what they build is in ``tiny.py``."""

from __future__ import annotations

from functools import cache

import datasets
import huggingface_hub
import pytest
import tiny
from accelerate.state import AcceleratorState
from estimates import no_memory_estimate  # noqa: F401


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """Nothing is fetched, and nothing is read from or left in the user's cache of data sets."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


@pytest.fixture(autouse=True, scope="session")
def own_user_cache(tmp_path_factory):
    """What runs keep for other runs goes to no folder of the user's; for the runs of module fixtures too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("user-cache")))
        yield


@pytest.fixture(autouse=True)
def own_accelerator():
    """accelerate keeps one precision a process; each test has its own."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="session")
def saved_model(tmp_path_factory):
    """``saved_model("llama", tie_word_embeddings=True)`` is the folder of such a model, saved once a session."""

    @cache
    def save(architecture="llama", *, chat=False, **changes):
        folder = tmp_path_factory.mktemp(architecture)
        return tiny.save(tiny.new_model(architecture, **changes), folder, chat=chat)

    return save


@pytest.fixture
def settings(tmp_path, saved_model):
    """``settings(algorithm="dpo")`` is a config for a run of three steps on a tiny Llama, in ``tmp_path``."""

    def make(*, model=None, **changes):
        return tiny.make_config(tmp_path, model or saved_model(), **changes)

    return make
