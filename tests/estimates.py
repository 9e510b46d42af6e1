"""A run without the estimate of its memory, for the tests that are not about it."""

import pytest


@pytest.fixture(autouse=True)
def no_memory_estimate(monkeypatch):
    """A run's first page is without its memory, which takes longer to rehearse than a tiny model to train. Modules that
    are about it have a fixture of this name, and it."""
    monkeypatch.setattr("hypo_train.preflight.checks._check_memory", lambda *_, **__: None)
